"""Which windows a scan looks at, and which ranges it reads in them.

Pure and lazy: streams of ascending spans are made from the image's allocation
and from the runs of a sparse file, and merged; nothing of the disk's size is
held in memory.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from replica.images import Image
from replica.tracking.journal import WINDOW_BYTES

MAX_RANGES = 64
"""An image in more pieces than this in one window is read in one piece there: seeking costs more than zeros do."""


class Span(NamedTuple):
    """A window and the byte ranges (half open, ascending, of the disk) to read in it; the rest of it is zero."""

    window: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def bytes_to_read(self) -> int:
        return sum(stop - start for start, stop in self.ranges)


def spans_of_image(image: Image, size_bytes: int) -> Iterator[Span]:
    """A span for every window that the image has anything allocated in."""
    window = -1
    ranges: list[tuple[int, int]] = []
    for start, stop in image.allocated(0, size_bytes):
        position = start
        while position < stop:
            number = position // WINDOW_BYTES
            end = min(stop, (number + 1) * WINDOW_BYTES)
            if number != window:
                if ranges:
                    yield Span(window, _bounded(ranges))
                window, ranges = number, []
            ranges.append((position, end))
            position = end
    if ranges:
        yield Span(window, _bounded(ranges))


def spans_of_runs(runs: Iterable[tuple[int, int]], units_per_window: int) -> Iterator[Span]:
    """A span without ranges for every window that half-open runs of some unit (ascending) touch."""
    done = -1
    for start, stop in runs:
        for window in range(max(start // units_per_window, done + 1), -(-stop // units_per_window)):
            yield Span(window, ())
            done = window


def merge_spans(left: Iterator[Span], right: Iterator[Span]) -> Iterator[Span]:
    """Every window of either, once, with the ranges of the one that has some."""
    held: Span | None = None
    for span in heapq.merge(left, right, key=lambda s: s.window):
        if held is not None and held.window == span.window:
            held = Span(span.window, held.ranges or span.ranges)
            continue
        if held is not None:
            yield held
        held = span
    if held is not None:
        yield held


def common_spans(spans: Iterator[Span], wanted: Iterator[Span]) -> Iterator[Span]:
    """Those of `spans` whose window is also in `wanted`."""
    target = next(wanted, None)
    for span in spans:
        while target is not None and target.window < span.window:
            target = next(wanted, None)
        if target is None:
            return
        if target.window == span.window:
            yield span


def _bounded(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    return tuple(ranges) if len(ranges) <= MAX_RANGES else ((ranges[0][0], ranges[-1][1]),)
