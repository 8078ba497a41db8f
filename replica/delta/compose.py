"""compose: one delta that does several, in order; the last applied wins.

A streaming k-way merge. Per disk the deltas are walked side by side in
*windows*: a window ends where the first of the open segments ends, so that
inside it every delta's extents are known, and one segment per delta is all that
is in memory. In a window the deltas are laid over each other, oldest first:

- whatever the next delta cuts off is dropped from what is there so far;
- whatever it grows by is zero, since what had been there was cut off (or never
  was): a ZERO extent is laid under it;
- its own extents win.

At the end, ZERO extents at or after the first base's size are omitted. No
payload is looked at: the canonical form makes a delta that cuts inside a grain
carry that grain (see `change`), so grains move as they are.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from replica import _native
from replica.delta.change import Delta, DiskChange, MemoryDelta, disk_changes
from replica.delta.extents import (
    DATA,
    EXTENT,
    ZERO,
    Rows,
    as_bytes,
    clip,
    coalesce,
    empty_rows,
    omit_zero_from,
    rows_of,
)
from replica.delta.leaves import ByDisk
from replica.delta.pack import Packer
from replica.delta.segment import Segment
from replica.errors import BaseMismatchError
from replica.model import DiskId

_PIECE = np.dtype([("first", "<u8"), ("count", "<u8"), ("data", "<u8"), ("source", "<u8"), ("offset", "<u8")])
_END = 1 << 63

Part = tuple[Rows, memoryview]
"""Rows and the payload of their DATA grains."""


def compose(*deltas: Delta) -> MemoryDelta:
    """The composed delta in memory, under the last one's id. Raises as `compose_segments` does."""
    segments = tuple(compose_segments(deltas))
    return MemoryDelta(deltas[-1].delta_id, deltas[0].base, deltas[-1].result, segments)


def compose_segments(deltas: Sequence[Delta]) -> Iterator[Segment]:
    """Segments of the delta deltas[0].base → deltas[-1].result, in order. Holds a segment per delta.

    Raises ValueError (no deltas), BaseMismatchError (one does not start where the one before ends), FormatError.
    """
    if not deltas:
        raise ValueError("nothing to compose")
    for older, newer in itertools.pairwise(deltas):
        if older.result != newer.base:
            raise BaseMismatchError(f"delta {newer.delta_id} does not start from the state that {older.delta_id} made")
    table = disk_changes(deltas[0].base, deltas[-1].result)
    sources = [_Source(delta) for delta in deltas]
    done: deque[Segment] = deque()
    packer = Packer(done.append)
    for index, change in enumerate(table):
        for rows, payload in _compose_disk(change, [source.disk(change.disk_id) for source in sources]):
            packer.add(index, change.grain_bytes, rows, payload)
            while done:
                yield done.popleft()
    packer.flush()
    yield from done


class _Source:
    """One delta's segments, disk by disk."""

    def __init__(self, delta: Delta) -> None:
        self._changes = {change.disk_id: (index, change) for index, change in enumerate(delta.disks)}
        self._segments = ByDisk((s.disk, s) for s in delta.segments())

    def disk(self, disk_id: DiskId) -> _Cursor:
        """A cursor over the disk's segments. Ask in ascending order; what is not asked for is skipped."""
        if disk_id not in self._changes:
            return _Cursor(iter(()), None)
        index, change = self._changes[disk_id]
        return _Cursor(self._segments.take(index), change)


class _Cursor:
    """One delta's segments of one disk, with the open one in memory."""

    def __init__(self, segments: Iterator[Segment], change: DiskChange | None) -> None:
        self._segments = segments
        self._open = next(segments, None)
        self.base_grains = change.base_grains if change else 0
        self.result_grains = change.result_grains if change else 0

    def known_until(self) -> int:
        """The grain behind the last one of which this delta's extents are known."""
        return self._open.last + 1 if self._open else _END

    def take(self, first: int, stop: int, grain_bytes: int) -> Part:
        """What the delta has in [first, stop), where stop is not behind `known_until`."""
        if self._open is None:
            return empty_rows(), memoryview(b"")
        rows, skipped, count = clip(self._open.extents, first, stop)
        payload = as_bytes(self._open.payload).data[skipped * grain_bytes : (skipped + count) * grain_bytes]
        if stop > self._open.last:
            self._open = next(self._segments, None)
        return rows, payload


def _compose_disk(change: DiskChange, cursors: list[_Cursor]) -> Iterator[Part]:
    first = 0
    while first < change.result_grains:
        stop = min(change.result_grains, *(c.known_until() for c in cursors))
        yield _window(change, cursors, first, stop)
        first = stop


def _window(change: DiskChange, cursors: list[_Cursor], first: int, stop: int) -> Part:
    """All deltas laid over each other in [first, stop)."""
    grain = change.grain_bytes
    rows, payload = cursors[0].take(first, stop, grain)
    for cursor in cursors[1:]:
        if cursor.result_grains < stop:
            rows, _, count = clip(rows, first, cursor.result_grains)
            payload = payload[: count * grain]
        low, high = max(first, cursor.base_grains), min(stop, cursor.result_grains)
        if low < high:
            rows = np.concatenate((rows, rows_of([(low, high - low, ZERO)])))
        rows, payload = _overlay((rows, payload), cursor.take(first, stop, grain), grain)
    return coalesce(omit_zero_from(rows, change.base_grains)), payload


def _overlay(lower: Part, upper: Part, grain_bytes: int) -> Part:
    if not len(upper[0]):
        return lower
    if not len(lower[0]):
        return upper
    pieces = np.frombuffer(_native.overlay(lower[0].data, upper[0].data), dtype=_PIECE)
    rows = np.empty(len(pieces), dtype=EXTENT)
    for name in ("first", "count", "data"):
        rows[name] = pieces[name]
    if not (rows["data"] == DATA).any():
        return rows, memoryview(b"")
    return rows, memoryview(_native.gather(pieces.data, (lower[1], upper[1]), grain_bytes))
