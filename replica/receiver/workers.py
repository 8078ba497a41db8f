"""Worker threads for an event loop: what may block runs here, a bounded number at a time.

Work on one replica has at most `SHARE` threads at a time, so that a replica
whose storage hangs leaves the others theirs, and work for one identity at most
`IDENTITY_SHARE`, however many replicas it has. Who finds them taken waits in
the event loop, where waiting costs nothing, and after `TURN_SECONDS` is told
that the replica, or the receiver, is busy. The replica's turn comes first: who
waits for a replica that hangs takes nothing from the identity's others.

The threads are daemons: one that never comes back (a dead network file system)
does not keep the process from ending.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Hashable
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from queue import SimpleQueue
from typing import ParamSpec, TypeVar

from replica.errors import BusyError

P = ParamSpec("P")
T = TypeVar("T")

SHARE = 2
IDENTITY_SHARE = 8
TURN_SECONDS = 20.0


class Workers:
    """A pool of daemon threads that is awaited: `await workers(function, argument)`. For one event loop."""

    def __init__(self, count: int, name: str = "request") -> None:
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._count = count
        self._turns: dict[Hashable, tuple[asyncio.Semaphore, int]] = {}
        for number in range(count):
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True).start()

    async def __call__(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        done: Future[T] = Future()
        self._tasks.put(partial(_run, done, partial(function, *args, **kwargs)))
        return await asyncio.wrap_future(done)

    async def on(
        self, identity: str, replica: Hashable, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """The same for `identity`'s work on `replica`, within both shares. BusyError if one stays taken."""
        of_identity = f"the receiver is busy: {IDENTITY_SHARE} requests of {identity!r} are at work and do not end"
        async with self.turn(replica), self._turn(("identity", identity), IDENTITY_SHARE, of_identity):
            return await self(function, *args, **kwargs)

    def turn(self, replica: Hashable, kind: str = "") -> AbstractAsyncContextManager[None]:
        """One of `SHARE` places for requests of that kind that are at work on a replica."""
        busy = f"replica {replica} is busy: {SHARE} requests are at work on it and do not end"
        return self._turn((kind, replica), SHARE, busy)

    @asynccontextmanager
    async def _turn(self, key: Hashable, share: int, busy: str) -> AsyncIterator[None]:
        turns, users = self._turns.get(key, (asyncio.Semaphore(share), 0))
        self._turns[key] = (turns, users + 1)
        try:
            try:
                async with asyncio.timeout(TURN_SECONDS):
                    await turns.acquire()
            except TimeoutError:
                raise BusyError(
                    busy, hint="it is tried again by itself; if that stays, look at the receiver's storage"
                ) from None
            try:
                yield
            finally:
                turns.release()
        finally:
            turns, users = self._turns.pop(key)
            if users > 1:
                self._turns[key] = (turns, users - 1)

    def close(self) -> None:
        """Take no more; what runs goes on to its end, or to the process's."""
        for _ in range(self._count):
            self._tasks.put(None)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
            del task


def _run(done: Future[T], call: Callable[[], T]) -> None:
    if not done.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as error:  # noqa: BLE001  # handed to whoever waits
        done.set_exception(error)
    else:
        done.set_result(result)
