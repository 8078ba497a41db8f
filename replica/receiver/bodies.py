"""Request bodies in bounded memory and bounded time.

A body is read only when its sender may send it, its declared length is within
the limit of its kind and there is room for it: `BodyBudget` counts the bytes
of all bodies in memory. Whoever must wait has at most a socket's buffers full
of data here; TCP makes its sender wait. What bounds one identity:

* it holds at most half of the budget, so that a primary that sends at a
  snail's pace cannot shut the others out;
* it has at most `MAX_BODIES` bodies, read and waiting, so that what stands in
  the buffers of waiting connections stays small.

Whoever does not fit is passed by; who has waited for `AGE_SECONDS` is passed
by no more, so that small bodies do not starve a large one.

Large answers have a budget of their own, with the same halves: whoever asks for much and does not read it holds room
that is counted as its own. As many may wait for it as like: a request without a body costs nothing.

Time: a body has to go on within `IDLE_SECONDS` and be there at `MIN_RATE` bytes
a second at the latest. (Headers: the server closes a connection that has not
brought a whole request head within its keep-alive time.) An answer has to be taken as fast (`send`).
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiohttp import web

from replica.errors import BusyError, ProtocolError, TransportError

log = logging.getLogger(__name__)

BUDGET_BYTES = 64 << 20
MAX_BODIES = 16
"""Of one identity at a time. A sender has one for each machine at work, and `parallel` is at most this."""
ROOM_SECONDS = 30.0
AGE_SECONDS = 5.0
IDLE_SECONDS = 30.0
GRACE_SECONDS = 30.0
MIN_RATE = 16 << 10
PIECE_BYTES = 64 << 10


class LengthRequiredError(ProtocolError):
    """A body without Content-Length."""

    status = 411


class TooLargeError(ProtocolError):
    """A body larger than its kind may be."""

    status = 413


class EncodedError(ProtocolError):
    """A body with a Content-Encoding: what has to be decoded has no bounded size."""

    status = 415


class TooManyBodiesError(TransportError):
    """An identity that sends more bodies at a time than it may: told so, and its connection closed."""


@dataclass(eq=False, slots=True)
class _Place:
    """A body's place in the queue, and then in memory."""

    identity: str
    count_bytes: int
    since_seconds: float
    granted: asyncio.Future[None]


class BodyBudget:
    """Bytes of bodies in memory: first come, first served, within each identity's share. One event loop."""

    max_bodies: float = MAX_BODIES
    """Of one identity at a time, those that wait included."""

    def __init__(self, total_bytes: int = BUDGET_BYTES) -> None:
        self.total_bytes = total_bytes
        self.free_bytes = total_bytes
        self._held: Counter[str] = Counter()
        self._bodies: Counter[str] = Counter()
        self._waiting: list[_Place] = []

    @asynccontextmanager
    async def hold(self, identity: str, count_bytes: int) -> AsyncIterator[None]:
        """Room for a body. One that is larger than an identity's share counts as that share.

        Raises TooManyBodiesError at once, BusyError if there is no room for `ROOM_SECONDS`.
        """
        if self._bodies[identity] >= self.max_bodies:
            raise TooManyBodiesError(
                f"{identity!r} sends more than {self.max_bodies} bodies at a time", hint="it is tried again by itself"
            )
        loop = asyncio.get_running_loop()
        count = min(count_bytes, self.total_bytes // 2)
        place = _Place(identity, count, loop.time(), loop.create_future())
        self._bodies[identity] += 1
        self._waiting.append(place)
        self._grant()
        try:
            await self._granted(place.granted)
            yield
        finally:
            _less(self._bodies, identity, 1)
            if place in self._waiting:
                self._waiting.remove(place)
            else:
                self.free_bytes += count
                _less(self._held, identity, count)
            self._grant()

    async def _granted(self, granted: asyncio.Future[None]) -> None:
        try:
            async with asyncio.timeout(ROOM_SECONDS):
                await asyncio.shield(granted)
        except TimeoutError:
            raise BusyError("the receiver has its hands full", hint="it is tried again by itself") from None

    def _grant(self) -> None:
        """Let in whoever fits, oldest first; nobody passes one that has waited long and may have its share."""
        aged = asyncio.get_running_loop().time() - AGE_SECONDS
        for place in list(self._waiting):
            if self._held[place.identity] + place.count_bytes > self.total_bytes // 2:
                continue
            if place.count_bytes > self.free_bytes:
                if place.since_seconds <= aged:
                    return
                continue
            self.free_bytes -= place.count_bytes
            self._held[place.identity] += place.count_bytes
            self._waiting.remove(place)
            place.granted.set_result(None)


class AnswerBudget(BodyBudget):
    """The same for large answers; any number may wait."""

    max_bodies = math.inf


def _less(counter: Counter[str], identity: str, count: int) -> None:
    counter[identity] -= count
    if not counter[identity]:
        del counter[identity]


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
    """Exactly `length` bytes, in memory that grows with what arrives.

    Raises TransportError if they come too slowly or not at all.
    """
    body = bytearray()
    loop = asyncio.get_running_loop()
    deadline = loop.time() + GRACE_SECONDS + length / MIN_RATE
    try:
        async with asyncio.timeout(IDLE_SECONDS) as limit:
            while len(body) < length:
                piece = await request.content.readany()
                if not piece:
                    break
                body += piece
                limit.reschedule(min(loop.time() + IDLE_SECONDS, deadline))
    except TimeoutError as error:
        raise TransportError(f"a body of {length} bytes came too slowly: {len(body)} were here in time") from error
    if len(body) != length:
        raise TransportError(f"a body ended after {len(body)} of {length} bytes")
    return body


async def send(request: web.Request, answer: web.StreamResponse) -> web.StreamResponse:
    """Give the answer out, or the rest of one that was begun; who does not take it in time is cut off.

    In time is what `read_body` gives a body of that length. Does not raise when the connection is lost.
    """
    body = answer.body if isinstance(answer, web.Response) and isinstance(answer.body, bytes) else b""
    if len(body) > PIECE_BYTES:
        answer = web.StreamResponse(status=answer.status, headers=answer.headers)
        answer.content_length = len(body)
    try:
        async with asyncio.timeout(GRACE_SECONDS + len(body) / MIN_RATE):
            await answer.prepare(request)
            if len(body) > PIECE_BYTES:  # TLS reports back-pressure one write late, however large that was
                for start in range(0, len(body), PIECE_BYTES):
                    await answer.write(body[start : start + PIECE_BYTES])
            await answer.write_eof()
    except TimeoutError:
        log.warning("an answer to %s %s was not taken in time: cut off", request.method, request.raw_path)
        if request.transport is not None:
            request.transport.abort()
    except ConnectionError:
        log.info("%s %s: the connection was lost before its answer was taken", request.method, request.raw_path)
    return answer
