"""One replication cycle of one machine: the sender's algorithm.

    lock                                                     one sync or run per machine
    thaw, if a mark says that it may be frozen
    contact the receiver; make, adopt or find the replica    (`enrol`)
    wait, fold or discard until both sides agree             (`plan`)
    send leaves of the head that rotted there again          (`repair`)
    rebuild the trackers that do not describe the head       (`resync`)
    parts, while there is more to ship than one delta takes  (`series`)
    begin a delta on the replica's head                      the receiver may refuse: nothing was frozen yet
    freeze                                                   (`tracking.instant`)
      every disk: scan -> rows -> segments -> sealed -> spool -> sent by its own thread
    thaw, as soon as the last byte was read                  or the proof that the source stood still
    all segments arrived; journal durable
    commit                                                   from here on only the receiver knows
    fold the journal, store the new state

An exception anywhere leaves a state from which the next cycle goes on: before
the commit is asked for nothing has changed but the receiver's spool; after it,
the journal is there, and the plan finds out what became of it.

If the receiver finds other roots than the manifest names, or what is stored of a
disk does not fit together, the trackers do not describe what they should: they
are not trusted any more, and the same call rebuilds them. Only if that cannot
be done, or the roots differ again, everything is shipped once. If it finds that
leaves of its own head rotted, the same call repairs them and ships again. If the
audit finds that an integration's tracker missed a change (`tracking.audit`), that
tracker is not believed of this disk, and the same call reads it whole.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from itertools import chain, count

import msgspec

from replica.delta import DataKey
from replica.durable import FileSystem
from replica.errors import (
    AuditMissError,
    BusyError,
    DamageError,
    LeafDamageError,
    RootMismatchError,
    TrackerDamageError,
)
from replica.images import Image
from replica.machine_files import FILES_DISK_NAME
from replica.model import MAX_NOTES, Consistency, Disk, DiskId, Frozen, ReplicaId, State
from replica.plan import Cancel, DiscardPending, Fold, Mode, PrimaryView, Readopt, ReplicaView, Ship, Wait, next_step
from replica.primary.audits import after_miss
from replica.primary.committed import fold_committed
from replica.primary.disks import Wanted, known_disks, match_disks, measure
from replica.primary.enrol import adopt, become_another, contact, look
from replica.primary.reading import Extent, open_disk
from replica.primary.record import MachineDirectory, MachineRecord
from replica.primary.repair import Repair
from replica.primary.resync import resync
from replica.primary.retry import Patience
from replica.primary.series import Series
from replica.primary.spec import MachineSpec, SenderSpec
from replica.primary.status import noted
from replica.primary.stopping import stopping
from replica.progress import Progress, silent
from replica.tracking.audit import HASH, distrust
from replica.tracking.hash import HashTracker
from replica.tracking.instant import Snapshot, freeze, thaw_marked
from replica.tracking.rebuild import Rebuilt
from replica.transport.api import Receiver
from replica.transport.wire import ReplicaInfo

RETRY_SECONDS = 60.0
WAIT_LIMIT_SECONDS = 3600.0
"""How long a receiver may take to apply a delta until a cycle ends with BusyError, and the next one asks again."""
ATTEMPTS = 2
"""How often one cycle compares with the replica anew, and how often it repairs, before it gives up."""
_log = logging.getLogger(__name__)


class SyncResult(Frozen, frozen=True):
    """A point that is committed at the replica, and what it took.

    `bytes_scanned` were read from the images; `bytes_changed` is the grains that differ from the point before,
    zeroed ones included (in a first copy: those that have content; in a resync: those that differ from the
    replica's head); `bytes_wire` are HTTP bytes sent, before TLS. `roots`: disk name -> Merkle root in hex. `parts`
    went before the point (see `series`). `bytes_differing`: in a resync, the leaves that differed from the head.
    `bytes_repaired`: of leaves of the head that had rotted and were repaired from the source. `notices`: what somebody
    should know of this point, in words: disks that it has no more, and damage that was met.
    """

    machine: str
    replica_id: ReplicaId
    point: int
    frozen_at_ns: int
    consistency: Consistency
    mode: Mode
    bytes_scanned: int
    bytes_changed: int
    bytes_wire: int
    seconds: float
    roots: dict[str, str]
    parts: int = 0
    bytes_differing: int | None = None
    bytes_repaired: int = 0
    notices: tuple[str, ...] = ()


def sync_machine(
    fs: FileSystem,
    spec: SenderSpec,
    machine: MachineSpec,
    receiver: Receiver,
    progress: Progress = silent,
    *,
    rebuild: bool = False,
    retry_seconds: float = RETRY_SECONDS,
    wait_limit_seconds: float = WAIT_LIMIT_SECONDS,
    stop: threading.Event | None = None,
) -> SyncResult:
    """Make one point of `machine` and see it committed. Raises a ReplicaError; `Stopped` once `stop` is set.

    `rebuild`: the trackers are compared with the replica's head (a resync), also if nothing is wrong with them.
    `retry_seconds`: how long a connection may stay broken in the middle of a delta; `wait_limit_seconds`: how long
    the receiver may take to apply one. `receiver` is used by one thread at a time (but `abort`), and not closed.
    """
    directory = MachineDirectory(fs, spec.machine_directory(machine.name))
    patience = Patience(retry_seconds, stop)
    with directory.locked(machine.name), noted(fs, directory.path), stopping(stop, receiver):
        thaw_marked(fs, directory.path, machine.freezing, machine.images)
        return _Cycle(fs, spec, machine, directory, receiver, progress, patience, wait_limit_seconds).run(rebuild)


class _Cycle:
    """One call of `sync_machine`, with the machine's lock held."""

    def __init__(
        self,
        fs: FileSystem,
        spec: SenderSpec,
        machine: MachineSpec,
        directory: MachineDirectory,
        receiver: Receiver,
        progress: Progress,
        patience: Patience,
        wait_limit_seconds: float,
    ) -> None:
        self.fs, self.spec, self.machine, self.directory = fs, spec, machine, directory
        self.receiver, self.progress, self.patience = receiver, progress, patience
        self.wait_limit_seconds = wait_limit_seconds
        self.repair = Repair(fs, machine, receiver, patience)
        self.started = time.monotonic()
        self.sent_before = receiver.bytes_sent
        self.notes: tuple[str, ...] = ()
        self.resynced: int | None = None
        """Bytes of leaves that a resync found to differ; None as long as there was none."""
        self.lacking: tuple[str, ...] | None = None
        """What the head had when this began, and the point will not have."""
        self.cover = False
        """Nothing can be known of the head: everything is shipped."""

    def run(self, distrust: bool = False) -> SyncResult:
        wanted = measure(self.fs, self.machine)
        record, key, info = contact(self.fs, self.spec, self.machine, self.directory, self.receiver, wanted)
        compared = repaired = 0
        while True:
            record, ship = self._agree(record, info, wanted)
            if self.lacking is None:
                self.lacking = ship.base.lacking(record.disks)
            if distrust and ship.mode is Mode.INCREMENTAL:
                record = self._distrust(record)
            self.repair.run(record, info.damaged)
            try:
                return self._make_point(record, key, ship)
            except LeafDamageError as error:
                repaired += 1
                if repaired > ATTEMPTS:
                    raise
                _log.warning("machine %r: %s; repairing what can be", self.machine.name, error)
                record = self.directory.load() or record
            except (RootMismatchError, TrackerDamageError) as error:
                record = self.directory.load() or record
                if isinstance(error, AuditMissError):
                    record = self._missed(record, error, ship)
                if not isinstance(error, AuditMissError) or error.tracker == HASH:
                    compared += 1
                    if compared > ATTEMPTS:
                        raise
                    _log.warning("machine %r: %s; comparing with the replica anew", self.machine.name, error)
                    self.cover = self.resynced is not None and isinstance(error, RootMismatchError)
                    record = self._distrust(record)
            info = self._look(record)

    def _missed(self, record: MachineRecord, miss: AuditMissError, ship: Ship) -> MachineRecord:
        """What was believed of a disk is wrong: note it durably, so that this very call reads again without it.

        An integration's tracker is found wrong once per disk, so this ends.
        """
        record, note = after_miss(record, miss, ship.point)
        self.notes = (*self.notes, note)[-MAX_NOTES:]
        return self.directory.save(record)

    def _distrust(self, record: MachineRecord) -> MachineRecord:
        return self.directory.save(msgspec.structs.replace(record, trusted=False))

    # --- agreeing on where to start ---

    def _agree(
        self, record: MachineRecord, info: ReplicaInfo, wanted: tuple[Wanted, ...]
    ) -> tuple[MachineRecord, Ship]:
        """Do what the plan says until it says to ship. Raises what the plan raises, and BusyError at last."""
        deadline = time.monotonic() + self.wait_limit_seconds
        delay = 0.05
        while True:
            record = self._match(record, info, wanted)
            primary = PrimaryView(
                record.machine, record.epoch, record.disks, record.head, self.directory.pending(), record.trusted
            )
            step = next_step(primary, ReplicaView(info.epoch, info.head, info.applying, info.receiving))
            if isinstance(step, Ship):
                break
            if isinstance(step, Fold):
                try:
                    record = fold_committed(self.directory, record, info, step.result)
                except RootMismatchError as error:
                    _log.warning("machine %r: %s", record.machine, error)
                continue
            if isinstance(step, DiscardPending):
                self.directory.discard_pending()
                continue
            if isinstance(step, Readopt):
                record, info = self._readopt(record, step)
                continue
            if time.monotonic() > deadline:
                raise BusyError(f"the receiver still applies a delta of machine {record.machine!r}")
            self._cancel_or_wait(step, record, delay)
            delay = min(2 * delay, 1.0)
            info = self._look(record)
        return record, step

    def _match(self, record: MachineRecord, info: ReplicaInfo, wanted: tuple[Wanted, ...]) -> MachineRecord:
        """Which disk is which, noted before anything is tracked under its id.

        A disk that is read from another image may have been replaced. An integration's tracker, which is asked by the
        disk's name, is not believed of it until it was read whole; that is noted with the path, or it would be
        forgotten if this cycle ended before its point.
        """
        disks, paths = match_disks(wanted, known_disks(record.disks, record.images, info.head))
        if (disks, paths) == (record.disks, record.images):
            return record
        known = known_disks(record.disks, record.images, None)
        before = {entry.disk.id: entry.image for entry in known}
        audits = record.audits
        for disk, path in zip(disks, paths, strict=True):
            if before.get(disk.id) != path:
                audits = distrust(audits, disk.id)
        return self.directory.save(msgspec.structs.replace(record, disks=disks, images=paths, audits=audits))

    def _readopt(self, record: MachineRecord, step: Readopt) -> tuple[MachineRecord, ReplicaInfo]:
        _log.warning(
            "machine %r: its replica is at point %d (delta %s) where this primary knows point %d (delta %s): either "
            "a copy of this state directory is at work, or one side was put back to an earlier time; adopting the "
            "replica, which fences a copy, and comparing with it anew",
            record.machine,
            step.found.point,
            step.found.delta_id,
            step.expected.point,
            step.expected.delta_id,
        )
        record = become_another(self.directory, record)
        return self.patience.call(lambda: adopt(self.directory, self.receiver, record))

    def _look(self, record: MachineRecord) -> ReplicaInfo:
        return self.patience.call(lambda: look(self.receiver, record))

    def _cancel_or_wait(self, step: Wait | Cancel, record: MachineRecord, delay: float) -> None:
        if isinstance(step, Cancel):
            try:
                self.patience.call(lambda: self.receiver.discard(record.replica_id, step.delta_id))
                return
            except BusyError:  # being applied after all
                pass
        self.patience.pause(delay)

    # --- making the point ---

    def _make_point(self, record: MachineRecord, key: DataKey, ship: Ship) -> SyncResult:
        """Rebuild what does not describe the head, ship what differs; the point, committed."""
        series = Series(
            self.fs,
            self.machine,
            self.directory,
            self.receiver,
            self.patience,
            self.progress,
            self.wait_limit_seconds,
            key,
            record,
            ship.base,
            self.repair.left,
            self.notes,
        )
        still = self.machine.freeze is None
        instants: Iterator[Snapshot] = (self._freeze() for _ in count())
        found: Mapping[DiskId, Rebuilt] = {}
        unknown = self._unknown(record, ship.base)
        if unknown and not self.cover:
            snapshot = self._freeze() if still else series.running()
            found = self._resync(record, ship.base, unknown, snapshot)
            if not self.cover:
                series.record = self._believe(record, ship.base)
            if still:  # its stamps were taken before the first read: what was compared is part of the instant
                instants = chain([snapshot], instants)
        series.tally.scanned = sum(one.bytes_read for one in found.values())
        limit = self.spec.part_bytes
        long = ship.base.is_empty or ship.base.partial or sum(one.bytes_differing for one in found.values()) > limit
        candidates = {
            disk.id: found[disk.id].windows
            for disk in unknown
            if still and not self.repair.left and _comparable(disk, ship.base, found)
        }
        point = series.run(
            lambda: next(instants),
            Extent(limit_bytes=limit, candidates=candidates),
            parts_first=long and not still and not self.cover,
            cover=self.cover,
        )
        return self._result(point, series, self._mode(ship.base))

    def _freeze(self) -> Snapshot:
        machine = self.machine
        return freeze(self.fs, self.directory.path, machine.name, machine.images, machine.freezing)

    def _unknown(self, record: MachineRecord, base: State) -> list[Disk]:
        """The disks of the head that the trackers do not describe, or are not believed to."""
        believed = base if record.trusted and record.head is not None else None
        trackers = [HashTracker(self.fs, self.directory.path, disk, believed) for disk in record.disks]
        return [t.disk for t in trackers if base.disk(t.disk.id) is not None and not t.known]

    def _resync(
        self, record: MachineRecord, base: State, disks: list[Disk], snapshot: Snapshot
    ) -> Mapping[DiskId, Rebuilt]:
        """Rebuild; if the head's own tree is damaged nothing can be compared with it, and everything is shipped."""

        def open_image(disk: Disk) -> Image:
            return open_disk(self.fs, self.machine, snapshot, disk)

        try:
            found = resync(
                self.fs, self.directory.path, self.receiver, self.patience, base, disks, open_image, self.progress
            )
        except TrackerDamageError:
            raise
        except DamageError as error:
            _log.warning("machine %r: %s; shipping everything once", self.machine.name, error)
            self.cover, found = True, {}
        self.resynced = (self.resynced or 0) + sum(one.bytes_differing for one in found.values())
        return found

    def _believe(self, record: MachineRecord, base: State) -> MachineRecord:
        """The trackers describe `base` now, which therefore is the head that is known."""
        if record.head == base and record.trusted:
            return record
        return self.directory.save(msgspec.structs.replace(record, head=base, trusted=True))

    def _mode(self, base: State) -> Mode:
        if self.resynced is not None or self.cover:
            return Mode.RESYNC
        return Mode.INITIAL if base.point == 0 else Mode.INCREMENTAL

    def _result(self, point: State, series: Series, mode: Mode) -> SyncResult:
        return SyncResult(
            machine=self.machine.name,
            replica_id=point.replica_id,
            point=point.point,
            frozen_at_ns=point.frozen_at_ns,
            consistency=point.consistency,
            mode=mode,
            bytes_scanned=series.tally.scanned,
            bytes_changed=series.tally.changed,
            bytes_wire=self.receiver.bytes_sent - self.sent_before,
            seconds=time.monotonic() - self.started,
            roots=point.roots,
            parts=series.tally.parts,
            bytes_differing=self.resynced,
            bytes_repaired=self.repair.bytes_repaired,
            notices=self._notices(),
        )

    def _notices(self) -> tuple[str, ...]:
        left = sum(leaves.stop - leaves.first for leaves in self.repair.left)
        rotted = f"{left} leaves of the head rotted and have changed at the source since: older points may lack them"
        return (*(self.lacking or ()), *((rotted,) if left else ()))


def _comparable(disk: Disk, base: State, found: Mapping[DiskId, Rebuilt]) -> bool:
    """Whether what a comparison found is all that may differ.

    Of a disk that grew it says nothing of the rest. The machine's files are read anew for the point, and only that
    reading is proven to be one instant: a file may have changed since the comparison where nothing had differed.
    """
    before = base.disk(disk.id)
    if disk.name == FILES_DISK_NAME or disk.id not in found:
        return False
    return before is not None and before.disk.size_bytes == disk.size_bytes
