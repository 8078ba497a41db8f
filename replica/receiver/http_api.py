"""The HTTP side of a site: requests in, documents, problems and bytes out.

Every handler does the same: parse what came (ids, numbers), ask the `Session`
of the client's identity whether it may, and only then read a body, bounded;
call the session in a worker thread, encode the answer. Decisions are the
session's; nothing here knows a replica. Whatever
fails is answered as `application/problem+json` and logged as one line.

See docs/PROTOCOL.md and docs/openapi.json for what the requests mean.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Hashable
from contextlib import AsyncExitStack, suppress
from typing import ParamSpec, TypeVar
from uuid import UUID

import msgspec
from aiohttp import web

from replica.errors import ForbiddenError, ProtocolError, ReplicaError, TransportError
from replica.model import DeltaId, DiskId, Epoch, Frozen, ReplicaId
from replica.receiver.bodies import AnswerBudget, BodyBudget, TooManyBodiesError, length_of, read_body, send
from replica.receiver.reading import DiskReading
from replica.receiver.session import Session
from replica.receiver.site import Site
from replica.receiver.slot import Job
from replica.receiver.workers import Workers
from replica.transport import wire
from replica.transport.tls import identity_of

log = logging.getLogger(__name__)

WORKERS = 16
ANSWER_BYTES = 2 << 20
"""What a large answer counts as: `MAX_TREE_NODES` of a tree, 32 bytes each. Digests of grains are fewer, and how many
points and replicas there are to list is the receiver's own affair."""
_WAIT = re.compile(r"(?:^|,)\s*wait\s*=\s*\"?(\d{1,6})\"?\s*(?:;|,|$)", re.IGNORECASE)

P = ParamSpec("P")
T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class HttpApi:
    """Handlers over one site. `application()` is what aiohttp serves; `close` ends the worker threads."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._budget = BodyBudget()
        self._answers = AnswerBudget()
        self._call = Workers(WORKERS)
        self._reading = DiskReading(self._call)

    def application(self) -> web.Application:
        app = web.Application(middlewares=[self._answer])
        replica, delta = "/v1/replicas/{replica}", "/v1/replicas/{replica}/deltas/{delta}"
        app.router.add_get("/v1/replicas", self._replicas, allow_head=False)
        app.router.add_get(replica, self._replica, allow_head=False)
        app.router.add_put(replica, self._enrol)
        app.router.add_post(f"{replica}/adopt", self._adopt)
        app.router.add_put(delta, self._begin)
        app.router.add_delete(delta, self._discard)
        app.router.add_put(f"{delta}/segments/{{number}}", self._segments)
        app.router.add_post(f"{delta}/commit", self._commit)
        app.router.add_get(f"{replica}/points", self._points, allow_head=False)
        app.router.add_get(f"{replica}/points/{{point}}/disks/{{disk}}", self._disk, allow_head=False)
        app.router.add_get(f"{replica}/points/{{point}}/receipt", self._receipt, allow_head=False)
        app.router.add_get(f"{replica}/disks/{{disk}}/tree", self._tree, allow_head=False)
        app.router.add_put(f"{replica}/disks/{{disk}}/leaves/{{number}}", self._leaves)
        app.router.add_post(f"{replica}/disks/{{disk}}/tree", self._nodes)
        app.router.add_post(f"{replica}/disks/{{disk}}/grains", self._grains)
        app.on_response_prepare.append(_plain_server_name)
        return app

    def close(self) -> None:
        self._call.close()

    # --- replicas ---

    async def _replicas(self, request: web.Request) -> web.StreamResponse:
        session, machine = self._session(request), request.query.get("machine", "")
        return await self._large(request, session, f"list of {session.identity}", _document, session.replicas, machine)

    async def _replica(self, request: web.Request) -> web.Response:
        replica_id = _replica_id(request)
        session = self._session(request)
        return _document(await self._call.on(session.identity, replica_id, session.replica, replica_id))

    async def _enrol(self, request: web.Request) -> web.Response:
        session, replica_id = self._session(request), _replica_id(request)
        session.check_allowed()
        enrol = await _read_document(request, wire.Enrol)
        return _document(await self._call.on(session.identity, replica_id, session.enrol, replica_id, enrol))

    async def _adopt(self, request: web.Request) -> web.Response:
        session, replica_id = await self._admitted(request)
        adopt = await _read_document(request, wire.Adopt)
        return _document(await self._call.on(session.identity, replica_id, session.adopt, replica_id, adopt))

    # --- deltas ---

    async def _begin(self, request: web.Request) -> web.Response:
        delta_id = _delta_id(request)
        session, replica_id = await self._admitted(request)
        begin = await _read_document(request, wire.Begin)
        return _document(await self._call.on(session.identity, replica_id, session.begin, replica_id, delta_id, begin))

    async def _discard(self, request: web.Request) -> web.Response:
        session, replica_id = self._session(request), _replica_id(request)
        await self._call.on(session.identity, replica_id, session.discard, replica_id, _delta_id(request))
        return web.Response(status=204)

    async def _segments(self, request: web.Request) -> web.Response:
        delta_id, number = _delta_id(request), _number(request.match_info["number"], "segment")
        length = length_of(request, wire.MAX_BODY_BYTES)
        session, replica_id = await self._admitted(request)
        async with self._budget.hold(session.identity, length):
            body = await read_body(request, length)
            await self._call.on(
                session.identity, replica_id, _store_segments, session, (replica_id, delta_id), number, body
            )
        return web.Response(status=204)

    async def _commit(self, request: web.Request) -> web.Response:
        delta_id = _delta_id(request)
        length = length_of(request, wire.MAX_TAIL_BYTES + wire.FRAME.size)
        session, replica_id = await self._admitted(request)
        async with self._budget.hold(session.identity, length):
            body = await read_body(request, length)
            job = await self._call.on(session.identity, replica_id, _start_commit, session, replica_id, delta_id, body)
            del body
        if not await _settled(job, preferred_wait(request.headers.get("Prefer", ""))):
            return web.Response(status=202)
        return _document(await self._call.on(session.identity, replica_id, session.outcome, replica_id, job))

    # --- reading ---

    async def _points(self, request: web.Request) -> web.StreamResponse:
        replica_id = _replica_id(request)
        session = self._session(request)
        return await self._large(request, session, replica_id, _document, session.points, replica_id)

    async def _disk(self, request: web.Request) -> web.StreamResponse:
        point = _number(request.match_info["point"], "point")
        return await self._reading.answer(request, self._session(request), _replica_id(request), point)

    async def _receipt(self, request: web.Request) -> web.Response:
        replica_id, point = _replica_id(request), _number(request.match_info["point"], "point")
        session = self._session(request)
        data = await self._call.on(session.identity, replica_id, session.receipt, replica_id, point)
        return web.Response(body=data, content_type="application/octet-stream")

    async def _tree(self, request: web.Request) -> web.StreamResponse:
        disk_id = DiskId(_uuid(request, "disk"))
        level, first, count = (_number(request.query.get(name, ""), name) for name in ("level", "first", "count"))
        arguments = (_replica_id(request), disk_id, level, first, count)
        session = self._session(request)
        return await self._large(request, session, arguments[0], _octets, session.tree, *arguments)

    async def _nodes(self, request: web.Request) -> web.StreamResponse:
        disk_id = DiskId(_uuid(request, "disk"))
        session, replica_id = await self._admitted(request)
        query = await _read_document(request, wire.TreeQuery)
        return await self._large(request, session, replica_id, _octets, session.nodes, replica_id, disk_id, query)

    async def _grains(self, request: web.Request) -> web.StreamResponse:
        disk_id = DiskId(_uuid(request, "disk"))
        session, replica_id = await self._admitted(request)
        query = await _read_document(request, wire.GrainQuery)
        return await self._large(request, session, replica_id, _octets, session.grains, replica_id, disk_id, query)

    async def _leaves(self, request: web.Request) -> web.Response:
        disk_id, first = DiskId(_uuid(request, "disk")), _number(request.match_info["number"], "leaf")
        length = length_of(request, wire.MAX_BODY_BYTES)
        session, replica_id = await self._admitted(request)
        epoch = _epoch(request)
        async with self._budget.hold(session.identity, length):
            body = await read_body(request, length)
            where = (replica_id, disk_id)
            left = await self._call.on(session.identity, replica_id, _repair, session, where, first, epoch, body)
            return _document(left)

    # --- around every request ---

    def _session(self, request: web.Request) -> Session:
        transport = request.transport
        return self._site.session(identity_of(transport.get_extra_info("peercert") if transport else None))

    async def _admitted(self, request: web.Request) -> tuple[Session, ReplicaId]:
        """The session, and the replica that is its own: asked before a byte of a body is read."""
        session, replica_id = self._session(request), _replica_id(request)
        session.check_allowed()
        await self._call.on(session.identity, replica_id, session.check_owned, replica_id)
        return session, replica_id

    async def _large(
        self,
        request: web.Request,
        session: Session,
        replica: Hashable,
        encode: Callable[[T], web.Response],
        function: Callable[P, T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> web.StreamResponse:
        """Answer with what may be large: from before it is made until the client has taken it, it has its room.

        Two of one replica at a time wait for room or for the answer: one that hangs holds no more of its identity's
        room. And who waits for room keeps no small request to that replica waiting.
        """
        session.check_allowed()
        async with AsyncExitStack() as room:
            async with self._call.turn(replica, "large"):
                await room.enter_async_context(self._answers.hold(session.identity, ANSWER_BYTES))
                answer = encode(await self._call.on(session.identity, replica, function, *args, **kwargs))
            return await send(request, answer)

    @web.middleware
    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        return await send(request, await self._handled(request, handler))

    async def _handled(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Turn every failure into a problem document and a line in the log."""
        try:
            return await handler(request)
        except TooManyBodiesError as error:
            log.warning("%s %s by %s: %s", request.method, request.raw_path, _who(request), error)
            answer = _problem(error)
            answer.force_close()
            return answer
        except ReplicaError as error:
            level = logging.WARNING if isinstance(error, ForbiddenError) or error.status >= 500 else logging.INFO
            log.log(level, "%s %s by %s: %s", request.method, request.raw_path, _who(request), error)
            return _problem(error)
        except web.HTTPException as error:
            answer = _problem(ProtocolError(f"{request.method} {request.raw_path}: {error.reason}"), error.status)
            if "Allow" in error.headers:
                answer.headers["Allow"] = error.headers["Allow"]
            return answer
        except ConnectionError:
            log.info(
                "%s %s by %s: the connection was lost in the middle of it",
                request.method,
                request.raw_path,
                _who(request),
            )
            return _problem(TransportError("the connection was lost"))  # there is nobody left to read it
        except Exception:
            log.exception("%s %s by %s failed", request.method, request.raw_path, _who(request))
            return _problem(ReplicaError("the receiver failed at this request", hint="its log says why"))


def preferred_wait(prefer: str) -> int:
    """Seconds of `Prefer: wait=N` (RFC 7240 §4.3), 0 without it, at most `MAX_WAIT_SECONDS`."""
    match = _WAIT.search(prefer)
    return min(int(match[1]), wire.MAX_WAIT_SECONDS) if match else 0


async def _read_document(request: web.Request, kind: type[T]) -> T:
    body = await read_body(request, length_of(request, wire.MAX_DOCUMENT_BYTES))
    return wire.decode(body, kind, "the request")


def _store_segments(session: Session, where: tuple[ReplicaId, DeltaId], first: int, body: bytearray) -> None:
    session.put_frames(*where, wire.decode_segments(body, first))


def _start_commit(session: Session, replica_id: ReplicaId, delta_id: DeltaId, body: bytearray) -> Job:
    frame = wire.decode_tail(body)
    return session.start_commit(replica_id, delta_id, bytes(frame.blob), frame.offset)


def _repair(
    session: Session, where: tuple[ReplicaId, DiskId], first: int, epoch: Epoch, body: bytearray
) -> wire.StillDamaged:
    frames = wire.decode_segments(body, first)
    if len(frames) != 1:
        raise ProtocolError(f"{len(frames)} frames of leaves; one request has one")
    return session.repair_leaves(*where, epoch, frames[0])


async def _settled(job: Job, seconds: float) -> bool:
    """Whether the job is done within that time."""
    loop, event = asyncio.get_running_loop(), asyncio.Event()

    def wake(_done: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(event.set)

    job.done.add_done_callback(wake)
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return job.done.done()


def _uuid(request: web.Request, name: str) -> UUID:
    text = request.match_info[name]
    with suppress(ValueError):
        if str(value := UUID(text)) == text:
            return value
    raise ProtocolError(f"{name} {text[:64]!r} is not an id", hint="write it as 8-4-4-4-12 lower-case hex digits")


def _replica_id(request: web.Request) -> ReplicaId:
    return ReplicaId(_uuid(request, "replica"))


def _delta_id(request: web.Request) -> DeltaId:
    return DeltaId(_uuid(request, "delta"))


def _epoch(request: web.Request) -> Epoch:
    counter, holder = _number(request.query.get("epoch", ""), "epoch"), request.query.get("holder", "")
    with suppress(ValueError):
        if str(value := UUID(holder)) == holder:
            return Epoch(counter, value)
    raise ProtocolError(f"holder {holder[:64]!r} is not an id", hint="write it as 8-4-4-4-12 lower-case hex digits")


def _number(text: str, what: str) -> int:
    if not re.fullmatch(r"[0-9]{1,15}", text):
        raise ProtocolError(f"{what} {text[:64]!r} is not a number")
    return int(text)


def _document(value: Frozen | list[wire.ReplicaInfo] | list[wire.PointSummary]) -> web.Response:
    return web.Response(body=wire.encode(value), content_type=wire.DOCUMENT_TYPE)


def _octets(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/octet-stream")


def _problem(error: ReplicaError, status: int | None = None) -> web.Response:
    problem = wire.to_problem(error)
    if status is not None:
        problem = msgspec.structs.replace(problem, status=status)
    return web.Response(status=problem.status, body=wire.encode(problem), content_type=wire.PROBLEM_TYPE)


def _who(request: web.Request) -> str:
    try:
        return identity_of(request.transport.get_extra_info("peercert") if request.transport else None)
    except ForbiddenError:
        return "nobody known"


async def _plain_server_name(_request: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = "replica"
