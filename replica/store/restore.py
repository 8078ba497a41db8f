"""restore: write a point's disks as images, and prove that they are the point.

Each disk is written under a temporary name, its Merkle root computed from the
very bytes that were written and compared with the point's, and synced; only
when that is done for all of them do they get their names. What is zero stays a
hole. A restore that fails on the way there leaves nothing behind, one that is killed
nothing under a final name: what it had written goes with the next restore into that
directory. Each holds a shared lock on the directory itself, so that whoever gets it
exclusively knows that nobody is writing there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from threading import Lock

from replica.delta.ranges import Range, union
from replica.durable import FileSystem
from replica.errors import DamageError, LostError, StorageError, TargetExistsError
from replica.images.copying import write_nonzero
from replica.images.exporting import ExportFormat
from replica.images.flat import FlatImage
from replica.images.image import ImageWriter
from replica.images.partial import hold
from replica.merkle import Digests, MemoryNodes, MerkleTree, leaf_digests, leaf_windows
from replica.model import GRAIN_BYTES, Disk
from replica.pipeline import Bytes, in_order
from replica.progress import Progress, silent
from replica.store.files import discard_files, prepare_files, publish_files, read_files
from replica.store.reader import PointReader

WINDOW_BYTES = 4 << 20
THREADS = 4
"""More than there are cores where those are few: one that waits for a device lets the others hash."""
GAP_BYTES = 64 << 10
"""A hole up to that is read with what is around it."""
Window = tuple[int, int]
"""(offset, length)."""
log = logging.getLogger(__name__)

NAMED_RANGES = 8
_OTHER_POINT = "choose another point, or restore with --allow-lost, which writes zeros there"
_REPAIR_FIRST = (
    "some of it is only damaged in the head: sync the machine first, which repairs what its source still has; else "
    + _OTHER_POINT
)
DEEP_WINDOW_BYTES = 16 << 20
"""Of a point behind inverses: each read opens every chunk it needs once, so a larger one opens fewer."""


def restore_point(
    fs: FileSystem,
    point: PointReader,
    target: Path,
    format: str,
    progress: Progress = silent,
    *,
    subformat: str | None = None,
    missing: dict[str, list[Range]] | None = None,
) -> dict[str, Path]:
    """Write every disk of the point to `<target>/<disk>.<format>`; returns disk name -> path.

    `format` and `subformat` as in `images.exporting`: raw, vhd (fixed, or dynamic), vhdx (dynamic, or fixed), qcow2.

    The machine's files, if the point has any, go to `<target>/files/`, each under its path at the primary.

    Raises TargetExistsError (nothing is written), ImageError (no such format), LostError (ranges of a disk are lost),
    DamageError (the point's bytes are not what they were), StorageError, StorageFullError. With `missing`, what is
    lost or damaged does not keep the rest: such ranges become zeros and are named there, by disk, half-open; such a
    disk is not held against its root, and machine files that are damaged are left out.
    """
    form = ExportFormat.of(format, subformat)
    disks = [state.disk for state in point.state.machine_disks]
    paths = {disk.name: target / f"{disk.name}{form.extension}" for disk in disks}
    made = not fs.is_directory(target)
    if made and fs.is_taken(target):
        raise TargetExistsError(f"{target} already exists and is no directory", hint="choose another one for --to")
    for path in paths.values():
        if fs.is_taken(path):
            raise TargetExistsError(f"{path} already exists", hint="choose another directory or move it away")
    if missing is None:
        _refuse_lost(point)
    try:
        fs.make_directory(target)
        with ExitStack() as stack:
            hold(fs, target, stack, (path.name for path in paths.values()))
            _write(fs, point, target, form, paths, missing, progress)
    except BaseException:
        if made:
            with suppress(StorageError):
                fs.remove_empty(target)  # what is in it is not ours
        raise
    return paths


def _write(
    fs: FileSystem,
    point: PointReader,
    target: Path,
    form: ExportFormat,
    paths: dict[str, Path],
    missing: dict[str, list[Range]] | None,
    progress: Progress,
) -> None:
    """Write all, prove all, and only then give the names."""
    disks = [state.disk for state in point.state.machine_disks]
    total = sum(disk.size_bytes for disk in disks)
    written: dict[str, Path] = {}
    done = 0
    files = prepare_files(fs, machine_files(point, allow_lost=missing is not None), target)
    try:
        for disk in disks:
            temporary = written[disk.name] = target / f".{disk.id}.{os.urandom(4).hex()}.partial"
            try:
                gone: list[Range] | None = None if missing is None else []
                with form.create(fs, temporary, disk) as image:
                    copy = _DiskCopy(point, disk, image, _from(progress, done, total))
                    if not copy.clone():
                        copy.copy(gone)
                    copy.sync()
                if missing is not None and gone:
                    missing[disk.name] = list(union(sorted(gone)))
            except DamageError as error:
                raise DamageError(
                    f"disk {disk.name!r} of point {point.state.point} cannot be restored: {error.message}",
                    hint="what was written is removed; restore a newer point, which may not need what is damaged, "
                    "or all the rest of this one with --allow-lost",
                ) from error
            done += disk.size_bytes
        publish_files(fs, files)
        files = None
        for name, path in paths.items():
            fs.publish_new(written[name], path)
            del written[name]
    finally:
        discard_files(fs, files)
        for temporary in written.values():
            with suppress(StorageError):
                fs.unlink(temporary)
    progress(total, total)


def machine_files(point: PointReader, *, allow_lost: bool = False) -> dict[str, bytes]:
    """Path -> content of the machine's files; with `allow_lost` none if they are lost or damaged, which is logged."""
    try:
        return read_files(point)
    except DamageError as error:
        if not allow_lost:
            raise
        log.warning("point %d is restored without the machine's files: %s", point.state.point, error.message)
        return {}


def _refuse_lost(point: PointReader) -> None:
    """LostError if a disk has lost ranges, naming the first ones."""
    for disk in point.disks:
        name = disk.name
        if ranges := point.lost(disk.id):
            named = ", ".join(f"{start} to {stop - 1}" for start, stop in ranges[:NAMED_RANGES])
            more = f" and {len(ranges) - NAMED_RANGES} more ranges" if len(ranges) > NAMED_RANGES else ""
            raise LostError(
                f"disk {name!r} of point {point.state.point} has lost bytes {named}{more}",
                hint=_REPAIR_FIRST if point.rotten_in_head else _OTHER_POINT,
                disk=name,
                offset=ranges[0][0],
                length=ranges[0][1] - ranges[0][0],
            )


def _from(progress: Progress, base: int, total: int) -> Progress:
    return lambda done, _size: progress(base + done, total)


class _DiskCopy:
    """One disk on its way into a new image."""

    def __init__(self, point: PointReader, disk: Disk, image: ImageWriter, progress: Progress) -> None:
        self._point, self._disk, self._image, self._progress = point, disk, image, progress
        self._flat = image if isinstance(image, FlatImage) else None
        self._writing = Lock()
        self._courtesy = point.courtesy()
        expected = point.state.disk(disk.id)
        assert expected is not None
        self._root = expected.root

    def clone(self) -> bool:
        """Share the head's blocks, and prove that it is the point by reading them where they are now."""
        image = self._flat
        if image is None or not self._point.clone_into(self._disk.id, image):
            return False

        def work(window: Window, memory: Bytes) -> Digests:
            self._courtesy.wait()
            offset, length = window
            part = memory[:length]
            image.read_ahead(offset, length)
            image.read_into(offset, part.data)
            return leaf_digests(part.data, offset // self._disk.leaf_bytes, self._disk.leaf_bytes)

        if self._run(work, image.allocated(0, self._disk.size_bytes), WINDOW_BYTES) == self._root:
            return True
        image.clear()
        return False

    def copy(self, missing: list[Range] | None) -> None:
        """Read, hash and write window by window. DamageError if that is not the point, and nothing is in `missing`."""

        def work(window: Window, memory: Bytes) -> Digests:
            return self._copy(window, memory, missing)

        if self._flat is not None:
            self._flat.write_to_device()
        ranges = self._point.allocated(self._disk.id, 0, self._disk.size_bytes)
        root = self._run(work, ranges, DEEP_WINDOW_BYTES if self._point.depth else WINDOW_BYTES)
        if not missing and root != self._root:
            raise DamageError("what was read does not have the Merkle root that the point was committed with")

    def sync(self) -> None:
        """Make the image durable."""
        self._courtesy.wait()
        self._image.sync()

    def _run(
        self, work: Callable[[Window, Bytes], Digests], ranges: Iterator[tuple[int, int]], window_bytes: int
    ) -> bytes:
        """Do the work of every window; the root that its digests give."""
        leaf, size = self._disk.leaf_bytes, self._disk.size_bytes
        tree = MerkleTree(MemoryNodes(), leaf).update(write=False)
        windows = leaf_windows(ranges, size, leaf, window_bytes, gap_bytes=GAP_BYTES)

        def hashed(window: Window, memory: Bytes) -> tuple[Window, Digests]:
            return window, work(window, memory)

        with closing(in_order(hashed, windows, window_bytes, THREADS)) as results:
            for (offset, length), digests in results:
                tree.put(offset // leaf, digests)
                self._progress(offset + length, size)
        return tree.root(size)

    def _copy(self, window: Window, memory: Bytes, missing: list[Range] | None) -> Digests:
        self._courtesy.wait()
        offset, length = window
        part = memory[:length]
        self._point.read_ahead(self._disk.id, offset, length)
        self._point.read_into(self._disk.id, offset, part.data, missing=missing)
        digests = leaf_digests(part.data, offset // self._disk.leaf_bytes, self._disk.leaf_bytes)
        unit = max(self._disk.grain_bytes, GRAIN_BYTES)
        if self._flat is not None:
            write_nonzero(self._flat, offset, part, unit)
            self._flat.start_writing(offset, length)
        else:  # it lays out as it goes, in one thread at a time
            with self._writing:
                write_nonzero(self._image, offset, part, unit)
        return digests
