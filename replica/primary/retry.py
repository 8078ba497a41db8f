"""Patience with a link that breaks: back-off, bounded, and interruptible."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from replica.errors import BusyError, ReplicaError, TransportError

FIRST_DELAY_SECONDS = 0.2
LAST_DELAY_SECONDS = 5.0

T = TypeVar("T")


class Stopped(Exception):
    """The work was asked to stop, and did. Not an error: whoever wanted it to stop gets this."""


class Patience:
    """How long failures in a row are put up with. For one thread at a time.

    `retry_seconds` count from the first failure after a success.
    """

    def __init__(
        self,
        retry_seconds: float,
        stop: threading.Event | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._retry_seconds = retry_seconds
        self._stop = stop or threading.Event()
        self._clock = clock
        self._since: float | None = None
        self._delay = FIRST_DELAY_SECONDS

    def succeeded(self) -> None:
        self._since, self._delay = None, FIRST_DELAY_SECONDS

    def failed(self, error: ReplicaError) -> None:
        """Wait before the next attempt; raise `error` when it has lasted too long."""
        now = self._clock()
        self._since = self._since if self._since is not None else now
        if now - self._since + self._delay > self._retry_seconds:
            raise error
        self.pause(self._delay)
        self._delay = min(2 * self._delay, LAST_DELAY_SECONDS)

    def pause(self, seconds: float) -> None:
        """Sleep; raise Stopped as soon as that is asked for."""
        if self._stop.wait(seconds):
            raise Stopped

    def check(self) -> None:
        """Raise Stopped if that was asked for."""
        if self._stop.is_set():
            raise Stopped

    def call(self, function: Callable[[], T]) -> T:
        """Call until it succeeds; a broken link and a busy other side are waited for."""
        while True:
            try:
                result = function()
            except (TransportError, BusyError) as error:
                self.failed(error)
            else:
                self.succeeded()
                return result
