"""Worker threads for an event loop: what may block runs here, a bounded number at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Workers:
    """A pool of threads that is awaited: `await workers(function, argument)`."""

    def __init__(self, count: int) -> None:
        self._pool = ThreadPoolExecutor(count, "request")

    async def __call__(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, partial(function, *args, **kwargs))

    def close(self) -> None:
        """Take no more; what runs goes on to its end."""
        self._pool.shutdown(wait=False, cancel_futures=True)
