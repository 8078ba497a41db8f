"""One replication cycle of one machine: the sender's algorithm.

    lock                                                     one sync or run per machine
    thaw, if a mark says that it may be frozen
    contact the receiver; make, adopt or find the replica    (`enrol`)
    wait, fold or discard until both sides agree             (`plan`)
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
are not trusted any more, and the same call ships everything once. If the audit finds
that an integration's tracker missed a change (`tracking.audit`), that tracker is
not believed of this disk, and the same call reads it whole.
"""

from __future__ import annotations

import logging
import threading
import time

import msgspec

from replica.delta import DataKey, DeltaSealer
from replica.durable import FileSystem
from replica.errors import AuditMissError, BusyError, ReplicaError, RootMismatchError, TrackerDamageError
from replica.model import MAX_NOTES, Consistency, DeltaId, Frozen, ReplicaId, State, random_id
from replica.plan import Cancel, DiscardPending, Fold, Mode, PrimaryView, Readopt, ReplicaView, Ship, Wait, next_step
from replica.primary.audits import Audits, after_miss
from replica.primary.disks import Wanted, files_disk, known_disks, match_disks, measure
from replica.primary.enrol import adopt, become_another, contact, look
from replica.primary.reading import Reading
from replica.primary.record import MachineDirectory, MachineRecord
from replica.primary.retry import Patience
from replica.primary.shipment import Shipment
from replica.primary.spec import MachineSpec, SenderSpec
from replica.primary.status import noted
from replica.primary.stopping import stopping
from replica.progress import Progress, silent
from replica.tracking.audit import HASH
from replica.tracking.hash import HashTracker
from replica.tracking.instant import thaw_marked
from replica.tracking.journal import JournalSummary, JournalWriter
from replica.transport.api import Receiver
from replica.transport.wire import ReplicaInfo

RETRY_SECONDS = 60.0
WAIT_LIMIT_SECONDS = 3600.0
"""How long a receiver may take to apply a delta until a cycle ends with BusyError, and the next one asks again."""
_log = logging.getLogger(__name__)


class SyncResult(Frozen, frozen=True):
    """A point that is committed at the replica, and what it took.

    `bytes_scanned` were read from the images; `bytes_changed` is the grains that differ from the point before,
    zeroed ones included (in a first copy or resync: those that have content); `bytes_wire` are HTTP bytes sent,
    before TLS. `roots`: disk name -> Merkle root in hex.
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


def sync_machine(
    fs: FileSystem,
    spec: SenderSpec,
    machine: MachineSpec,
    receiver: Receiver,
    progress: Progress = silent,
    *,
    retry_seconds: float = RETRY_SECONDS,
    wait_limit_seconds: float = WAIT_LIMIT_SECONDS,
    stop: threading.Event | None = None,
) -> SyncResult:
    """Make one point of `machine` and see it committed. Raises a ReplicaError; `Stopped` once `stop` is set.

    `retry_seconds`: how long a connection may stay broken in the middle of a delta; `wait_limit_seconds`: how long
    the receiver may take to apply one. `receiver` is used by one thread at a time (but `abort`), and not closed.
    """
    directory = MachineDirectory(fs, spec.machine_directory(machine.name))
    patience = Patience(retry_seconds, stop)
    with directory.locked(machine.name), noted(fs, directory.path), stopping(stop, receiver):
        thaw_marked(fs, directory.path, machine.freezing)
        return _Cycle(fs, spec, machine, directory, receiver, progress, patience, wait_limit_seconds).run()


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
        self.started = time.monotonic()
        self.sent_before = receiver.bytes_sent
        self.notes: tuple[str, ...] = ()
        self.resynced = False

    def run(self) -> SyncResult:
        wanted = measure(self.fs, self.machine)
        record, key, info = contact(self.fs, self.spec, self.machine, self.directory, self.receiver, wanted)
        record, ship = self._agree(record, info, wanted)
        while True:
            try:
                return self._ship(record, key, ship)
            except (RootMismatchError, TrackerDamageError) as error:
                record = self._distrust(self.directory.load() or record, error, ship)
            info = self._look(record)
            record, ship = self._agree(record, info, wanted)

    def _distrust(self, record: MachineRecord, error: ReplicaError, ship: Ship) -> MachineRecord:
        """What was believed of a disk is wrong: note it durably, so that this very call reads again without it.

        Ends: an integration's tracker is found wrong once per disk, and our own once; then `error` is raised.
        """
        if isinstance(error, AuditMissError):
            record, note = after_miss(record, error, ship.point)
            self.notes = (*self.notes, note)[-MAX_NOTES:]
            record = self.directory.save(record)
            if error.tracker != HASH:
                return record
        if self.resynced:
            raise error
        self.resynced = True
        _log.warning("machine %r: %s; shipping everything once", self.machine.name, error)
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
                record = self.directory.fold_pending(record)
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
        """Which disk is which, noted before anything is tracked under its id."""
        disks, paths = match_disks(wanted, known_disks(record.disks, record.images, info.head))
        if (disks, paths) == (record.disks, record.images):
            return record
        return self.directory.save(msgspec.structs.replace(record, disks=disks, images=paths))

    def _readopt(self, record: MachineRecord, step: Readopt) -> tuple[MachineRecord, ReplicaInfo]:
        _log.warning(
            "machine %r: its replica is at point %d (delta %s) where this primary knows point %d (delta %s): either "
            "a copy of this state directory is at work, or one side was put back to an earlier time; adopting the "
            "replica, which fences a copy, and shipping everything once",
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

    # --- making and shipping a delta ---

    def _ship(self, record: MachineRecord, key: DataKey, ship: Ship) -> SyncResult:
        delta_id = DeltaId(random_id())
        sealer = DeltaSealer(key, record.replica_id, delta_id, record.epoch)
        base = record.head if record.trusted else None
        trackers = [HashTracker(self.fs, self.directory.path, disk, base) for disk in record.disks]
        fresh = tuple(ship.mode is not Mode.INCREMENTAL or not tracker.known for tracker in trackers)
        audits = Audits(self.machine, record, ship.base, ship.point, delta_id)
        with Shipment(
            self.fs, self.directory.path, self.receiver, sealer, delta_id, ship.base, record.epoch, self.patience
        ) as shipment:
            shipment.begin()
            with JournalWriter(self.fs, self.directory.path) as journal:
                reading = Reading(self.fs, self.directory.path, self.machine, shipment, sealer, journal, self.progress)
                snapshot, roots = reading.read(trackers, fresh, audits, ship.base, self.patience.check)
                shipment.wait_sent(reading.report)
                states = audits.states(roots)
                result = State(
                    record.replica_id,
                    delta_id,
                    ship.point,
                    record.epoch,
                    snapshot.frozen_at_ns,
                    snapshot.consistency,
                    states,
                    files=files_disk(record.disks),
                    notes=self.notes,
                )
                sizes = tuple(tracker.base_bytes for tracker in trackers)
                journal.finish(JournalSummary(ship.base.delta_id, result, fresh, sizes))
            shipment.commit(result, self.wait_limit_seconds)
        self.directory.fold_pending(audits.advance(record))
        return SyncResult(
            machine=self.machine.name,
            replica_id=record.replica_id,
            point=result.point,
            frozen_at_ns=result.frozen_at_ns,
            consistency=result.consistency,
            mode=ship.mode,
            bytes_scanned=reading.scanned,
            bytes_changed=reading.changed,
            bytes_wire=self.receiver.bytes_sent - self.sent_before,
            seconds=time.monotonic() - self.started,
            roots=result.roots,
        )
