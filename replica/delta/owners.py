"""Who answers for which grains of a disk: the layers of a chain, merged once per region.

A region is a part of a disk of REGION_GRAINS grains (64 MiB of 4 KiB grains).
Its map takes the layers from the point's side to the head's: whatever a layer
has an extent for, and no layer before it had, is the layer's, and what is left
behind the size that the layer starts from is zero. So the nearest to the point
wins, and a layer is asked once for the region, not for each read. A segment is
opened only if there are grains in its span that nobody has answered for: what is
damaged behind nearer layers is in nobody's way. One that does not open is BROKEN
in just those grains; whoever reads none of them does not meet it.

Grains are whole here: the canonical form (`change`) makes a delta that cuts a
disk inside a grain carry that grain, unless what it cuts off was zero.

While a map is made it takes 17 bytes per grain; afterwards the runs of
it are kept, 32 bytes each, and never more than there are grains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from replica.delta.extents import LOST, ZERO, Rows
from replica.errors import DamageError
from replica.model import Disk

REGION_GRAINS = 1 << 14
NOBODY, GONE, BROKEN = -1, -2, -3
"""Instead of a layer's index: zeros, content that was lost, and content that is in a damaged segment."""

SpansOf = Callable[[int, int, int], Iterable[tuple[int, int, int]]]
"""(layer, first, stop) -> (segment number, first grain, grain behind its last) of segments that may touch them."""
RowsOf = Callable[[int, int, int, int], tuple[Rows, npt.NDArray[np.int64]]]
"""(layer, segment number, first, stop) -> its rows that touch grains [first, stop), first payload grain of each."""

RUN = np.dtype([("first", "<i8"), ("stop", "<i8"), ("place", "<i8"), ("layer", "<i4"), ("number", "<i4")])
Runs = npt.NDArray[np.void]


@dataclass(frozen=True)
class Sizes:
    """A disk along a chain: grains in the state each layer starts from, and whether the layer knows the disk."""

    base_grains: tuple[int, ...]
    known: tuple[bool, ...]


def merge(
    disk: Disk, first: int, stop: int, sizes: Sizes, head_grains: int, spans_of: SpansOf, rows_of: RowsOf
) -> tuple[Runs, list[DamageError]]:
    """The runs of grains [first, stop), ascending and without gaps; `layer` is the count of layers for the head.

    `place` is where the run begins in the payload of segment `number`, in grains; of a BROKEN run `number` is the
    index of its error.
    """
    count = stop - first
    found = _Owners(count)
    errors: list[DamageError] = []
    for index, known in enumerate(sizes.known):
        if not known:
            found.open[:] = False
        for number, low, high in spans_of(index, first, stop) if found.open.any() else ():
            begin, end = max(low, first), min(high, stop)
            if not found.open[begin - first : end - first].any():
                continue
            try:
                rows, starts = rows_of(index, number, first, stop)
            except DamageError as error:
                found.answer(np.arange(begin - first, end - first), BROKEN, len(errors), 0)
                errors.append(error)
            else:
                _lay_over(rows, starts, first, stop, index, number, found)
        found.open[max(0, sizes.base_grains[index] - first) :] = False
    found.open[max(0, head_grains - first) :] = False
    found.layers[found.open] = len(sizes.known)
    return _runs(first, found.layers, found.numbers, found.places, len(sizes.known)), errors


class _Owners:
    """A map while it is made. `open`: nobody has answered for the grain so far."""

    def __init__(self, count: int) -> None:
        self.layers, self.numbers = np.full(count, NOBODY, np.int32), np.zeros(count, np.int32)
        self.places = np.zeros(count, np.int64)
        self.open = np.ones(count, np.bool_)

    def answer(
        self,
        grains: npt.NDArray[np.int64],
        owner: npt.NDArray[np.int32] | int,
        number: int,
        place: npt.NDArray[np.int64] | int,
    ) -> None:
        """For those of the grains that are open; `owner` and `place` are one each or all one."""
        free = self.open[grains]
        grains = grains[free]
        self.layers[grains] = owner[free] if isinstance(owner, np.ndarray) else owner
        self.numbers[grains] = number
        self.places[grains] = place[free] if isinstance(place, np.ndarray) else place
        self.open[grains] = False


def _lay_over(
    rows: Rows, starts: npt.NDArray[np.int64], first: int, stop: int, index: int, number: int, target: _Owners
) -> None:
    begin = rows["first"].astype(np.int64)
    low = np.maximum(begin, first)
    counts = np.minimum(begin + rows["count"].astype(np.int64), stop) - low
    total = int(counts.sum())
    skipped = np.cumsum(counts) - counts
    within = np.arange(total, dtype=np.int64)
    grains = np.repeat(low - first - skipped, counts) + within
    owner = np.where(rows["data"] == ZERO, NOBODY, np.where(rows["data"] == LOST, GONE, index)).astype(np.int32)
    places = np.repeat(starts + low - begin - skipped, counts) + within
    target.answer(grains, np.repeat(owner, counts), number, places)


def _runs(
    first: int,
    layers: npt.NDArray[np.int32],
    numbers: npt.NDArray[np.int32],
    places: npt.NDArray[np.int64],
    head: int,
) -> Runs:
    """Neighbours with one owner and, where it is a layer, consecutive payload are one run."""
    if not len(layers):
        return np.empty(0, RUN)
    payload = (layers >= 0) & (layers < head)
    goes_on = ~payload[1:] | ((numbers[1:] == numbers[:-1]) & (places[1:] == places[:-1] + 1))
    starts = np.flatnonzero(np.concatenate(([True], (layers[1:] != layers[:-1]) | ~goes_on)))
    runs = np.empty(len(starts), RUN)
    runs["first"], runs["stop"] = starts + first, np.append(starts[1:], len(layers)) + first
    runs["layer"], runs["number"], runs["place"] = layers[starts], numbers[starts], places[starts]
    return runs
