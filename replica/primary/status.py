"""What a primary knows of a machine by itself, without asking the other side.

Two files tell it: `machine.json`, the truth about what was committed, and
`status.json`, which a cycle leaves for nobody but this page: that it has begun,
or how it ended. Whether one runs is what the machine's lock says; a process id
in a file would soon be another process's. A status that cannot be written or read hinders nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path

import msgspec

from replica import documents
from replica.durable import FileSystem
from replica.errors import BusyError, FormatError, ReplicaError, StorageError
from replica.model import Frozen, ReplicaId
from replica.primary.record import MachineDirectory
from replica.primary.retry import Stopped
from replica.primary.spec import MachineSpec, SenderSpec
from replica.tracking.audit import AuditAlert


class Word(StrEnum):
    """A machine's state in one word."""

    NEW = "new"  # no point was ever committed
    OK = "ok"  # the last cycle made its point
    SYNCING = "syncing"  # a cycle is running
    FAILING = "failing"  # the last cycle failed
    INTERRUPTED = "interrupted"  # the process that ran the last cycle is gone
    FROZEN = "frozen"  # its freeze may still hold; the next cycle thaws it first
    DAMAGED = "damaged"  # its state directory cannot be read


class LastError(Frozen, frozen=True):
    """How a cycle ended that made no point."""

    code: str
    message: str
    hint: str
    at_ns: int


class Copying(Frozen, frozen=True):
    """How far a copy in parts has come: bytes of the images that were compared and shipped, of all they have."""

    done_bytes: int
    total_bytes: int


class CycleStatus(Frozen, frozen=True):
    """`status.json`. `pid`: who began a cycle that has not ended; `last_error`: of the last one that did;
    `next_due_ns`: known when `run` is at work; `copying`: while a copy in parts has not come to its point.
    """

    updated_at_ns: int
    pid: int | None = None
    last_error: LastError | None = None
    next_due_ns: int | None = None
    copying: Copying | None = None


class MachineStatus(Frozen, frozen=True):
    """One machine, as `replica status` shows it. Nothing committed yet: `point` 0, no `frozen_at_ns`."""

    machine: str
    to: str
    state: Word
    replica_id: ReplicaId | None
    point: int
    frozen_at_ns: int | None
    rpo_seconds: float | None
    last_error: LastError | None
    next_due_ns: int | None
    copying: Copying | None = None
    alerts: tuple[AuditAlert, ...] = ()


def machine_status(fs: FileSystem, spec: SenderSpec, machine: MachineSpec, now_ns: int | None = None) -> MachineStatus:
    """What the machine's state directory says. What of it cannot be read is `last_error`; nothing is raised."""
    now_ns = time.time_ns() if now_ns is None else now_ns
    path = spec.machine_directory(machine.name)
    cycle = read_status(fs, path)
    error = cycle.last_error if cycle else None
    record = None
    try:
        record = MachineDirectory(fs, path).load()
        word = _word(fs, path, cycle, record is not None and record.head is not None and record.head.point > 0)
    except (FormatError, StorageError) as failure:
        word, error = Word.DAMAGED, error_of(failure, now_ns)
    head = record.head if record is not None and record.head is not None and record.head.point else None
    frozen_at_ns = record.newest_frozen_at_ns if record is not None and head is not None else None
    partial = record is not None and record.head is not None and record.head.partial
    return MachineStatus(
        machine=machine.name,
        to=machine.to,
        state=word,
        replica_id=record.replica_id if record is not None else None,
        point=head.point if head else 0,
        frozen_at_ns=frozen_at_ns,
        rpo_seconds=max(0.0, (now_ns - frozen_at_ns) / 1e9) if frozen_at_ns is not None else None,
        last_error=error,
        next_due_ns=cycle.next_due_ns if cycle else None,
        copying=cycle.copying if cycle and partial else None,
        alerts=record.alerts if record is not None else (),
    )


def _word(fs: FileSystem, path: Path, cycle: CycleStatus | None, committed: bool) -> Word:
    if is_running(fs, path):
        return Word.SYNCING
    if fs.exists(path / "frozen"):
        return Word.FROZEN
    if cycle is not None and cycle.pid is not None:
        return Word.INTERRUPTED
    if cycle is not None and cycle.last_error is not None:
        return Word.FAILING
    return Word.OK if committed else Word.NEW


def is_running(fs: FileSystem, path: Path) -> bool:
    """Whether a sync or run holds the machine's lock. One that wants it this very moment tries again."""
    if not fs.exists(path / "lock"):
        return False
    try:
        fs.lock(path / "lock", shared=True).release()
    except BusyError:
        return True
    return False


def error_of(error: ReplicaError, now_ns: int) -> LastError:
    return LastError(error.code, error.message, error.hint, now_ns)


def read_status(fs: FileSystem, path: Path) -> CycleStatus | None:
    """The last cycle's status; None if there is none that can be read."""
    file = path / "status.json"
    with suppress(FormatError, StorageError):
        return documents.load(fs, file, CycleStatus) if fs.exists(file) else None
    return None


def write_status(fs: FileSystem, path: Path, status: CycleStatus) -> None:
    """Leave a note of how it went; a full disk is no reason to fail a cycle that succeeded."""
    with suppress(StorageError):
        documents.save(fs, path / "status.json", status)


@contextmanager
def noted(fs: FileSystem, path: Path) -> Iterator[None]:
    """Note that a cycle runs in this process, and how it ended."""
    before = read_status(fs, path)
    previous = before.last_error if before is not None else None
    copying = before.copying if before is not None else None
    write_status(fs, path, CycleStatus(time.time_ns(), pid=os.getpid(), last_error=previous, copying=copying))
    failure: LastError | None = None
    try:
        yield
    except Stopped:
        failure = previous
        raise
    except Exception as error:
        known = error if isinstance(error, ReplicaError) else ReplicaError(f"a fault in the engine: {error!r}")
        failure = error_of(known, time.time_ns())
        raise
    finally:
        now = read_status(fs, path)
        copying = now.copying if now is not None else None
        write_status(fs, path, CycleStatus(time.time_ns(), last_error=failure, copying=copying))


def note_copying(fs: FileSystem, path: Path, copying: Copying | None) -> None:
    """Note how far a copy in parts has come; None when its point was made."""
    status = read_status(fs, path) or CycleStatus(time.time_ns())
    if status.copying != copying:
        write_status(fs, path, msgspec.structs.replace(status, copying=copying))


def note_due(fs: FileSystem, path: Path, due_ns: int | None) -> None:
    """Note when the next cycle is due; None when nobody runs them any more."""
    status = read_status(fs, path) or CycleStatus(time.time_ns())
    if status.next_due_ns != due_ns:
        write_status(fs, path, msgspec.structs.replace(status, next_due_ns=due_ns))
