"""read: a point's bytes, through the chain of inverses down to the head.

    point ← layers[0] ← layers[1] ← … ← head

`layers` are the inverses between the point and the head, nearest the point
first: layers[0] leads to the point, and each starts from the state that the
next one leads to. For any byte the first layer that has an extent there answers
(DATA its payload, ZERO zeros, LOST a `LostError`). A layer that has none passes the question on,
inside the size of the disk it starts from; behind that size the answer is zero.

The head may be rewritten while it is read. An inverse gets its name before the
first byte of the head changes; so first the head is read, *then* `newer` is
asked for layers that appeared since, and if there are any the read is done
again with them: what was overwritten is in one of them.

Who answers is found once per region of the disk (`owners`) and kept, with tables
and chunks, in a cache of bounded size: a small read costs one chunk at any depth,
and a large one opens each chunk once. A damaged segment is met only by who reads
grains of it that no nearer layer has.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from replica.cache import Cache
from replica.delta.change import DiskChange
from replica.delta.extents import DATA, Rows, as_bytes
from replica.delta.owners import BROKEN, GONE, NOBODY, REGION_GRAINS, Runs, Sizes, merge
from replica.delta.ranges import Range, intersection, union
from replica.delta.segment import Table
from replica.errors import BaseMismatchError, DamageError, LostError
from replica.model import Disk, DiskId, State

if TYPE_CHECKING:
    from typing_extensions import Buffer

Below = Callable[[DiskId, int, memoryview], None]
"""Reads the head: disk, offset, buffer to fill. Called only inside the disk's size in the state below the layers."""
HeadRanges = Callable[[DiskId, int, int], Iterable[tuple[int, int]]]
"""Which bytes of [start, stop) the head may have anything but zeros in: half-open, ascending, disjoint."""
CACHE_BYTES = 32 << 20
ALLOCATED_BYTES = 64 << 20
"""Of the disk that `allocated` looks at together."""
SCAN_BYTES = 1 << 30
"""Of the disk that `runs` looks at together."""


class Layer(Protocol):
    """One inverse, read at random. `DeltaFileReader` is one."""

    @property
    def base(self) -> State: ...
    @property
    def result(self) -> State: ...
    @property
    def disks(self) -> tuple[DiskChange, ...]: ...
    def overlapping(self, disk: int, first: int, stop: int) -> range:
        """Numbers of the segments of disk `disk` that may touch grains [first, stop)."""
        ...

    def span(self, number: int) -> tuple[int, int]:
        """First grain of a segment, and the one behind its last."""
        ...

    def table(self, number: int) -> Table: ...
    def chunk(self, table: Table, index: int) -> bytes: ...


class Run(NamedTuple):
    """Bytes [start, stop) of a disk and which layer has them; `layer` == number of layers is the head, GONE nobody."""

    start: int
    stop: int
    layer: int
    number: int = 0
    payload_offset: int = 0


@dataclass(frozen=True, eq=False)
class _Opened:
    """A table with what is needed to search it."""

    table: Table
    stops: npt.NDArray[np.uint64]
    payload_starts: npt.NDArray[np.int64]
    """Where each row's payload begins, in grains."""

    @property
    def cost(self) -> int:
        return self.table.extents.nbytes * 2 + self.table.chunks.nbytes * 3 + 512


def _by_chunk(run: Run) -> tuple[int, int, int]:
    return run.layer, run.number, run.payload_offset


def _blank_between(runs: list[Run], target: npt.NDArray[np.uint8], offset: int) -> None:
    """Zeros where no run is; `target` is the disk from `offset` on, the runs ascend."""
    reached = offset
    for run in runs:
        if reached < run.start:
            target[reached - offset : run.start - offset] = 0
        reached = run.stop
    target[reached - offset :] = 0


def _place(layer: Layer, disk_id: DiskId) -> int | None:
    """The disk's index in the layer's disk table."""
    return next((i for i, change in enumerate(layer.disks) if change.disk_id == disk_id), None)


def _size_of(state: State, disk_id: DiskId) -> int:
    found = state.disk(disk_id)
    return found.disk.size_bytes if found else 0


def _all_of_it(_disk_id: DiskId, start: int, stop: int) -> Iterable[tuple[int, int]]:
    return ((start, stop),)


class ChainReader:
    """Reads the state that the first layer leads to. Thread-safe.

    `head` is the state that the last layer starts from (the point itself, if there are no layers); `below` reads
    it. `newer` returns the layers that appeared since it was last asked, nearest the point first; calls of it are
    serialised. `head_ranges` is what `allocated` knows of the head's holes.

    BaseMismatchError if the layers are no chain.
    """

    def __init__(
        self,
        head: State,
        layers: Sequence[Layer],
        below: Below,
        newer: Callable[[], Sequence[Layer]] = tuple,
        head_ranges: HeadRanges = _all_of_it,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._below, self._newer, self._head_ranges = below, newer, head_ranges
        self._lock = threading.Lock()
        self._cache = Cache(cache_bytes)
        self._layers: tuple[Layer, ...] = ()
        self._head = self.state = layers[0].result if layers else head
        self._append(layers)
        if self._head != head:
            raise BaseMismatchError(f"the chain of inverses starts from {self._head.delta_id}, not {head.delta_id}")

    def _append(self, layers: Sequence[Layer]) -> None:
        for layer in layers:
            if layer.result != self._head:
                raise BaseMismatchError(f"an inverse leads to {layer.result.delta_id}, not to {self._head.delta_id}")
            self._head = layer.base
        self._layers += tuple(layers)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self._layers)

    def read_into(self, disk_id: DiskId, offset: int, buffer: Buffer, *, missing: list[Range] | None = None) -> None:
        """Fill `buffer` from the disk as it was. ValueError outside of it; StorageError from a layer.

        LostError if a range of it is lost, DamageError if one is in damage; with `missing` such ranges are zeros, and
        are added to it, half-open and in no order. Each chunk is opened once.
        """
        target = as_bytes(buffer)
        disk = self._disk(disk_id, offset, offset + len(target))
        while True:
            layers = self._layers
            asked_head = False
            gone: list[Range] | None = None if missing is None else []
            runs = self._resolve(layers, disk, offset, offset + len(target), broken=gone is not None)
            _blank_between(runs, target, offset)
            for run in sorted(runs, key=_by_chunk):
                part = target.data[run.start - offset : run.stop - offset]
                if run.layer == len(layers):
                    asked_head = True
                    try:
                        self._ask_head(disk_id, run.start, part, gone)
                    except LostError:
                        if not self.grew(len(layers)):
                            raise
                        break  # what is being rewritten there is in an inverse by now
                elif run.layer not in (GONE, BROKEN):
                    self._copy(layers[run.layer], run, part, gone)
                elif gone is None:
                    raise self._lost(disk, run)
                else:
                    part[:] = bytes(len(part))
                    gone.append((run.start, run.stop))
            if not asked_head or not self.grew(len(layers)):
                if missing is not None:
                    missing += gone or ()
                return

    def _ask_head(self, disk_id: DiskId, start: int, part: memoryview, gone: list[Range] | None) -> None:
        """Read the head, which names its first lost range by a LostError, around what is lost."""
        while part:
            try:
                self._below(disk_id, start, part)
            except LostError as lost:
                if gone is None:
                    raise
                before, after = max(0, lost.offset - start), min(lost.offset + lost.length - start, len(part))
                gone.append((start + before, start + after))
            else:
                return
            if before:
                self._below(disk_id, start, part[:before])
            part[before:after] = bytes(len(part[before:after]))
            start, part = start + after, part[after:]

    def lost(self, disk_id: DiskId, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Half-open ranges of bytes that nobody has any more, ascending, joined. ValueError outside of the disk."""
        return union((run.start, run.stop) for run in self.runs(disk_id, start, stop) if run.layer == GONE)

    def _lost(self, disk: Disk, run: Run) -> LostError:
        return LostError(
            f"disk {disk.name!r} of point {self.state.point} has lost bytes {run.start} to {run.stop}",
            hint="every other byte of the disk can be read",
            disk=disk.name,
            offset=run.start,
            length=run.stop - run.start,
        )

    def runs(self, disk_id: DiskId, start: int, stop: int) -> Iterator[Run]:
        """Who has the bytes [start, stop), ascending; what no run covers is zero. ValueError outside of the disk."""
        disk = self._disk(disk_id, start, stop)
        for begin in range(start, stop, SCAN_BYTES):
            yield from self._resolve(self._layers, disk, begin, min(begin + SCAN_BYTES, stop), broken=True)

    def allocated(self, disk_id: DiskId, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Half-open ranges of bytes that may be anything but zero, ascending. ValueError outside of the disk.

        What the head has counts where `head_ranges` says so. It is asked before `newer`, as bytes are: a range that
        a commit makes a hole meanwhile is in the inverse that is seen afterwards.
        """
        disk = self._disk(disk_id, start, stop)
        for begin in range(start, stop, ALLOCATED_BYTES):
            end = min(begin + ALLOCATED_BYTES, stop)
            of_head = list(self._head_ranges(disk_id, begin, end))
            self.grew(self.depth)
            layers = self._layers
            runs = self._resolve(layers, disk, begin, end, broken=True)
            answered = ((run.start, run.stop) for run in runs if run.layer < len(layers))
            passed = ((run.start, run.stop) for run in runs if run.layer == len(layers))
            yield from union(answered, intersection(passed, of_head))

    def changes(self, disk_id: DiskId, newer: State, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Half-open ranges of [start, stop) in which the disk may differ from a newer state, in whole grains.

        Ascending, joined. ValueError outside of the disk, or if no layer starts from that state; DamageError where a
        segment does not open. The disk has the same grain in both, and its size is the smaller one.
        """
        disk = self._disk(disk_id, start, stop)
        layers = self._layers
        count = next((n for n, layer in enumerate(layers, 1) if layer.base == newer), None)
        if count is None:
            raise ValueError(f"state {newer.delta_id} is not on the way from {self.state.delta_id} to the head")
        streams = [self._changed(index, layers[index], disk, start, stop) for index in range(count)]
        yield from union(*streams)

    def _changed(self, index: int, layer: Layer, disk: Disk, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """What one layer has extents of."""
        place, grain = _place(layer, disk.id), disk.grain_bytes
        if place is None:
            return
        first, last = start // grain, -(-stop // grain)
        for number in layer.overlapping(place, first, last):
            extents = self._open(index, layer, number).table.extents
            firsts = np.maximum(extents["first"].astype(np.int64), first)
            lasts = np.minimum((extents["first"] + extents["count"]).astype(np.int64), last)
            for low, high in zip(firsts.tolist(), lasts.tolist(), strict=True):
                if low < high:
                    yield max(low * grain, start), min(high * grain, stop)

    def _disk(self, disk_id: DiskId, start: int, stop: int) -> Disk:
        found = self.state.disk(disk_id)
        if found is None or not 0 <= start <= stop <= found.disk.size_bytes:
            raise ValueError(f"bytes {start} to {stop} are not inside a disk of state {self.state.delta_id}")
        return found.disk

    def grew(self, depth: int) -> bool:
        """Whether there are more layers now than `depth`; asks `newer` if that is not known."""
        with self._lock:
            if len(self._layers) == depth:
                self._append(self._newer())
            return len(self._layers) > depth

    def _resolve(
        self, layers: tuple[Layer, ...], disk: Disk, start: int, stop: int, *, broken: bool = False
    ) -> list[Run]:
        """Runs that cover all of [start, stop) that is not zero, ascending. DamageError if a segment does not open,
        unless `broken` runs are asked for, too."""
        found: list[Run] = []
        grain = disk.grain_bytes
        head_stop = min(stop, _size_of(layers[-1].base if layers else self.state, disk.id))
        region_bytes = REGION_GRAINS * grain
        for region in range(start // region_bytes, -(-stop // region_bytes)):
            runs, errors = self._region(layers, disk, region)
            low = int(np.searchsorted(runs["stop"], start // grain, "right"))
            high = int(np.searchsorted(runs["first"], -(-stop // grain), "left"))
            for first, last, place, layer, number in runs[low:high].tolist():
                begin, end = max(start, first * grain), min(stop, last * grain)
                if layer == len(layers):
                    end = min(end, head_stop)
                if layer == BROKEN and begin < end and not broken:
                    raise errors[number]
                if layer != NOBODY and begin < end:
                    found.append(Run(begin, end, layer, number, place * grain + begin - first * grain))
        return found

    def _region(self, layers: tuple[Layer, ...], disk: Disk, region: int) -> tuple[Runs, list[DamageError]]:
        """The merged layers over one region of the disk. Made once, kept in the cache unless something is broken."""
        key = (-1, disk.id.int, region, len(layers))
        runs = self._cache.get(key)
        if not isinstance(runs, np.ndarray):
            first = region * REGION_GRAINS
            stop = min(first + REGION_GRAINS, disk.count_grains)
            places = [_place(layer, disk.id) for layer in layers]
            changes = [None if at is None else layer.disks[at] for layer, at in zip(layers, places, strict=True)]
            sizes = Sizes(tuple(c.base_grains if c else 0 for c in changes), tuple(c is not None for c in changes))
            head_grains = -(-_size_of(layers[-1].base if layers else self.state, disk.id) // disk.grain_bytes)

            def spans_of(index: int, first: int, stop: int) -> list[tuple[int, int, int]]:
                place = places[index]
                assert place is not None
                return [
                    (number, *layers[index].span(number)) for number in layers[index].overlapping(place, first, stop)
                ]

            def rows_of(index: int, number: int, first: int, stop: int) -> tuple[Rows, npt.NDArray[np.int64]]:
                opened = self._open(index, layers[index], number)
                low = int(np.searchsorted(opened.stops, np.uint64(first), "right"))
                high = int(np.searchsorted(opened.table.extents["first"], np.uint64(stop), "left"))
                return opened.table.extents[low:high], opened.payload_starts[low:high]

            runs, errors = merge(disk, first, stop, sizes, head_grains, spans_of, rows_of)
            if errors:
                return runs, errors
            self._cache.put(key, runs, runs.nbytes + 256)
        return runs, []

    def _open(self, index: int, layer: Layer, number: int) -> _Opened:
        key = (index, number)
        opened = self._cache.get(key)
        if not isinstance(opened, _Opened):
            table = layer.table(number)
            counts = table.extents["count"].astype(np.int64)
            data = np.cumsum(np.where(table.extents["data"] == DATA, counts, 0))
            starts = np.concatenate((np.zeros(1, dtype=np.int64), data[:-1]))
            opened = _Opened(table, table.extents["first"] + table.extents["count"], starts)
            self._cache.put(key, opened, opened.cost)
        return opened

    def _copy(self, layer: Layer, run: Run, target: memoryview, gone: list[Range] | None) -> None:
        """Payload bytes of a run, chunk by chunk. With `gone`, a damaged chunk is zeros, and its part added there."""
        table = self._open(run.layer, layer, run.number).table
        starts = table.raw_starts
        index = int(np.searchsorted(starts, run.payload_offset, "right")) - 1
        done = 0
        while done < len(target):
            skip = run.payload_offset + done - int(starts[index])
            length = min(int(starts[index + 1] - starts[index]) - skip, len(target) - done)
            try:
                target[done : done + length] = self._chunk(run.layer, layer, table, index)[skip : skip + length]
            except DamageError:
                if gone is None:
                    raise
                target[done : done + length] = bytes(length)
                gone.append((run.start + done, run.start + done + length))
            done += length
            index += 1

    def _chunk(self, layer_index: int, layer: Layer, table: Table, index: int) -> memoryview:
        key = (layer_index, table.number, index)
        chunk = self._cache.get(key)
        if not isinstance(chunk, bytes):
            chunk = layer.chunk(table, index)
            self._cache.put(key, chunk, len(chunk) + 128)
        return memoryview(chunk)
