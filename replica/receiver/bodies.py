"""Request bodies in bounded memory and bounded time.

A body is read only when its declared length is within the limit of its kind
and there is room for it: `BodyBudget` counts the bytes of all bodies in memory.
Whoever must wait has at most a socket's buffers full of data here; TCP makes
its sender wait. One identity holds at most half of the budget, so that a
primary that sends at a snail's pace cannot shut the others out.

Time: a body has to go on within `IDLE_SECONDS` and be there at `MIN_RATE` bytes
a second at the latest. (Headers: the server closes a connection that has not
brought a whole request head within its keep-alive time.)
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from replica.errors import BusyError, ProtocolError, TransportError

BUDGET_BYTES = 64 << 20
ROOM_SECONDS = 30.0
IDLE_SECONDS = 30.0
GRACE_SECONDS = 30.0
MIN_RATE = 16 << 10


class LengthRequiredError(ProtocolError):
    """A body without Content-Length."""

    status = 411


class TooLargeError(ProtocolError):
    """A body larger than its kind may be."""

    status = 413


class EncodedError(ProtocolError):
    """A body with a Content-Encoding: what has to be decoded has no bounded size."""

    status = 415


class BodyBudget:
    """Bytes of bodies in memory. First come, first served, but for those who hold their share. One event loop."""

    def __init__(self, total_bytes: int = BUDGET_BYTES) -> None:
        self.total_bytes = total_bytes
        self.free_bytes = total_bytes
        self._held: Counter[str] = Counter()
        self._waiting: deque[tuple[str, int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def hold(self, identity: str, count_bytes: int) -> AsyncIterator[None]:
        """Room for a body; BusyError if there is none for `ROOM_SECONDS`. One that is larger than all takes all."""
        count = min(count_bytes, self.total_bytes)
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (identity, count, granted)
        self._waiting.append(entry)
        self._grant()
        try:
            await self._granted(granted)
            yield
        finally:
            if entry in self._waiting:
                self._waiting.remove(entry)
            else:
                self.free_bytes += count
                self._held[identity] -= count
                if not self._held[identity]:
                    del self._held[identity]
            self._grant()

    async def _granted(self, granted: asyncio.Future[None]) -> None:
        try:
            async with asyncio.timeout(ROOM_SECONDS):
                await asyncio.shield(granted)
        except TimeoutError:
            raise BusyError("the receiver has its hands full", hint="it is tried again by itself") from None

    def _grant(self) -> None:
        for entry in list(self._waiting):
            identity, count, granted = entry
            held = self._held.get(identity, 0)
            if held and held + count > self.total_bytes // 2:
                continue
            if count > self.free_bytes:
                return
            self.free_bytes -= count
            self._held[identity] += count
            self._waiting.remove(entry)
            granted.set_result(None)


def length_of(request: web.Request, limit_bytes: int) -> int:
    """The declared length of a body, checked before a byte of it is read."""
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise EncodedError("a request body must not have a Content-Encoding")
    length = request.content_length
    if length is None:
        raise LengthRequiredError("a request body needs a Content-Length")
    if length > limit_bytes:
        raise TooLargeError(f"a body of {length} bytes; this kind may have {limit_bytes}")
    return length


async def read_body(request: web.Request, length: int) -> bytearray:
    """Exactly `length` bytes. TransportError if they come too slowly or not at all."""
    body = bytearray(length)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + GRACE_SECONDS + length / MIN_RATE
    done = 0
    try:
        async with asyncio.timeout(IDLE_SECONDS) as limit:
            while done < length:
                piece = await request.content.readany()
                if not piece:
                    break
                body[done : done + len(piece)] = piece
                done += len(piece)
                limit.reschedule(min(loop.time() + IDLE_SECONDS, deadline))
    except TimeoutError as error:
        raise TransportError(f"a body of {length} bytes came too slowly: {done} were here in time") from error
    if done != length or len(body) != length:
        raise TransportError(f"a body ended after {done} of {length} bytes")
    return body
