"""What verifications found, and how far the present one is: two documents beside the replica.

    marks/verify-head       the head, disk by disk, byte position by byte position
    marks/verify-points     the inverses, file by file, segment by segment

`marks/` is never made here: where it is missing, point locks may be, too (`marks`).

A *round* is one look at everything. It may be cut anywhere and goes on where
the document says; a finished one is followed by a new one. What a former round
found damaged stays known until the present one has come by that place: `found`
keeps what lies at or behind the position.

A file is known by the id of the delta in it, not by its name: thinning puts
another file in its place. The number of ranges is bounded; where there are more,
the last one covers the rest.
"""

from __future__ import annotations

import time
from typing import TypeVar

import msgspec

from replica import documents
from replica.durable import FileSystem
from replica.errors import FormatError
from replica.model import DeltaId, Disk, DiskId, Frozen
from replica.store.layout import Layout

MAX_RANGES = 1000
Ranges = tuple[tuple[int, int], ...]
"""(offset, length) in bytes, ascending."""


class DiskMark(Frozen, frozen=True):
    """One disk of the head, checked below `position`. `found`: damaged ranges, confirmed. `tree_unfit`: in `verify`."""

    disk: Disk
    position: int = 0
    checked_bytes: int = 0
    found: Ranges = ()
    tree_unfit: bool = False
    done: bool = False


class SegmentDamage(Frozen, frozen=True):
    """A part of one segment of an inverse that cannot be read: bytes of a disk at the older point."""

    segment: int
    disk_id: DiskId
    disk: str
    offset: int
    length: int
    error: str


class FileMark(Frozen, frozen=True):
    """One inverse: segments below `position` were checked. `problem`: it cannot even be opened, and why."""

    name: str
    delta_id: DeltaId | None
    stored_bytes: int = 0
    position: int = 0
    found: tuple[SegmentDamage, ...] = ()
    problem: str = ""
    done: bool = False
    checked_at_ns: int = 0


class HeadRound(Frozen, frozen=True):
    started_at_ns: int
    finished_at_ns: int | None = None
    disks: tuple[DiskMark, ...] = ()


class PointsRound(Frozen, frozen=True):
    """`whole`, in the document of a round under way: files that are done and good, by name and size.

    There may be tens of thousands of them; of a round that is finished nobody asks for them any more.
    """

    started_at_ns: int
    finished_at_ns: int | None = None
    files: tuple[FileMark, ...] = ()
    whole: tuple[tuple[str, int], ...] = ()


R = TypeVar("R", HeadRound, PointsRound)


class Verdicts:
    """Reads and replaces the two documents. A damaged one counts as none: verifying again is all it costs."""

    def __init__(self, fs: FileSystem, layout: Layout) -> None:
        self._fs = fs
        self._paths = {HeadRound: layout.marks / "verify-head", PointsRound: layout.marks / "verify-points"}

    def load(self, kind: type[R]) -> R | None:
        """The last round, finished or not. None if there was none."""
        path = self._paths[kind]
        try:
            found = documents.load(self._fs, path, kind) if self._fs.exists(path) else None
        except FormatError:
            return None
        if isinstance(found, PointsRound):
            return _unpacked(found)
        return found

    def save(self, value: HeadRound | PointsRound) -> None:
        if isinstance(value, PointsRound):
            value = _packed(value)
            if len(documents.encode(value)) > documents.MAX_DOCUMENT_BYTES:
                value = msgspec.structs.replace(value, files=tuple(map(_covered, value.files)))
        documents.save(self._fs, self._paths[type(value)], value)


def _packed(value: PointsRound) -> PointsRound:
    """As it is saved."""
    noted = tuple(mark for mark in value.files if mark.found or mark.problem or not mark.done)
    done = [mark for mark in value.files if mark.done and not (mark.found or mark.problem)]
    whole = tuple((mark.name, mark.stored_bytes) for mark in done) if value.finished_at_ns is None else ()
    return msgspec.structs.replace(value, files=noted, whole=whole)


def _unpacked(value: PointsRound) -> PointsRound:
    good = (FileMark(name, None, stored_bytes, done=True) for name, stored_bytes in value.whole)
    return msgspec.structs.replace(value, files=(*value.files, *good), whole=())


def _covered(mark: FileMark) -> FileMark:
    """With one range for all damage of a disk: rather too much is called damaged than any of it forgotten."""
    disks: dict[DiskId, SegmentDamage] = {}
    for damage in mark.found:
        known = disks.get(damage.disk_id, damage)
        start = min(known.offset, damage.offset)
        stop = max(known.offset + known.length, damage.offset + damage.length)
        disks[damage.disk_id] = msgspec.structs.replace(damage, offset=start, length=stop - start)
    return msgspec.structs.replace(mark, found=tuple(disks.values()))


def head_round(last: HeadRound | None, restart: bool) -> HeadRound:
    """The round to go on with: the last one if it was cut, else a new one that knows what was damaged."""
    if last is not None and last.finished_at_ns is None and not restart:
        return last
    known = tuple(DiskMark(mark.disk, found=mark.found) for mark in last.disks) if last else ()
    return HeadRound(time.time_ns(), disks=known)


def points_round(last: PointsRound | None, restart: bool) -> PointsRound:
    if last is not None and last.finished_at_ns is None and not restart:
        return last
    known = tuple(msgspec.structs.replace(mark, position=0, done=False) for mark in last.files) if last else ()
    return PointsRound(time.time_ns(), files=known)


def outside(ranges: Ranges, start: int, stop: int) -> list[tuple[int, int]]:
    """What is left of the ranges without [start, stop)."""
    left: list[tuple[int, int]] = []
    for offset, length in ranges:
        end = offset + length
        left += [(a, b - a) for a, b in ((offset, min(end, start)), (max(offset, stop), end)) if a < b]
    return left


def bounded(ranges: list[tuple[int, int]]) -> Ranges:
    """Neighbours joined, and at most `MAX_RANGES`."""
    joined: list[tuple[int, int]] = []
    for offset, length in sorted(ranges):
        if joined and offset <= sum(joined[-1]):
            joined[-1] = (joined[-1][0], max(sum(joined[-1]), offset + length) - joined[-1][0])
        else:
            joined.append((offset, length))
    if len(joined) > MAX_RANGES:
        start = joined[MAX_RANGES - 1][0]
        joined[MAX_RANGES - 1 :] = [(start, sum(joined[-1]) - start)]
    return tuple(joined)
