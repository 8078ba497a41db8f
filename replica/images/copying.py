"""Copying a disk from one image into another, thin and at the speed of the devices.

    copy_disk(source, writer)

Windows are read ahead by a thread of their own while the one before is looked
through for zeros and written; reading, looking and writing let each other run.
What is not allocated is not read, and grains that are zero are not written. Memory
is two windows, whatever the disk's size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from replica import _native
from replica.images.image import Image, ImageWriter
from replica.model import GRAIN_BYTES
from replica.progress import Progress, silent

if TYPE_CHECKING:
    from typing import Protocol

    from typing_extensions import Buffer

    from replica.images.image import Bytes

    class Writable(Protocol):
        """Of an `ImageWriter` or a `FlatImage`."""

        def write(self, offset: int, data: Buffer) -> None: ...


WINDOW_BYTES = 4 << 20


def copy_disk(source: Image, target: Writable, progress: Progress = silent) -> None:
    """Write everything of `source` that is not zero. The target has its size and holds zeros.

    Raises what reading and writing raise; the progress counts bytes of the disk.
    """
    size = source.size_bytes
    memory = [np.empty(min(WINDOW_BYTES, max(size, 1)), dtype=np.uint8) for _ in range(2)]

    def read(number: int, start: int, stop: int) -> tuple[int, Bytes]:
        window = memory[number % 2][: stop - start]
        source.read_into(start, window.data)
        return start, window

    def finish(reading: Future[tuple[int, Bytes]]) -> None:
        start, window = reading.result()
        write_nonzero(target, start, window)
        progress(start + len(window), size)

    with ThreadPoolExecutor(1, "copy") as reader:
        ahead: Future[tuple[int, Bytes]] | None = None
        for number, (start, stop) in enumerate(windows(source.allocated(0, size), WINDOW_BYTES)):
            reading = reader.submit(read, number, start, stop)
            if ahead is not None:
                finish(ahead)
            ahead = reading
        if ahead is not None:
            finish(ahead)
    progress(size, size)


def windows(ranges: Iterable[tuple[int, int]], window_bytes: int) -> Iterator[tuple[int, int]]:
    """What of each window has to be read: from the first grain with a range in it to the last byte. Lazy."""
    begin = end = 0
    for start, stop in ranges:
        while start < stop:
            if start // window_bytes != begin // window_bytes or begin == end:
                if begin < end:
                    yield begin, end
                begin = start - start % GRAIN_BYTES
            end = min(stop, (start // window_bytes + 1) * window_bytes)
            start = end
    if begin < end:
        yield begin, end


def write_nonzero(target: Writable, offset: int, window: Bytes, grain_bytes: int = GRAIN_BYTES) -> None:
    """Write the runs of grains that are not zero; `offset` is where the window lies on the disk.

    Grains count from the window's begin, which should be a multiple of them.
    """
    for start, stop in _nonzero(window, grain_bytes):
        target.write(offset + start, window[start:stop].data)


def write_all(target: ImageWriter, offset: int, window: Bytes, grain_bytes: int = GRAIN_BYTES) -> None:
    """Write the window over whatever the target has there: the runs of grains that are zero as zeros, without data."""
    reached = 0
    for start, stop in (*_nonzero(window, grain_bytes), (len(window), len(window))):
        if reached < start:
            target.zero(offset + reached, start - reached)
        if start < stop:
            target.write(offset + start, window[start:stop].data)
        reached = stop


def _nonzero(window: Bytes, grain_bytes: int) -> list[tuple[int, int]]:
    """The runs of grains that are not zero."""
    zero = np.empty(-(-len(window) // grain_bytes), dtype=np.uint8)
    _native.zeros(window.data, grain_bytes, zero)
    edges = np.flatnonzero(np.diff(zero, prepend=1, append=1)).reshape(-1, 2) * grain_bytes
    return [(start, min(stop, len(window))) for start, stop in edges.tolist()]
