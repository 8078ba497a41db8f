"""Who answers for which grains of a disk: the layers of a chain, merged once per region.

A region is a part of a disk of REGION_GRAINS grains (64 MiB of 4 KiB grains).
Its map starts with what the head has, and takes the layers from the head's
side to the point's: behind the size that a layer starts from everything is
zero, and whatever the layer has an extent for is the layer's. So the nearest
to the point wins, and a layer is asked once for the region, not for each read.

Grains are whole here: the canonical form (`change`) makes a delta that cuts a
disk inside a grain carry that grain, unless what it cuts off was zero.

While a map is made it takes 16 bytes per grain; afterwards the runs of
it are kept, 32 bytes each, and never more than there are grains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from replica.delta.extents import LOST, ZERO, Rows
from replica.model import Disk

REGION_GRAINS = 1 << 14
NOBODY, GONE = -1, -2
"""Instead of a layer's index: zeros, and content that was lost."""

RowsOf = Callable[[int, int, int], Sequence[tuple[int, Rows, npt.NDArray[np.int64]]]]
"""(layer, first, stop) -> (segment number, rows, first payload grain of each row) that touch grains [first, stop)."""

RUN = np.dtype([("first", "<i8"), ("stop", "<i8"), ("place", "<i8"), ("layer", "<i4"), ("number", "<i4")])
Runs = npt.NDArray[np.void]


@dataclass(frozen=True)
class Sizes:
    """A disk along a chain: grains in the state each layer starts from, and whether the layer knows the disk."""

    base_grains: tuple[int, ...]
    known: tuple[bool, ...]


def merge(disk: Disk, first: int, stop: int, sizes: Sizes, head_grains: int, rows_of: RowsOf) -> Runs:
    """The runs of grains [first, stop), ascending and without gaps; `layer` is the count of layers for the head.

    `place` is where the run begins in the payload of segment `number`, in grains.
    """
    count = stop - first
    layers, numbers = np.full(count, NOBODY, np.int32), np.zeros(count, np.int32)
    places = np.zeros(count, np.int64)
    layers[: max(0, head_grains - first)] = len(sizes.known)
    for index in range(len(sizes.known) - 1, -1, -1):
        if not sizes.known[index]:
            layers[:] = NOBODY
            continue
        layers[max(0, sizes.base_grains[index] - first) :] = NOBODY
        for number, rows, starts in rows_of(index, first, stop):
            _lay_over(rows, starts, first, stop, index, number, (layers, numbers, places))
    return _runs(first, layers, numbers, places, len(sizes.known))


def _lay_over(
    rows: Rows,
    starts: npt.NDArray[np.int64],
    first: int,
    stop: int,
    index: int,
    number: int,
    target: tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int64]],
) -> None:
    begin = rows["first"].astype(np.int64)
    low = np.maximum(begin, first)
    counts = np.minimum(begin + rows["count"].astype(np.int64), stop) - low
    total = int(counts.sum())
    skipped = np.cumsum(counts) - counts
    within = np.arange(total, dtype=np.int64)
    grains = np.repeat(low - first - skipped, counts) + within
    owner = np.where(rows["data"] == ZERO, NOBODY, np.where(rows["data"] == LOST, GONE, index)).astype(np.int32)
    target[0][grains] = np.repeat(owner, counts)
    target[1][grains] = number
    target[2][grains] = np.repeat(starts + low - begin - skipped, counts) + within


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
