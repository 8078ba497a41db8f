"""Exporting points as a chain: the oldest as a whole image, each later one as a differencing file on the one before.

    out/os-3.vhdx  ←  out/os-4.vhdx  ←  out/os-7.vhdx        each is the disk at that point, for Hyper-V, Xen or qemu

What a file holds is what the inverses say may differ between its point and the one before, grain by grain. Per disk
one Merkle tree goes along: the leaves that were written change it, and its root must then be that of the point,
which proves the file and all below it together. VHD and VHDX are read back besides, through the chain as it was
written, and held against that tree; qcow2 is compared by qemu-img.

A disk that was resized, or that was not there at the point before, begins a new chain.

All files are written and proven under temporary names, and then published, parents first. What fails leaves nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from replica.delta.ranges import Range, union
from replica.durable import FileSystem
from replica.errors import DamageError, LostError, PointGoneError, StorageError, TargetExistsError
from replica.images.copying import write_all
from replica.images.exporting import ExportFormat, Written
from replica.images.image import ImageWriter
from replica.images.partial import hold
from replica.merkle import FileNodes, MerkleTree, leaf_digests
from replica.model import Disk, DiskId
from replica.progress import Progress, silent
from replica.store.files import discard_files, prepare_files, publish_files
from replica.store.pins import pin
from replica.store.points import PointInfo
from replica.store.reader import PointReader, ReplicaReader
from replica.store.restore import machine_files

WINDOW_BYTES = 4 << 20
MAX_GAP_BYTES = 128 << 10
"""Bytes that are read though nothing of them changed, rather than asked for apart."""
SCAN_BYTES = 1 << 30
"""Of the disk whose changes are looked up together."""


class ExportedPoint(NamedTuple):
    """One point, as it left."""

    point: int
    files: dict[str, Path]
    """Disk name -> image."""
    machine_files: Path | None
    """The directory of the machine's files, if the point has any."""


@dataclass
class _Line:
    """The chain of one disk, as far as it is written: oldest file first."""

    disk: Disk
    tree: MerkleTree
    files: list[Written] = field(default_factory=list)


def export_points(
    fs: FileSystem,
    reader: ReplicaReader,
    target: Path,
    form: ExportFormat,
    progress: Progress = silent,
    *,
    first: int | None = None,
    last: int | None = None,
) -> list[ExportedPoint]:
    """Write the points from `first` (the oldest) to `last` (the newest) to `<target>/<disk>-<point><extension>`.

    The machine's files of a point go to `<target>/files-<point>/`. Durable when this returns.

    PointGoneError: there is none. LostError, DamageError: one cannot be restored. TargetExistsError, ImageError,
    StorageError, StorageFullError. The files are not there then.
    """
    chosen = _chosen(reader, first, last)
    names = {
        (info.state.point, state.disk.id): target / f"{state.disk.name}-{info.state.point}{form.extension}"
        for info in chosen
        for state in info.state.machine_disks
    }
    made = not fs.is_directory(target)
    if made and fs.is_taken(target):
        raise TargetExistsError(f"{target} already exists and is no directory", hint="choose another one for --to")
    folders = [target / _folder(info.state.point) for info in chosen]
    for path in (*names.values(), *folders):
        if fs.is_taken(path):
            raise TargetExistsError(f"{path} already exists", hint="choose another directory or move it away")
    try:
        fs.make_directory(target)
        with ExitStack() as stack:
            for info in chosen:
                stack.callback(pin(fs, reader.layout, info.state.delta_id).release)
            hold(fs, target, stack, (path.name for path in names.values()))
            return _Export(fs, reader, target, form, names, progress, stack).run(chosen)
    except BaseException:
        if made:
            with suppress(StorageError):
                fs.remove_empty(target)  # what is in it is not ours
        raise


def _chosen(reader: ReplicaReader, first: int | None, last: int | None) -> list[PointInfo]:
    listed = reader.points()
    chosen = [
        info
        for info in listed
        if (first is None or first <= info.state.point) and (last is None or info.state.point <= last)
    ]
    if not chosen or (last is not None and chosen[-1].state.point != last):
        numbers = [info.state.point for info in listed]
        there = f"its points are {numbers[0]} to {numbers[-1]}" if numbers else "it has no point yet"
        raise PointGoneError(f"machine {reader.identity.machine!r} has no such points", hint=there)
    for info in reversed(chosen):
        if not info.restorable:
            point = info.state.point
            kind = LostError if info.lost else DamageError
            raise kind(f"point {point} cannot be restored: {info.why}", hint=f"begin behind it: --since {point + 1}")
    return chosen


def _folder(point: int) -> str:
    """Of a point's machine files."""
    return f"files-{point}"


class _Export:
    """The work of one `export_points`."""

    def __init__(
        self,
        fs: FileSystem,
        reader: ReplicaReader,
        target: Path,
        form: ExportFormat,
        names: dict[tuple[int, DiskId], Path],
        progress: Progress,
        stack: ExitStack,
    ) -> None:
        self._fs, self._reader, self._target, self._form, self._names = fs, reader, target, form, names
        self._progress, self._stack = progress, stack
        self._lines: dict[DiskId, _Line] = {}
        self._chains: list[_Line] = []
        self._folders: list[tuple[Path, int]] = []
        self._done = self._total = 0

    def run(self, chosen: list[PointInfo]) -> list[ExportedPoint]:
        self._total = sum(state.disk.size_bytes for info in chosen for state in info.state.machine_disks)
        try:
            before: PointReader | None = None
            for info in chosen:
                now = self._stack.enter_context(self._reader.open_point(info.state.point))
                self._write(now, before)
                if before is not None:
                    before.close()
                before = now
            return self._publish(chosen)
        finally:
            for line in self._chains:
                for written in line.files:
                    written.image.close()
                    with suppress(StorageError):
                        if self._fs.exists(written.image.path):
                            self._fs.unlink(written.image.path)
            for folder, _ in self._folders:
                discard_files(self._fs, folder)

    def _write(self, now: PointReader, before: PointReader | None) -> None:
        """One point, all its disks."""
        folder = prepare_files(self._fs, machine_files(now), self._target, _folder(now.state.point))
        if folder is not None:
            self._folders.append((folder, now.state.point))
        kept: dict[DiskId, _Line] = {}
        for entry in now.state.machine_disks:
            disk, line = entry.disk, self._lines.get(entry.disk.id)
            if line is None or not _goes_on(line.disk, disk):
                line, since = self._begin(disk), None
            else:
                since = before
            kept[disk.id] = line
            self._write_disk(now, since, disk, entry.root, line)
            self._done += disk.size_bytes
        self._lines = kept

    def _begin(self, disk: Disk) -> _Line:
        nodes = self._stack.enter_context(self._fs.create_anonymous(self._target))
        line = _Line(disk, MerkleTree(FileNodes(nodes), disk.leaf_bytes))
        self._chains.append(line)
        return line

    def _write_disk(self, now: PointReader, since: PointReader | None, disk: Disk, root: bytes, line: _Line) -> None:
        """One file: what is in it, the proof that it is the point, and the file read back."""
        path = self._target / f".{disk.id}.{os.urandom(4).hex()}.partial"
        final = self._names[now.state.point, disk.id]

        def ranges() -> Iterator[Range]:
            return _ranges(now, since, disk)

        if since is None:
            image = self._form.create(self._fs, path, disk)
        else:
            image = self._form.create_child(self._fs, path, disk, line.files[-1])
        line.files.append(Written(image, final))
        update = line.tree.update(write=True)
        for start, window, changed in _windows(now, disk, ranges()):
            first = start // disk.leaf_bytes
            update.put(first, leaf_digests(window.data, first, disk.leaf_bytes))
            _fill(image, start, window, changed, disk)
            self._progress(self._done + start + len(window), self._total)
        if update.root(disk.size_bytes) != root:
            raise DamageError(
                f"disk {disk.name!r} of point {now.state.point}: what was read does not have the Merkle root that "
                "the point was committed with",
                hint="verify the replica, or begin behind that point with --since",
            )
        image.sync()
        self._read_back(line, disk, ranges())

    def _read_back(self, line: _Line, disk: Disk, ranges: Iterator[Range]) -> None:
        """Whether the file on its parents reads as the tree says, where it differs from them."""
        files = [written.image.path for written in reversed(line.files)]
        chain = self._form.open_chain(self._fs, files)
        if chain is None:
            return
        with chain:
            for start, stop, _ in _grouped(ranges, disk):
                window = np.empty(stop - start, dtype=np.uint8)
                chain.read_into(start, window.data)
                first = start // disk.leaf_bytes
                found = leaf_digests(window.data, first, disk.leaf_bytes)
                if not np.array_equal(found, line.tree.leaves(first, len(found))):
                    raise StorageError(f"{files[0]} does not read as it was written, between {start} and {stop}")

    def _publish(self, chosen: list[PointInfo]) -> list[ExportedPoint]:
        """Names for everything, parents first; taken back where one cannot be given."""
        given: list[Path] = []
        try:
            for line in self._chains:
                for parent, written in zip(line.files, line.files[1:], strict=False):
                    self._form.name_parent(written.image, parent.final.name)
            for folder, point in self._folders:
                publish_files(self._fs, folder, _folder(point))
                given.append(self._target / _folder(point))
            self._folders.clear()
            for line in self._chains:
                for written in line.files:
                    self._fs.publish_new(written.image.path, written.final)
                    given.append(written.final)
        except BaseException:
            for path in reversed(given):
                with suppress(StorageError):
                    self._fs.remove_any(path)
            raise
        self._progress(self._total, self._total)
        folders = {path for path in given if path.parent == self._target and path.is_dir()}
        return [
            ExportedPoint(
                info.state.point,
                {s.disk.name: self._names[info.state.point, s.disk.id] for s in info.state.machine_disks},
                folder if (folder := self._target / _folder(info.state.point)) in folders else None,
            )
            for info in chosen
        ]


def _goes_on(before: Disk, now: Disk) -> bool:
    """Whether a disk's next file can be a differencing one."""
    return (before.size_bytes, before.sector_bytes, before.grain_bytes, before.leaf_bytes) == (
        now.size_bytes,
        now.sector_bytes,
        now.grain_bytes,
        now.leaf_bytes,
    )


def _ranges(now: PointReader, since: PointReader | None, disk: Disk) -> Iterator[Range]:
    """What is to be in the file: ascending, disjoint, in whole grains and sectors but for the disk's end."""
    unit = max(disk.grain_bytes, disk.sector_bytes)
    for start in range(0, disk.size_bytes, SCAN_BYTES):
        stop = min(start + SCAN_BYTES, disk.size_bytes)
        found = since.changes(disk.id, now.state, start, stop) if since else now.allocated(disk.id, start, stop)
        yield from union((a // unit * unit, min(-(-b // unit) * unit, disk.size_bytes)) for a, b in found)


def _grouped(ranges: Iterable[Range], disk: Disk) -> Iterator[tuple[int, int, list[Range]]]:
    """Whole leaves, at most a window of them, and the ranges in them."""
    leaf = max(disk.leaf_bytes, disk.sector_bytes)
    inside: list[Range] = []

    def group() -> tuple[int, int, list[Range]]:
        return inside[0][0] // leaf * leaf, min(-(-inside[-1][1] // leaf) * leaf, disk.size_bytes), inside

    for start, stop in ranges:
        while start < stop:
            end = min(stop, (start // WINDOW_BYTES + 1) * WINDOW_BYTES)
            if inside and start // leaf > (inside[-1][1] - 1) // leaf:
                far = start - inside[-1][1] > MAX_GAP_BYTES
                if far or start // WINDOW_BYTES != inside[0][0] // WINDOW_BYTES:
                    yield group()
                    inside = []
            inside.append((start, end))
            start = end
    if inside:
        yield group()


def _windows(
    point: PointReader, disk: Disk, ranges: Iterable[Range]
) -> Iterator[tuple[int, np.ndarray[tuple[int], np.dtype[np.uint8]], list[Range]]]:
    """Where a window lies, what the disk has in it, and the ranges in it. One is valid until the next is taken."""
    memory = np.empty(WINDOW_BYTES + disk.leaf_bytes, dtype=np.uint8)
    for start, stop, inside in _grouped(ranges, disk):
        window = memory[: stop - start]
        point.read_into(disk.id, start, window.data)
        yield start, window, inside


def _fill(
    image: ImageWriter,
    start: int,
    window: np.ndarray[tuple[int], np.dtype[np.uint8]],
    changed: list[Range],
    disk: Disk,
) -> None:
    unit = max(disk.grain_bytes, disk.sector_bytes)
    for low, high in changed:
        write_all(image, low, window[low - start : high - start], unit)
