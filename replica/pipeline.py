"""The windows of something long, worked on by several threads at once, and their results in order.

    with closing(in_order(work, windows, WINDOW_BYTES, threads=4)) as results:
        for result in results: ...

A thread that waits for a device lets the others hash; so with more threads than cores both are busy, whatever the
ratio of the two is. Memory is one window per thread, taken from a pool that lives as long as the work.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]
Piece = TypeVar("Piece")
Result = TypeVar("Result")


def in_order(
    work: Callable[[Piece, Bytes], Result], pieces: Iterable[Piece], window_bytes: int, threads: int
) -> Generator[Result]:
    """`work(piece, memory)` of every piece, in their order; `memory` is u8[window_bytes] at a page's begin.

    It is the call's own until that returns. The pieces are asked for in the caller's thread, at most `threads` ahead of
    the one whose result is taken. What `work` raises comes out in its piece's place. Closed early, or after an error,
    no call is running any more: close it (`contextlib.closing`) before what `work` uses.
    """
    free: deque[Bytes] = deque()

    def run(piece: Piece) -> Result:
        try:
            memory = free.pop()
        except IndexError:
            memory = aligned(window_bytes)
        try:
            return work(piece, memory)
        finally:
            free.append(memory)

    with ThreadPoolExecutor(threads, "window") as pool:
        running: deque[Future[Result]] = deque()
        try:
            for piece in pieces:
                running.append(pool.submit(run, piece))
                if len(running) > threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


def aligned(size_bytes: int) -> Bytes:
    """Memory that begins at a page, as direct I/O wants it; zeros."""
    return np.frombuffer(mmap.mmap(-1, max(size_bytes, 1)), np.uint8)[:size_bytes]
