"""Reading a machine at one instant: from images to sealed segments in the spool, and the journal.

    freeze -> open the images -> scan (reads ahead) -> rows and payload -> packer -> sealing threads -> shipment
    close the images -> thaw, or the proof that all stood still

A reading may be told how much it may find. It stops behind the window where it
has found that much, and says where: what it read is then a part of a copy and
no point, so nothing needs to be proven. What it did not reach, in this disk or
the next ones, is as it was in the base (see `series`).

Memory is bounded whatever the disks' size: three windows, the packer's open
segment, and a few segments being sealed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple

from replica import images
from replica.delta import DATA, DeltaSealer, Packer, Rows, hole_rows, window_rows
from replica.durable import FileSystem
from replica.errors import SizeChangedError
from replica.images import Image
from replica.machine_files import FILES_DISK_NAME
from replica.merkle import MemoryNodes, MerkleTree
from replica.model import DamagedLeaves, Disk, DiskId, DiskState, State
from replica.primary.audits import Audits
from replica.primary.files import FilesImage
from replica.primary.repair import mark_dirty
from replica.primary.sealing import Sealing
from replica.primary.shipment import Shipment
from replica.primary.spec import MachineSpec
from replica.progress import Progress, silent
from replica.tracking.hash import Candidates, Gap, HashTracker, Scan, Window
from replica.tracking.instant import Running, Snapshot
from replica.tracking.journal import JournalWriter


class Cursor(NamedTuple):
    """Where a reading begins or was stopped: a disk (by its place in the result's table) and a window in it."""

    disk: int = 0
    window: int = 0


START = Cursor()


@dataclass(frozen=True)
class Extent:
    """Which part of the machine a reading is of. All of it, unless something is known or it may find only so much."""

    first: Cursor = START
    limit_bytes: int | None = None
    candidates: Mapping[DiskId, Candidates] = field(default_factory=dict)
    """Of disks that were just compared: where alone they may differ."""


class Read(NamedTuple):
    """What a reading was of. `stopped`: where it had found as much as it may; None: it came to the end."""

    snapshot: Snapshot
    roots: list[bytes]
    stopped: Cursor | None


class Reading:
    """One reading of all disks, into a shipment and a journal. For one thread."""

    def __init__(
        self,
        fs: FileSystem,
        machine: MachineSpec,
        shipment: Shipment,
        sealer: DeltaSealer,
        journal: JournalWriter,
        progress: Progress,
        before: int = 0,
        whole: Sequence[DamagedLeaves] = (),
    ) -> None:
        """`before`: how much was read by earlier readings that this one goes on from, for the progress.

        `whole`: leaves that go into the delta with all of their grains, changed or not.
        """
        self._fs, self._machine = fs, machine
        self._shipment, self._sealer, self._journal = shipment, sealer, journal
        self._progress, self._before = progress, before
        self._whole = list(whole)
        self._found = 0
        self._total = 0
        self.scanned = 0
        """Bytes read from the images."""
        self.changed = 0
        """Bytes of the grains that changed; of a disk whose trackers were not known: that have content."""

    def read(
        self,
        trackers: Sequence[HashTracker],
        fresh: Sequence[bool],
        audits: Audits,
        base: State,
        extent: Extent,
        instant: Callable[[], Snapshot],
        check: Callable[[], None],
    ) -> Read:
        """Make the instant, scan every disk, end it. The snapshot is over by now.

        Raises what freezing, the images and the shipment raise, and what `check` raises, which is called often.
        """
        roots: list[bytes] = []
        stopped: Cursor | None = None
        removed = (state.disk for state in base.disks)  # a delta's table names them, too (`delta.change`)
        table = sorted({disk.id for disk in (*removed, *(tracker.disk for tracker in trackers))})
        with Sealing(self._sealer, self._shipment.put) as sealing:
            packer = Packer(sealing.add)
            with instant() as snapshot:

                def check_all() -> None:
                    check()
                    snapshot.check()
                    self._shipment.check()

                with ExitStack() as stack:  # closed before `finish`: thaw may remove the snapshot that is open here
                    opened = [
                        stack.enter_context(open_disk(self._fs, self._machine, snapshot, tracker.disk))
                        for tracker in trackers
                    ]
                    if self._progress is not silent:
                        self._total = sum(stop - start for i in opened for start, stop in i.allocated(0, i.size_bytes))
                    candidates = audits.ask(fresh, extent.candidates)
                    for index, (tracker, image) in enumerate(zip(trackers, opened, strict=True)):
                        if index < extent.first.disk or stopped is not None:
                            root = _unread(tracker.disk, base)
                            if root is not None:
                                roots.append(root)
                                continue
                        compared = extent.candidates.get(tracker.disk.id)
                        scan = tracker.scan(
                            image,
                            self._journal,
                            index,
                            fresh=fresh[index],
                            candidates=compared if compared is not None else candidates[index],
                            first_window=extent.first.window if index == extent.first.disk else 0,
                            audit=audits.plans[index] if compared is None else None,
                            check=check_all,
                        )
                        before = base.disk(tracker.disk.id)
                        cut = before is not None and before.disk.size_bytes > tracker.disk.size_bytes
                        limit = None if stopped is not None or cut else extent.limit_bytes  # a cut is at the end
                        if self._read_disk(scan, table.index(tracker.disk.id), packer, limit, before):
                            stopped = Cursor(index, scan.next_window)
                        roots.append(scan.root)
                    packer.flush()
                    if stopped is None and self._machine.freeze is None and not isinstance(snapshot, Running):
                        for image in opened:
                            if isinstance(image, FilesImage):
                                image.check()
                if stopped is None:
                    snapshot.finish()
            sealing.finish()
        return Read(snapshot, roots, stopped)

    def _read_disk(self, scan: Scan, index: int, packer: Packer, limit: int | None, base: DiskState | None) -> bool:
        """Scan one disk into the packer; whether that was stopped at the limit.

        `base`: as the delta's base has it; zeros beyond that need not be said.
        """
        base_grains = base.disk.count_grains if base is not None else 0
        before = self.scanned
        stopped = False
        for piece in scan:
            if isinstance(piece, Window):
                mark_dirty(piece, scan.disk, self._whole)
            rows = _add(piece, scan.disk, index, packer, base_grains)
            compared = isinstance(piece, Window) and piece.dirty is not None
            data = int(rows["count"][rows["data"] == DATA].sum()) * scan.disk.grain_bytes
            self.changed += int(rows["count"].sum()) * scan.disk.grain_bytes if compared else data
            self._found += data
            self.scanned = before + scan.bytes_read
            self.report()
            if limit is not None and self._found >= limit:
                scan.stop()
                stopped = True
        return stopped

    @property
    def found(self) -> bool:
        """Whether there was anything to ship."""
        return self.changed > 0

    def report(self) -> None:
        """Tell the progress how much was read and is not waiting to be sent."""
        if self._total:
            done = min(self._before + self.scanned, self._total)
            self._progress(max(0, done - self._shipment.waiting_bytes), self._total)


def open_disk(fs: FileSystem, machine: MachineSpec, snapshot: Snapshot, disk: Disk) -> Image:
    """The image to read, or the snapshot of it that `freeze` named; in the image's format either way."""
    if disk.name == FILES_DISK_NAME:
        return FilesImage(fs, machine.files, running=isinstance(snapshot, Running))
    spec = next(spec for spec in machine.disks if spec.name == disk.name)
    path = snapshot.paths[disk.name]
    format = "nbd" if images.is_uri(path) else images.format_of(spec.image, spec.format)
    image = images.open(path, format, fs=fs, parents=spec.parents)
    try:
        snapshot.opened(disk.name, image.files)
        if image.size_bytes != disk.size_bytes:
            raise SizeChangedError(
                f"disk {disk.name!r}: {path} has {image.size_bytes} bytes where {disk.size_bytes} were expected",
                hint="it was resized just now, or the snapshot is of another disk",
            )
    except BaseException:
        image.close()
        raise
    return image


def _unread(disk: Disk, base: State) -> bytes | None:
    """The root of a disk that is not read: what it was, or zeros if it is new. None: it has to be read, it changed."""
    state = base.disk(disk.id)
    if state is None:
        return MerkleTree(MemoryNodes(), disk.leaf_bytes).root(disk.size_bytes)
    return state.root if state.disk == disk else None


def _add(piece: Window | Gap, disk: Disk, index: int, packer: Packer, base_grains: int) -> Rows:
    if isinstance(piece, Gap):
        rows = hole_rows(piece.first_grain, piece.stop_grain, base_grains)
        packer.add(index, disk.grain_bytes, rows, b"")
        return rows
    rows, payload = window_rows(
        piece.first_grain, piece.buffer.data, disk.grain_bytes, piece.dirty, piece.zero, base_grains
    )
    packer.add(index, disk.grain_bytes, rows, payload)
    return rows
