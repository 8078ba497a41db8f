"""verify: every chunk of every inverse is read, opened and checked, beside whoever writes.

An inverse never changes: it is checked through one open file, whatever becomes
of its name meanwhile. Nothing is pinned and no lock is held, so rotation and
thinning never wait. What does not open is looked at once more under its name:
if that is gone, or another delta's by now, the file was rotated out or thinned,
and there is no damage that anybody could meet.

What is found is where: the chunks that do not open, the grains whose content
they are, the bytes of the disk. `affected` follows those bytes to the points
that read through them: all from that inverse on to the oldest, but for what
an inverse nearer to the point has itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from replica.delta import DeltaFileReader, Keyring
from replica.delta.extents import DATA
from replica.delta.ranges import difference, union
from replica.durable import FileSystem
from replica.errors import DamageError, KeyMissingError, StorageError
from replica.model import DiskId, State
from replica.progress import Progress, silent
from replica.store.layout import Layout
from replica.store.pace import Pace
from replica.store.points import Chain, Link
from replica.store.verdicts import FileMark, Ranges, SegmentDamage, bounded


@dataclass(frozen=True, slots=True)
class PointDamage:
    """Bytes of a point's disk that cannot be read, and what they are read from: `head` or an inverse's name."""

    state: State
    disk_id: DiskId
    disk: str
    offset: int
    length: int
    source: str


class PointsCheck:
    """Checks files of `points/` one by one. Not thread-safe."""

    def __init__(self, fs: FileSystem, layout: Layout, keyring: Keyring, pace: Pace) -> None:
        self._fs = fs
        self._layout = layout
        self._keyring = keyring
        self._pace = pace

    def names(self) -> list[str]:
        return [name for name in self._fs.list_names(self._layout.points) if not name.startswith(".")]

    def size(self, name: str) -> int:
        try:
            with self._fs.open(self._layout.points / name) as file:
                return file.size()
        except StorageError:
            return 0

    def run(
        self, name: str, known: FileMark | None, note: Callable[[FileMark], None], progress: Progress = silent
    ) -> FileMark | None:
        """Check one file, from where `known` says if it is of the same delta. None: it is gone.

        KeyMissingError: nothing sealed with that key can be checked.
        """
        try:
            reader = self._open(name)
        except KeyMissingError:
            raise
        except (DamageError, StorageError) as error:
            return self._unreadable(name, error)
        with reader:
            if known is None or known.delta_id != reader.delta_id:
                known = FileMark(name, reader.delta_id, reader.stored_bytes)
            mark = msgspec.structs.replace(known, problem="")
            for number in range(mark.position, len(reader)):
                found = [damage for damage in mark.found if damage.segment != number]
                if not _opens(reader, number):
                    confirmed = self._confirm(name, reader, number)
                    if confirmed is None:
                        return None
                    found += confirmed
                mark = msgspec.structs.replace(mark, position=number + 1, found=tuple(found))
                note(mark)
                entry = reader.manifest.entry(number)
                progress(entry.length, reader.stored_bytes)
                self._pace.take(entry.length)
            mark = msgspec.structs.replace(mark, done=True, checked_at_ns=time.time_ns())
            note(mark)
            return mark

    def _open(self, name: str) -> DeltaFileReader:
        file = self._fs.open(self._layout.points / name)
        file.drop_cache()  # what counts is what the device gives back
        return DeltaFileReader(file, self._keyring)

    def _unreadable(self, name: str, error: Exception) -> FileMark | None:
        """It does not open: once more, since a rename may have come in between."""
        path = self._layout.points / name
        if not self._fs.exists(path):
            return None
        try:
            self._open(name).close()
        except (DamageError, StorageError) as again:
            if not self._fs.exists(path):
                return None
            return FileMark(
                name, None, self.size(name), problem=f"{again or error}", done=True, checked_at_ns=time.time_ns()
            )
        return None  # another file has that name by now, which the next round looks at

    def _confirm(self, name: str, seen: DeltaFileReader, number: int) -> list[SegmentDamage] | None:
        """The damage, if the file still has its name and the segment still does not open. None: it went meanwhile."""
        try:
            reader = self._open(name)
        except (DamageError, StorageError):
            if not self._fs.exists(self._layout.points / name):
                return None
            return locate(seen, number)
        with reader:
            if reader.delta_id != seen.delta_id:
                return None
            return [] if _opens(reader, number) else locate(reader, number)


def _opens(reader: DeltaFileReader, number: int) -> bool:
    try:
        reader.segment(number)
    except (DamageError, StorageError):
        return False
    return True


def locate(reader: DeltaFileReader, number: int) -> list[SegmentDamage]:
    """Which bytes of which disk a segment that does not open takes along: what its bad chunks hold, else all of it."""
    entry = reader.manifest.entry(number)
    change = reader.disks[entry.disk]
    grains: list[tuple[int, int]] = []
    error = "its extent table does not open"
    try:
        table = reader.table(number)
    except (DamageError, StorageError) as failure:
        error = getattr(failure, "message", error)
    else:
        rows = table.extents[table.extents["data"] == DATA]
        counts = rows["count"].astype(np.int64)
        starts = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(counts)))  # of each row's payload, in grains
        for index in range(len(table.chunks)):
            try:
                reader.chunk(table, index)
            except (DamageError, StorageError) as failure:
                error = failure.message
                low = int(table.raw_starts[index]) // change.grain_bytes
                high = -(-int(table.raw_starts[index + 1]) // change.grain_bytes)
                for row in range(int(np.searchsorted(starts, low, "right")) - 1, len(rows)):
                    begin = max(low, int(starts[row]))
                    end = min(high, int(starts[row + 1]))
                    if begin >= end:
                        break
                    first = int(rows["first"][row]) - int(starts[row])
                    grains.append((first + begin, first + end))
    grains = grains or [(entry.first, entry.last + 1)]
    ranges = bounded([_bytes(a, b, change.grain_bytes, change.result_bytes) for a, b in grains])
    return [SegmentDamage(number, change.disk_id, change.disk.name, a, length, error) for a, length in ranges]


def _bytes(first: int, stop: int, grain_bytes: int, size_bytes: int) -> tuple[int, int]:
    return first * grain_bytes, min(stop * grain_bytes, size_bytes) - first * grain_bytes


def damage_of_files(fs: FileSystem, keyring: Keyring, chain: Chain, marks: Sequence[FileMark]) -> Iterator[PointDamage]:
    """What the damage in inverses means for the points that are listed."""
    by_name = {mark.name: mark for mark in marks if mark.found}
    for index, link in enumerate(chain.links):
        mark = by_name.get(link.path.name)
        if mark is None or mark.delta_id != _delta_id(fs, keyring, link):
            continue
        for disk_id in {damage.disk_id for damage in mark.found}:
            ranges = bounded([(d.offset, d.length) for d in mark.found if d.disk_id == disk_id])
            yield from affected(fs, keyring, chain, index, disk_id, ranges, link.path.name)


def _delta_id(fs: FileSystem, keyring: Keyring, link: Link) -> object:
    try:
        with DeltaFileReader(fs.open(link.path), keyring) as reader:
            return reader.delta_id
    except (DamageError, StorageError):
        return None


def affected(
    fs: FileSystem, keyring: Keyring, chain: Chain, index: int, disk_id: DiskId, ranges: Ranges, source: str
) -> Iterator[PointDamage]:
    """Points that read these bytes through inverse `index` of the chain (-1: from the head), nearest the head first."""
    state = chain.links[index].result if index >= 0 else chain.top
    left = [(offset, offset + length) for offset, length in ranges]
    while True:
        entry = state.disk(disk_id)
        if entry is None or not left:
            return
        left = [(a, min(b, entry.disk.size_bytes)) for a, b in left if a < entry.disk.size_bytes]
        if state.is_point:
            for start, stop in left:
                yield PointDamage(state, disk_id, entry.disk.name, start, stop - start, source)
        index += 1
        if index == len(chain.links):
            return
        state = chain.links[index].result
        left = _passed_on(fs, keyring, chain.links[index], disk_id, left)


def _passed_on(
    fs: FileSystem, keyring: Keyring, link: Link, disk_id: DiskId, ranges: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """What of the ranges the inverse does not have itself. One that cannot be read is a damage of its own."""
    try:
        with DeltaFileReader(fs.open(link.path), keyring) as reader:
            place = next((n for n, change in enumerate(reader.disks) if change.disk_id == disk_id), None)
            if place is None:
                return []
            grain = reader.disks[place].grain_bytes
            own: list[tuple[int, int]] = []
            numbers = {n for a, b in ranges for n in reader.overlapping(place, a // grain, -(-b // grain))}
            for number in sorted(numbers):
                try:
                    rows = [(first, first + count) for first, count, _ in reader.table(number).extents.tolist()]
                except DamageError:
                    rows = [reader.span(number)]  # what it does not have is behind it, and cannot be found any more
                own += [(first * grain, stop * grain) for first, stop in rows]
    except (DamageError, StorageError):
        return []
    return list(difference(ranges, union(own)))
