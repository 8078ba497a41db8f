"""The layers of a chain laid over each other: whose bytes a disk's are, in numpy extents.

A layer (one file of the chain) answers for ranges of the disk. It says so in
rows of `EXTENT`: bytes [start, stop) of the disk lie at `place` of its file, or
are zeros (`ZEROS`). What it says nothing of is its parent's, and zeros where
there is no parent or the parent ends before. Upper layers win.

A layer answers twice. `extents` is exact and may read sector bitmaps. `outline`
reads nothing: from the allocation table alone it says what the layer *may*
answer for, and in the field `whole` whether it surely answers for all of it. So
`allocated` costs no I/O on the images but questions for holes, and a read costs
what it reads, and the bitmaps in its way.

Whose bytes a range's are is a `_Map`. Who reads on from where the last one ends
gets one that reaches ahead, because finding out costs as much for one window as
for many. The work and memory of each call are bounded by its range and that
reach; the last map is all that is kept.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, Self

import numpy as np

from replica.images.source import DataCursor, Source

if TYPE_CHECKING:
    import numpy.typing as npt

    from replica.images.image import Bytes

    Extents = np.ndarray[tuple[int], np.dtype[np.void]]
    Ints = npt.NDArray[np.int64]

EXTENT: Final = np.dtype([("start", np.int64), ("stop", np.int64), ("place", np.int64), ("whole", np.bool_)])
"""Half-open in bytes of the disk; `place` in bytes of the layer's file. Rows ascend and are disjoint."""
ZEROS: Final = -1
_BLOCKS_PER_STEP: Final = 1 << 16
_READ_OVER_BYTES: Final = 64 << 10
"""A gap that costs less to read than to leave out."""
_AHEAD_BYTES: Final = 64 << 20
_AHEAD_BLOCKS: Final = 256
"""How far a map reaches ahead, whichever is less."""


class Layer(Protocol):
    """One file of a chain, as the disk sees it. Thread-safe."""

    @property
    def source(self) -> Source: ...

    @property
    def size_bytes(self) -> int:
        """The size of its disk: behind it is nothing but zeros, whatever its parents hold there."""
        ...

    @property
    def block_bytes(self) -> int:
        """The unit of its allocation table: how far one look of `outline` goes."""
        ...

    def extents(self, start: int, stop: int) -> Extents:
        """What it answers for in [start, stop), clipped to that and to its own size. ImageError."""
        ...

    def outline(self, start: int, stop: int) -> Extents:
        """What it may answer for, without I/O, clipped in the same way."""
        ...


def make_extents(
    start: npt.ArrayLike, stop: npt.ArrayLike, place: npt.ArrayLike, whole: npt.ArrayLike = True
) -> Extents:
    """Rows from columns."""
    rows = np.empty(len(np.atleast_1d(np.asarray(start))), EXTENT)
    rows["start"], rows["stop"], rows["place"], rows["whole"] = start, stop, place, whole
    return rows


def clip(rows: Extents, start: int, stop: int) -> Extents:
    """The parts of ascending rows inside [start, stop)."""
    if len(rows) and start <= rows["start"][0] and rows["stop"][-1] <= stop:
        return rows
    first = int(np.searchsorted(rows["stop"], start, side="right"))
    last = int(np.searchsorted(rows["start"], stop, side="left"))
    rows = rows[first:last].copy()
    if len(rows):
        cut = start - int(rows["start"][0])
        if cut > 0:
            rows["start"][0] = start
            rows["place"][0] += cut if rows["place"][0] != ZEROS else 0
        rows["stop"][-1] = min(int(rows["stop"][-1]), stop)
    return rows


class _Part(NamedTuple):
    """What is read from one file (None: zeros), in rows as `EXTENT` has them, column by column."""

    source: Source | None
    starts: list[int]
    stops: list[int]
    places: list[int]

    @classmethod
    def of(cls, source: Source | None, rows: Extents) -> Self:
        return cls(source, rows["start"].tolist(), rows["stop"].tolist(), rows["place"].tolist())


class _Map(NamedTuple):
    """Where the bytes [start, stop) of the disk are: parts to be filled in this order, later over earlier ones."""

    start: int
    stop: int
    parts: Sequence[_Part]


class Overlay:
    """Layers, the top first, as one disk. Thread-safe if they are."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = tuple(layers)
        block = min(layer.block_bytes for layer in layers)
        self._step = _BLOCKS_PER_STEP * block
        self._ahead = min(_AHEAD_BYTES, _AHEAD_BLOCKS * block)
        self._known = _Map(0, 0, ())

    def read_into(self, offset: int, target: Bytes) -> None:
        """Fill `target` from the disk; the caller has checked the range."""
        stop = offset + len(target)
        for source, starts, stops, places in self._map(offset, stop).parts:
            for index in range(bisect_right(stops, offset), bisect_left(starts, stop)):
                begin, place = starts[index], places[index]
                skipped = max(offset - begin, 0)
                part = target[begin + skipped - offset : stops[index] - offset]
                if source is None or place == ZEROS:
                    part[:] = 0
                else:
                    source.read_into(place + skipped, part.data)

    def _map(self, start: int, stop: int) -> _Map:
        """One that holds [start, stop)."""
        known = self._known
        if known.start <= start and stop <= known.stop:
            return known
        if known.start <= start <= known.stop + self._ahead:
            stop = max(stop, min(start + self._ahead, self._layers[0].size_bytes))
        self._known = known = _Map(start, stop, list(self._parts(start, stop)))
        return known

    def _parts(self, start: int, stop: int) -> Iterator[_Part]:
        missing = make_extents([start], [stop], [ZEROS])
        for layer in self._layers:
            if layer.size_bytes < stop:
                yield _Part.of(None, clip(missing, layer.size_bytes, stop))
                missing, stop = clip(missing, start, layer.size_bytes), layer.size_bytes
            if not len(missing):
                return
            found = layer.extents(int(missing["start"][0]), int(missing["stop"][-1]))
            if len(missing) > 1:
                found = _intersection(found, missing)
            yield _Part.of(layer.source, _reads(found, missing))
            missing = _difference(missing, found)
        yield _Part.of(None, missing)

    def allocated(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Half-open ranges that may hold anything but zeros and are no holes of a file. Ascending; may touch."""
        cursors = [DataCursor(layer.source) for layer in self._layers]
        while start < stop:
            end = min(start + self._step, stop)
            yield from self._allocated(start, end, cursors)
            start = end

    def _allocated(self, start: int, stop: int, cursors: Sequence[DataCursor]) -> Iterator[tuple[int, int]]:
        """One step. A layer alone is told as it is; ranges of several are sorted and joined."""
        missing = make_extents([start], [stop], [ZEROS])
        if len(self._layers) == 1:
            yield from _data(self._layers[0].outline(start, stop), cursors[0])
            return
        ranges: list[tuple[int, int]] = []
        for layer, cursor in zip(self._layers, cursors, strict=True):
            missing = clip(missing, start, layer.size_bytes)
            if not len(missing):
                break
            found = _intersection(layer.outline(int(missing["start"][0]), int(missing["stop"][-1])), missing)
            ranges += _data(found, cursor)
            missing = _difference(missing, found[found["whole"]])
        reached = start
        for begin, end in sorted(ranges):
            if end > reached:
                yield max(begin, reached), end
                reached = end


def _data(rows: Extents, cursor: DataCursor) -> Iterator[tuple[int, int]]:
    """Ranges of the disk whose bytes lie in a file, and in no hole of it."""
    for start, stop, place, _ in rows[rows["place"] != ZEROS].tolist():
        shift = place - start
        for begin, end in cursor.runs(place, stop + shift):
            yield begin - shift, end - shift


def _intersection(rows: Extents, ranges: Extents) -> Extents:
    """The parts of rows that lie in ranges; both ascend and are disjoint in themselves."""
    first = np.searchsorted(ranges["stop"], rows["start"], side="right")
    counts = np.searchsorted(ranges["start"], rows["stop"], side="left") - first
    counts = np.maximum(counts, 0)
    row = np.repeat(np.arange(len(rows)), counts)
    within = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    other = ranges[first[row] + within]
    found = rows[row]
    cut: Ints = np.maximum(other["start"] - found["start"], 0)
    found["place"] += np.where(found["place"] == ZEROS, 0, cut)
    found["start"] += cut
    found["stop"] = np.minimum(found["stop"], other["stop"])
    return found


def _reads(found: Extents, missing: Extents) -> Extents:
    """Rows that lie close together in the file as on the disk, as one read over what is between them.

    Only inside one range that is still missing: what is read too much is overwritten by the layers below.
    """
    if not (found["start"][1:] > found["stop"][:-1]).any():
        return found
    ranges = np.searchsorted(missing["start"], found["start"], side="right")
    shifts = np.where(found["place"] == ZEROS, ZEROS, found["place"] - found["start"])
    near = found["start"][1:] - found["stop"][:-1] <= _READ_OVER_BYTES
    joined = near & (ranges[1:] == ranges[:-1]) & (shifts[1:] == shifts[:-1]) & (found["place"][1:] != ZEROS)
    first = np.concatenate(([True], ~joined))
    rows = found[first]
    rows["stop"] = found["stop"][np.concatenate((~joined, [True]))]
    return rows


def _difference(ranges: Extents, rows: Extents) -> Extents:
    """What of ranges is in no row; rows lie inside ranges, both ascend."""
    if not len(rows):
        return ranges
    starts = np.sort(np.concatenate((ranges["start"], rows["stop"])))
    stops = np.sort(np.concatenate((ranges["stop"], rows["start"])))
    left = starts < stops
    return make_extents(starts[left], stops[left], ZEROS)
