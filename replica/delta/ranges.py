"""Half-open ranges (start, stop) of whatever is counted: ascending streams of them, joined, intersected, cut out."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator

Range = tuple[int, int]


def union(*streams: Iterable[Range]) -> Iterator[Range]:
    """Ascending ranges from several streams that ascend by start, joined where they touch or overlap. Lazy."""
    low = high = -1
    for start, stop in heapq.merge(*streams):
        if start > high:
            if low < high:
                yield low, high
            low, high = start, stop
        high = max(high, stop)
    if low < high:
        yield low, high


def intersection(one: Iterable[Range], other: Iterable[Range]) -> Iterator[Range]:
    """What two ascending streams of disjoint ranges have in common. Lazy."""
    ones, others = iter(one), iter(other)
    a, b = next(ones, None), next(others, None)
    while a is not None and b is not None:
        start, stop = max(a[0], b[0]), min(a[1], b[1])
        if start < stop:
            yield start, stop
        if a[1] <= b[1]:
            a = next(ones, None)
        else:
            b = next(others, None)


def difference(one: Iterable[Range], other: Iterable[Range]) -> Iterator[Range]:
    """What of an ascending stream of disjoint ranges is not in another one. Lazy."""
    holes = iter(other)
    hole = next(holes, None)
    for start, stop in one:
        at = start
        while hole is not None and hole[0] < stop:
            if at < hole[0]:
                yield at, hole[0]
            at = max(at, hole[1])
            if hole[1] > stop:
                break
            hole = next(holes, None)
        if at < stop:
            yield at, stop
