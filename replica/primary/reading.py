"""Reading a machine at one instant: from images to sealed segments in the spool, and the journal.

    freeze -> open the images -> scan (reads ahead) -> rows and payload -> packer -> sealing threads -> shipment
    close the images -> thaw, or the proof that all stood still

Memory is bounded whatever the disks' size: three windows, the packer's open
segment, and a few segments being sealed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from replica import images
from replica.delta import DATA, DeltaSealer, Packer, Rows, hole_rows, window_rows
from replica.durable import FileSystem
from replica.errors import SizeChangedError
from replica.images import Image
from replica.machine_files import FILES_DISK_NAME
from replica.model import Disk, DiskState, State
from replica.primary.audits import Audits
from replica.primary.files import FilesImage
from replica.primary.sealing import Sealing
from replica.primary.shipment import Shipment
from replica.primary.spec import MachineSpec
from replica.progress import Progress, silent
from replica.tracking.hash import Gap, HashTracker, Scan, Window
from replica.tracking.instant import Snapshot, freeze
from replica.tracking.journal import JournalWriter


class Reading:
    """One reading of all disks, into a shipment and a journal. For one thread."""

    def __init__(
        self,
        fs: FileSystem,
        directory: Path,
        machine: MachineSpec,
        shipment: Shipment,
        sealer: DeltaSealer,
        journal: JournalWriter,
        progress: Progress,
    ) -> None:
        self._fs, self._directory, self._machine = fs, directory, machine
        self._shipment, self._sealer, self._journal = shipment, sealer, journal
        self._progress = progress
        self._total = 0
        self._files: FilesImage | None = None
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
        check: Callable[[], None],
    ) -> tuple[Snapshot, list[bytes]]:
        """Freeze, scan every disk, thaw. The snapshot (over by now) and the resulting Merkle roots.

        Raises what freezing, the images and the shipment raise, and what `check` raises, which is called often.
        """
        paths = {disk.name: disk.image for disk in self._machine.disks}
        roots = []
        removed = (state.disk for state in base.disks)  # a delta's table names them, too (`delta.change`)
        table = sorted({disk.id for disk in (*removed, *(tracker.disk for tracker in trackers))})
        with Sealing(self._sealer, self._shipment.put) as sealing:
            packer = Packer(sealing.add)
            with freeze(self._fs, self._directory, self._machine.name, paths, self._machine.freezing) as snapshot:

                def check_all() -> None:
                    check()
                    snapshot.check()
                    self._shipment.check()

                with ExitStack() as stack:  # closed before `finish`: thaw may remove the snapshot that is open here
                    opened = [stack.enter_context(self._open(snapshot, tracker.disk)) for tracker in trackers]
                    if self._progress is not silent:
                        self._total = sum(stop - start for i in opened for start, stop in i.allocated(0, i.size_bytes))
                    candidates = audits.ask(fresh)
                    for index, (tracker, image) in enumerate(zip(trackers, opened, strict=True)):
                        scan = tracker.scan(
                            image,
                            self._journal,
                            index,
                            fresh=fresh[index],
                            candidates=candidates[index],
                            audit=audits.plans[index],
                            check=check_all,
                        )
                        self._read_disk(scan, table.index(tracker.disk.id), packer, base.disk(tracker.disk.id))
                        roots.append(scan.root)
                    packer.flush()
                    if self._files is not None and self._machine.freeze is None:
                        self._files.check()
                snapshot.finish()
            sealing.finish()
        return snapshot, roots

    def _open(self, snapshot: Snapshot, disk: Disk) -> Image:
        """The image to read, or the snapshot of it that `freeze` named; in the image's format either way."""
        if disk.name == FILES_DISK_NAME:
            self._files = FilesImage(self._fs, self._machine.files)
            return self._files
        spec = next(spec for spec in self._machine.disks if spec.name == disk.name)
        path = snapshot.paths[disk.name]
        image = images.open(path, images.format_of(spec.image, spec.format), fs=self._fs)
        try:
            snapshot.opened(disk.name, image.file_id)
            if image.size_bytes != disk.size_bytes:
                raise SizeChangedError(
                    f"disk {disk.name!r}: {path} has {image.size_bytes} bytes where {disk.size_bytes} were expected",
                    hint="it was resized just now, or the snapshot is of another disk",
                )
        except BaseException:
            image.close()
            raise
        return image

    def _read_disk(self, scan: Scan, index: int, packer: Packer, base: DiskState | None) -> None:
        """Scan one disk into the packer. `base`: as the delta's base has it; zeros beyond that need not be said."""
        base_grains = base.disk.count_grains if base is not None else 0
        before = self.scanned
        for piece in scan:
            rows = _add(piece, scan.disk, index, packer, base_grains)
            compared = isinstance(piece, Window) and piece.dirty is not None
            counted = rows if compared else rows[rows["data"] == DATA]
            self.changed += int(counted["count"].sum()) * scan.disk.grain_bytes
            self.scanned = before + scan.bytes_read
            self.report()

    def report(self) -> None:
        """Tell the progress how much was read and is not waiting to be sent."""
        if self._total:
            self._progress(max(0, min(self.scanned, self._total) - self._shipment.waiting_bytes), self._total)


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
