"""Sealing in threads: segments go in and come out in number order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from replica.delta import DeltaSealer, SealedSegment, Segment

SEALING_THREADS = 2
SEALING_SEGMENTS = 3
"""Segments being sealed at once, or sealed and waiting for an earlier one."""


class Sealing:
    """Seals segments in threads and hands them to `put` in order. A context manager; used by one thread."""

    def __init__(self, sealer: DeltaSealer, put: Callable[[SealedSegment], None]) -> None:
        self._sealer, self._put = sealer, put
        self._pool = ThreadPoolExecutor(SEALING_THREADS, "seal")
        self._running: deque[Future[SealedSegment]] = deque()

    def add(self, segment: Segment) -> None:
        """Allot the next number and seal; waits for the oldest if enough are under way."""
        if len(self._running) >= SEALING_SEGMENTS:
            self._put(self._running.popleft().result())
        self._running.append(self._pool.submit(self._sealer.seal, segment, self._sealer.allot()))

    def finish(self) -> None:
        """Hand on all that is under way."""
        while self._running:
            self._put(self._running.popleft().result())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
