"""How a long verification behaves towards others: not faster than told, behind everybody else at the disk, resumable.

    pace = Pace(bytes_per_second=100 << 20, save=…)
    pace.take(4 << 20)        # after every piece that was read: waits as long as it must, and saves now and then

Thread-safe no; one verification has one pace.
"""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Callable

SAVE_SECONDS = 5.0
"""What a kill costs at most."""
AHEAD_SECONDS = 0.5
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_WHO_PROCESS, _CLASS_IDLE = 1, 3 << 13


class Pace:
    """`bytes_per_second` None: as fast as it goes. `take` calls `save` every few seconds, and `wait` each time."""

    def __init__(
        self,
        bytes_per_second: float | None = None,
        save: Callable[[], None] = lambda: None,
        *,
        wait: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._rate = bytes_per_second
        self.save = save
        self._wait = wait
        self._clock, self._sleep = clock, sleep
        self._due = self._saved = clock()

    def ahead(self, piece_bytes: int, most: int) -> int:
        """How many pieces may be on their way at once: 1 to `most`, under a rate no more than a moment's worth."""
        if self._rate is None:
            return most
        return max(1, min(most, int(self._rate * AHEAD_SECONDS / piece_bytes)))

    def take(self, count_bytes: int) -> None:
        """So many bytes were read. What was not used in the past is not made up for in one burst."""
        self._wait()
        now = self._clock()
        if self._rate is not None:
            self._due = max(self._due, now) + count_bytes / self._rate
            if self._due > now:
                self._sleep(self._due - now)
        if self._clock() - self._saved >= SAVE_SECONDS:
            self.save()
            self._saved = self._clock()


def be_idle() -> None:
    """Let this thread's disk I/O wait for everybody else's, where the scheduler knows that (ioprio_set(2)).

    Best effort: a system that does not let us is none the worse for it.
    """
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None and os.name == "posix":
        ctypes.CDLL(None).syscall(number, _WHO_PROCESS, 0, _CLASS_IDLE)
