"""Every error the engine raises on purpose.

A class here says four things about itself: the exit code of the command line,
the HTTP status a receiver answers with, whether trying again later can help,
and a stable `code` that travels in `application/problem+json`, so that the
sender raises the very class the receiver meant. The message names the thing
and what happened; `hint` says what to do. Nothing is ever told apart by text.

Exit codes (documented in docs/OPERATIONS.md): 0 success, 1 a fault in the
engine itself, 2 wrong usage of the command line, and those below.
"""

from __future__ import annotations

from typing import ClassVar
from uuid import UUID


class ReplicaError(Exception):
    """Base class. Thread-safe; fields are set once."""

    code: ClassVar[str] = "internal"
    exit_code: ClassVar[int] = 1
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    default_hint: ClassVar[str] = ""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.default_hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class ConfigError(ReplicaError):
    """A configuration file, key or certificate file that cannot be used."""

    code, exit_code, status = "config", 3, 400


class UnknownMachineError(ConfigError):
    """A machine, disk, storage or replica name that is not there."""

    code, exit_code, status = "unknown-machine", 3, 404


class ImageError(ReplicaError):
    """An image that is missing, unreadable, or not what its format says."""

    code, exit_code, status = "image", 4, 400


class SizeChangedError(ImageError):
    """A disk whose size differs from the replica's."""

    code, exit_code, status = "size-changed", 4, 409


class SourceBusyError(ReplicaError):
    """The source did not stand still, or no instant of it could be made."""

    code, exit_code, status, retryable = "source-busy", 5, 409, True


class FreezeError(SourceBusyError):
    """A freeze or thaw command failed or took too long: no point was made."""

    code, exit_code = "freeze", 5


class TransportError(ReplicaError):
    """The other side cannot be reached, or the connection broke and stayed broken."""

    code, exit_code, status, retryable = "transport", 6, 503, True


class ProtocolError(ReplicaError):
    """The other side said something that the protocol does not allow."""

    code, exit_code, status = "protocol", 6, 400


class ForbiddenError(ReplicaError):
    """Certificate not trusted, identity not allowed, or another owner's replica."""

    code, exit_code, status = "forbidden", 7, 403


class ConflictError(ReplicaError):
    """The two sides disagree on the state; nothing was changed."""

    code, exit_code, status = "conflict", 8, 409


class BaseMismatchError(ConflictError):
    """A delta whose base is not the replica's head; `head` is the delta id of the state that is."""

    code, exit_code, status, retryable = "base-mismatch", 8, 409, True

    def __init__(self, message: str, *, hint: str = "", head: UUID | None = None) -> None:
        super().__init__(message, hint=hint)
        self.head = head


class FencedError(ConflictError):
    """This primary's epoch is not the replica's: another one took over."""

    code, exit_code, status = "fenced", 8, 409


class BusyError(ReplicaError):
    """Somebody else works on the same thing right now."""

    code, exit_code, status, retryable = "busy", 9, 409, True


class StorageError(ReplicaError):
    """Reading or writing the store or the state failed; nothing was acknowledged."""

    code, exit_code, status, retryable = "storage", 10, 507, True
    default_hint = "check that it is there, who may use it, and the device below it"


class StorageFullError(StorageError):
    """No space, or the quota is used up. `need_bytes`: what could not be had, if that is known, else 0."""

    code, exit_code, status, retryable = "storage-full", 10, 507, True
    default_hint = "free some space there; the machine goes on by itself, every point is kept"

    def __init__(self, message: str, *, hint: str = "", need_bytes: int = 0) -> None:
        super().__init__(message, hint=hint)
        self.need_bytes = need_bytes


class DamageError(ReplicaError):
    """Stored bytes are not what they were: a digest, seal or checksum does not fit."""

    code, exit_code, status = "damage", 11, 500


class FormatError(DamageError):
    """Bytes that are no valid delta, manifest, state or journal file."""

    code, exit_code, status = "format", 11, 400


class RootMismatchError(DamageError):
    """The result of a delta does not have the Merkle root its manifest names."""

    code, exit_code, status, retryable = "root-mismatch", 11, 409, True


class LostError(DamageError):
    """A range of a disk at some point that nobody has any more; every other byte of that point is there.

    `disk` is the disk's name; `offset` and `length` are in bytes.
    """

    code, exit_code = "lost", 11

    def __init__(self, message: str, *, hint: str = "", disk: str = "", offset: int = 0, length: int = 0) -> None:
        super().__init__(message, hint=hint)
        self.disk, self.offset, self.length = disk, offset, length


class LeafDamageError(DamageError):
    """Leaves of the head are not what its Merkle tree says: the delta is refused, nothing was changed.

    They are noted: at its next contact the sender sends what they held, or all of what they hold now.
    """

    code, exit_code, status, retryable = "leaf-damage", 11, 409, True


class TrackerDamageError(DamageError):
    """What a sender remembers of a disk does not fit together; reading the disk anew heals it."""

    code, exit_code, status, retryable = "tracker-damage", 11, 409, True


class AuditMissError(TrackerDamageError):
    """A tracker reported clean what had changed. `disk` is the disk's name, `tracker` who was believed."""

    code, exit_code, status, retryable = "audit-miss", 11, 409, True

    def __init__(self, message: str, *, hint: str = "", disk: str = "", tracker: str = "") -> None:
        super().__init__(message, hint=hint)
        self.disk, self.tracker = disk, tracker


class KeyMissingError(DamageError):
    """The data key that sealed a file is not in the key directory, or is another one."""

    code, exit_code, status = "key-missing", 11, 409


class PointGoneError(ReplicaError):
    """The point is not listed (never was, or was rotated out)."""

    code, exit_code, status = "point-gone", 12, 404


class TargetExistsError(ReplicaError):
    """Something is already where a restore or a new PKI would write."""

    code, exit_code, status = "target-exists", 13, 409


class ListenError(ReplicaError):
    """The receiver cannot listen on its address (port in use, not allowed)."""

    code, exit_code, status = "listen", 14, 500


def _subclasses(cls: type[ReplicaError]) -> list[type[ReplicaError]]:
    return [cls, *(s for c in cls.__subclasses__() for s in _subclasses(c))]


BY_CODE: dict[str, type[ReplicaError]] = {c.code: c for c in reversed(_subclasses(ReplicaError))}
"""Every class by its wire code; what a problem document is turned back into."""
