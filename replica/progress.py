"""How long work reports itself: a callback with bytes done and bytes in total."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called now and then with (bytes done, bytes total), from the thread that does the work."""


def silent(_done: int, _total: int) -> None:
    """The progress nobody watches."""
