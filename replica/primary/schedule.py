"""When a machine's next cycle is due: pure arithmetic on a clock that never goes back.

Cycles start on a grid of `every` seconds from the first one. A cycle that takes
longer than `every` makes the slots it covered be missed, not be made up for. A
cycle that failed is tried again after 1 s, 2 s, 4 s … but at the latest after
`every`, or five minutes where `every` is longer; that is off the grid, and the
first success returns to it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

FIRST_RETRY_SECONDS = 1.0
LONGEST_RETRY_SECONDS = 300.0


@dataclass(frozen=True)
class Schedule:
    """One machine's timetable. `origin`, `due`: seconds on the caller's clock; `failures`: in a row."""

    every_seconds: float
    origin: float
    due: float
    failures: int = 0

    @classmethod
    def starting(cls, every_seconds: float, now: float) -> Schedule:
        """Due at once."""
        return cls(every_seconds, now, now)

    def succeeded(self, now: float) -> Schedule:
        """The first slot of the grid after `now`."""
        slots = int((now - self.origin) // self.every_seconds) + 1
        return replace(self, due=self.origin + slots * self.every_seconds, failures=0)

    def failed(self, now: float) -> Schedule:
        """After the back-off; it does not grow over the longest one."""
        longest = min(self.every_seconds, LONGEST_RETRY_SECONDS)
        delay = min(FIRST_RETRY_SECONDS * 2.0 ** min(self.failures, 30), longest)
        return replace(self, due=now + delay, failures=self.failures + 1)
