"""What a sender keeps of one machine, and the lock on it.

    <state>/<machine>/
      lock          one sync or run at a time
      machine.json  `MachineRecord`: which replica, which epoch, the last committed state (atomic replace)
      frozen        mark: the machine may be frozen (see `tracking.instant`)
      pending       journal of a delta whose commit may have been asked for
      folding       journal of a committed delta that is being folded in
      receipt       the receiver's receipt of the newest point, as it came
      status.json   what happened last, for `replica status`; worth nothing else
      disks/<id>/   secret, digests, windows, leaves (see `tracking.hash`)

Losing all of it costs reading the disks once: the replica is found again by
the certificate, and its key is not here but in `keys`.
"""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

import msgspec

from replica import documents
from replica.durable import FileSystem, Lock
from replica.errors import BusyError, DamageError, FormatError, StorageError
from replica.model import Disk, Epoch, Frozen, KeyId, ReplicaId, State
from replica.tracking.audit import AuditAlert, DiskAudit
from replica.tracking.fold import fold
from replica.tracking.instant import marked
from replica.tracking.journal import Journal

if TYPE_CHECKING:
    from collections.abc import Iterator

_LOCK_ATTEMPTS, _LOCK_PAUSE_SECONDS = 3, 0.02
_log = logging.getLogger(__name__)


class Stage(StrEnum):
    """How far becoming the replica's writer has come. Everything before `ENROLLED` is done again if in doubt."""

    ENROLLING = "enrolling"
    ADOPTING = "adopting"
    ENROLLED = "enrolled"


class MachineRecord(Frozen, frozen=True):
    """The durable truth about one machine at its primary.

    `epoch.holder` is random and names this state directory (while ADOPTING
    `epoch` still is the former writer's, and `holder` says who will be).
    `disks` are those of the configuration when it was last looked at, `images` where each is read from.
    `audits` say how far each disk's audit has come, `alerts` what it found (the last few).
    `head` is the newest state known to be committed, `trusted` whether the
    trackers describe it. While `head` is a part of a copy, `point_frozen_at_ns`
    is the freeze time of the point before it, if there is one and it is known.
    """

    machine: str
    replica_id: ReplicaId
    key_id: KeyId
    holder: UUID
    epoch: Epoch
    stage: Stage
    disks: tuple[Disk, ...]
    head: State | None = None
    trusted: bool = True
    images: tuple[str, ...] = ()
    audits: tuple[DiskAudit, ...] = ()
    alerts: tuple[AuditAlert, ...] = ()
    point_frozen_at_ns: int | None = None

    @property
    def newest_frozen_at_ns(self) -> int | None:
        """When the newest point that is known to be committed was frozen; None: there is none, or it is not known."""
        if self.head is not None and self.head.is_point:
            return self.head.frozen_at_ns
        return self.point_frozen_at_ns


class MachineDirectory:
    """One machine's state directory. What changes it holds `locked`."""

    def __init__(self, fs: FileSystem, path: Path) -> None:
        self._fs = fs
        self.path = path

    @contextmanager
    def locked(self, machine: str) -> Iterator[None]:
        """Keep every other sync or run away, and clear what a killed one left. BusyError if one is at it."""
        self._fs.make_directory(self.path, private=True)
        with self._lock(machine):
            self._fs.clear_temporaries(self.path)
            yield

    def _lock(self, machine: str) -> Lock:
        """The lock; a `status` that looks whether it is taken holds it for a moment, too."""
        for attempt in range(_LOCK_ATTEMPTS):
            if attempt:
                time.sleep(_LOCK_PAUSE_SECONDS)
            with suppress(BusyError):
                return self._fs.lock(self.path / "lock")
        raise BusyError(
            f"another sync or run is working on machine {machine!r}",
            hint="wait for its end; where `replica run` is at work it makes the points by itself",
        )

    def load(self) -> MachineRecord | None:
        """The record, None if there is none. Raises FormatError if it is damaged."""
        path = self.path / "machine.json"
        if not self._fs.exists(path):
            return None
        try:
            return documents.load(self._fs, path, MachineRecord)
        except FormatError as error:
            if marked(self._fs, self.path):
                hint = f"it may be frozen, thaw it first (`replica sync` does); only then move {self.path} away"
                raise FormatError(error.message, hint=hint) from error
            hint = f"move {self.path} away; the next sync finds the replica again and reads every disk anew"
            raise FormatError(error.message, hint=hint) from error

    def save(self, record: MachineRecord) -> MachineRecord:
        documents.save(self._fs, self.path / "machine.json", record, private=True)
        return record

    def forget(self) -> None:
        """Remove the record of a replica that never came to be."""
        self._fs.unlink(self.path / "machine.json")

    def pending(self) -> State | None:
        """The result of the pending delta; None if there is none. A damaged journal is removed: it counts as none."""
        path = self.path / "pending"
        if not self._fs.exists(path):
            return None
        try:
            with Journal(self._fs, path) as journal:
                return journal.summary.result
        except FormatError:
            self._fs.unlink(path)
            return None

    def keep_receipt(self, data: bytes) -> None:
        """The newest point's receipt, for whoever asks here for it; nothing depends on it."""
        with suppress(StorageError):
            self._fs.replace_bytes(self.path / "receipt", data)

    def discard_pending(self) -> None:
        self._fs.unlink(self.path / "pending")

    def finish_fold(self, record: MachineRecord) -> MachineRecord:
        """Finish a fold that was interrupted, if any, by what `folding` says."""
        path = self.path / "folding"
        if not self._fs.exists(path):
            return record
        return self._fold(record, path)

    def fold_pending(self, record: MachineRecord) -> MachineRecord:
        """The pending delta was committed: fold it in and make its result the record's head."""
        return self._fold(record, self.path / "pending")

    def _fold(self, record: MachineRecord, path: Path) -> MachineRecord:
        """accept -> fold -> record -> journal gone. Damage in journal or tree costs the trackers, not the state."""
        try:
            with Journal(self._fs, path) as journal:
                result = journal.summary.result
                frozen_at_ns = record.newest_frozen_at_ns if result.partial else None
                record = msgspec.structs.replace(record, head=result, trusted=True, point_frozen_at_ns=frozen_at_ns)
                journal.accept()
                path = journal.path
                fold(self._fs, self.path, journal)
        except DamageError as error:
            _log.warning("machine %r: %s", record.machine, error)
            record = msgspec.structs.replace(record, trusted=False)
        self.save(record)
        self._remove_trackers_but(record)
        self._fs.unlink(path)
        return record

    def _remove_trackers_but(self, record: MachineRecord) -> None:
        """Forget disks that neither the newest state nor the configuration has any more."""
        states = record.head.disks if record.head is not None else ()
        kept = {str(disk.id) for disk in (*record.disks, *(state.disk for state in states))}
        for name in self._fs.list_names(self.path / "disks"):
            if name not in kept:
                self._fs.remove_tree(self.path / "disks" / name)
