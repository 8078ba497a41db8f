"""Bringing a machine's replica to its next point: one delta, or a series of parts and then one delta.

A delta that is cut has to be sent again, so a long copy goes in parts of
`part_bytes` (4 GiB; a part ends behind the window that fills it). A part is a
delta like any other, applied on arrival, but its result is *partial*: no instant
of the machine, no point, listed nowhere. The trackers describe the head after
every part, so whatever ends the series, the next cycle goes on where it was; it
reads again what is there, and sends nothing of it again.

    parts     from where the last one stopped to the end of the last disk, read from the machine as it runs
    then      one instant: what changed meanwhile, which is the point

    machine with freeze commands    a first copy begins with parts: it is frozen only for the last delta
    machine that stands still       begins with the instant; what fits into one part is one delta

Whatever was meant to be the point and finds more than a part becomes a part
itself, the machine is thawed at once, and parts follow. That happens at most
`MAX_ROUNDS` times: after that the delta takes what it takes, since a source that
changes faster than it can be shipped would otherwise never come to a point.

The cursor lives in memory and is worth nothing afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from replica.delta import DataKey, DeltaSealer
from replica.durable import FileSystem
from replica.errors import TrackerDamageError
from replica.model import DamagedLeaves, DeltaId, State, random_id
from replica.primary.audits import Audits
from replica.primary.committed import fold_committed
from replica.primary.disks import files_disk
from replica.primary.reading import START, Cursor, Extent, Reading, open_disk
from replica.primary.record import MachineDirectory, MachineRecord
from replica.primary.retry import Patience
from replica.primary.shipment import Shipment
from replica.primary.spec import MachineSpec
from replica.primary.status import Copying, note_copying
from replica.progress import Progress
from replica.tracking.hash import HashTracker
from replica.tracking.instant import Running, Snapshot
from replica.tracking.journal import JournalSummary, JournalWriter
from replica.transport.api import Receiver

MAX_ROUNDS = 3
"""How often a delta that was to be the point becomes a part instead."""

Instant = Callable[[], Snapshot]


@dataclass
class Tally:
    """What a series has done so far, in bytes."""

    scanned: int = 0
    changed: int = 0
    parts: int = 0


@dataclass
class Series:
    """What it takes to ship, and the record as it is after every delta. For one thread."""

    fs: FileSystem
    machine: MachineSpec
    directory: MachineDirectory
    receiver: Receiver
    patience: Patience
    progress: Progress
    wait_limit_seconds: float
    key: DataKey
    record: MachineRecord
    base: State
    damaged: Sequence[DamagedLeaves] = ()
    """Leaves of the head that rotted, and that the source has not as they were: they are shipped whole."""
    notes: tuple[str, ...] = ()
    """What the point says of how it came about."""
    tally: Tally = field(default_factory=Tally)
    position: int = 0
    """Bytes read since the series' last start at the first disk: how far a copy has come."""

    @property
    def path(self) -> Path:
        return self.directory.path

    def running(self) -> Snapshot:
        return Running(self.machine.images)

    def run(self, instant: Instant, whole: Extent, *, parts_first: bool, cover: bool = False) -> State:
        """See the module. The point, committed; `record` is folded.

        `whole` is what is known for the first delta that is to be the point, and its limit that of every part.
        `cover`: nothing is known of the head, everything is shipped, in one delta.
        """
        cursor = START if parts_first and self._allocated() else None
        rounds = 0
        while True:
            while cursor is not None:  # ends: every part begins behind the one before
                _, cursor = self._deliver(self.running, replace(whole, first=cursor, candidates={}), part=True)
            extent = whole if rounds < MAX_ROUNDS and not cover else replace(whole, limit_bytes=None)
            state, cursor = self._deliver(instant, extent, cover=cover)
            if state is not None and cursor is None:
                note_copying(self.fs, self.path, None)
                return state
            rounds += 1
            whole = replace(whole, candidates={})

    def _deliver(
        self, instant: Instant, extent: Extent, *, part: bool = False, cover: bool = False
    ) -> tuple[State | None, Cursor | None]:
        """Read, ship, commit, fold: one delta. Its result (None: there was nothing to ship), and where it stopped.

        `part`: it makes no point whatever it finds. Else it makes one, unless it was stopped.
        """
        delta_id = DeltaId(random_id())
        sealer = DeltaSealer(self.key, self.base.replica_id, delta_id, self.record.epoch)
        known = None if cover else self.base
        trackers = [HashTracker(self.fs, self.path, disk, known) for disk in self.record.disks]
        fresh = tuple(not tracker.known for tracker in trackers)
        audits = Audits(self.machine, self.record, self.base, self.base.point + 1, delta_id, part=part)
        if not cover:
            self._check_known(trackers)
        with Shipment(
            self.fs, self.path, self.receiver, sealer, delta_id, self.base, self.record.epoch, self.patience
        ) as shipment:
            shipment.begin()
            with JournalWriter(self.fs, self.path) as journal:
                self.position = 0 if extent.first == START else self.position
                reading = Reading(
                    self.fs, self.machine, shipment, sealer, journal, self.progress, self.position, self.damaged
                )
                read = reading.read(trackers, fresh, audits, self.base, extent, instant, self.patience.check)
                self.position += reading.scanned
                self.tally.scanned += reading.scanned
                self.tally.changed += reading.changed
                if part and not reading.found:
                    return None, read.stopped
                shipment.wait_sent(reading.report)
                partial = part or read.stopped is not None
                result = self._result(delta_id, read.snapshot, audits, read.roots, partial=partial)
                sizes = tuple(tracker.base_bytes for tracker in trackers)
                journal.finish(JournalSummary(self.base.delta_id, result, fresh, sizes))
            info = shipment.commit(result, self.wait_limit_seconds)
        record = self.record if partial else audits.advance(self.record)
        self.record = fold_committed(self.directory, record, info, result)
        self.base = result
        if partial:
            self.tally.parts += 1
            note_copying(self.fs, self.path, Copying(self.position, max(self.position, self._allocated())))
        return result, read.stopped

    def _check_known(self, trackers: list[HashTracker]) -> None:
        """A disk that the base has is compared, never covered: that would take its whole content for changed."""
        for tracker in trackers:
            if not tracker.known and self.base.disk(tracker.disk.id) is not None:
                raise TrackerDamageError(f"what is known of disk {tracker.disk.name!r} is not of the replica's head")

    def _result(
        self, delta_id: DeltaId, snapshot: Snapshot, audits: Audits, roots: list[bytes], *, partial: bool
    ) -> State:
        return State(
            self.record.replica_id,
            delta_id,
            self.base.point + (0 if partial else 1),
            self.record.epoch,
            snapshot.frozen_at_ns,
            snapshot.consistency,
            audits.partial_states(roots) if partial else audits.states(roots),
            partial=partial,
            files=files_disk(self.record.disks),
            notes=() if partial else self.notes,
        )

    def _allocated(self) -> int:
        """Bytes that the images hold now, holes left out."""
        total = 0
        snapshot = self.running()
        for disk in self.record.disks:
            with open_disk(self.fs, self.machine, snapshot, disk) as image:
                total += sum(stop - start for start, stop in image.allocated(0, image.size_bytes))
        return total
