"""A disk at a point over HTTP: `GET …/points/{point}/disks/{disk}`, whole or one range of it.

The point is pinned while its bytes go out, 1 MiB at a time, each piece read in
a worker thread when the client has taken the one before. A client that stops
taking is cut off after `STALL_SECONDS`, for its pin holds up rotation; and so
is one whose point turns out damaged half way: a cut connection cannot be taken
for the end of the disk, because the length was announced. A pin is on the
reader's own replica; the places for readers are everybody's, so one identity
has at most half of them.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import web

from replica.errors import BusyError, ProtocolError, ReplicaError
from replica.model import Disk, ReplicaId
from replica.receiver.session import Session, find_disk, read_pieces
from replica.receiver.stores import OpenPoint
from replica.receiver.workers import Workers

log = logging.getLogger(__name__)

MAX_READERS = 8
MAX_OF_IDENTITY = 4
"""However slowly one identity reads, the other half is there for others."""
STALL_SECONDS = 60.0
_RANGE = re.compile(r"bytes=([0-9]{0,19})-([0-9]{0,19})")


class RangeError(ProtocolError):
    """A range that is not in the disk."""

    status = 416


class DiskReading:
    """Answers reading requests, a bounded number at a time. For one event loop."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._readers: Counter[str] = Counter()

    async def answer(
        self, request: web.Request, session: Session, replica_id: ReplicaId, point: int
    ) -> web.StreamResponse:
        with self._place(session):
            opened = await self._workers.on(session.identity, replica_id, session.open_point, replica_id, point)
            try:
                disk = find_disk(opened.state, request.match_info["disk"])
                start, stop, partial = parse_range(request.headers.get("Range"), disk.size_bytes)
                response = web.StreamResponse(status=206 if partial else 200)
                response.content_type = "application/octet-stream"
                response.content_length = stop - start
                response.headers["Accept-Ranges"] = "bytes"
                if partial:
                    response.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{disk.size_bytes}"
                await response.prepare(request)
                await self._send(request, response, session.identity, replica_id, opened, disk, start, stop)
                return response
            finally:
                await self._workers(opened.__exit__, None, None, None)

    @contextmanager
    def _place(self, session: Session) -> Iterator[None]:
        """One of the places for readers. BusyError if there is none; ForbiddenError for who is not let in."""
        session.check_allowed()
        if self._readers.total() >= MAX_READERS:
            raise BusyError(f"{MAX_READERS} points are being read at the moment", hint="try again later")
        if self._readers[session.identity] >= MAX_OF_IDENTITY:
            raise BusyError(
                f"{session.identity!r} reads {MAX_OF_IDENTITY} points at the moment", hint="end one, or try again later"
            )
        self._readers[session.identity] += 1
        try:
            yield
        finally:
            self._readers[session.identity] -= 1
            if not self._readers[session.identity]:
                del self._readers[session.identity]

    async def _send(
        self,
        request: web.Request,
        response: web.StreamResponse,
        identity: str,
        replica_id: ReplicaId,
        point: OpenPoint,
        disk: Disk,
        start: int,
        stop: int,
    ) -> None:
        pieces = read_pieces(point, disk, start, stop)
        try:
            while (piece := await self._workers.on(identity, replica_id, next, pieces, b"")) != b"":
                async with asyncio.timeout(STALL_SECONDS):
                    await response.write(piece)
        except (ReplicaError, TimeoutError) as error:
            log.warning("%s was cut off: %s", request.raw_path, error or f"nothing was taken for {STALL_SECONDS:.0f} s")
            if request.transport is not None:
                request.transport.abort()


def parse_range(header: str | None, size_bytes: int) -> tuple[int, int, bool]:
    """(start, stop, whether it is a part) of RFC 9110 §14.1.2's byte range; one range only.

    Raises RangeError (416) for one that does not start inside the disk or has another form.
    """
    if header is None:
        return 0, size_bytes, False
    match = _RANGE.fullmatch(header.strip())
    if match is None or not (match[1] or match[2]):
        raise RangeError(f"Range {header[:64]!r} is not one range of bytes")
    if match[1]:
        start = int(match[1])
        stop = min(int(match[2]) + 1, size_bytes) if match[2] else size_bytes
    else:
        start, stop = max(0, size_bytes - int(match[2])), size_bytes
    if not start < stop:
        raise RangeError(f"Range {header[:64]!r} is not inside the disk's {size_bytes} bytes")
    return start, stop, True
