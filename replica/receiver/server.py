"""The receiver process: TLS in front of a site, from the first line in the log to an orderly end.

The order at start: certificates read, address bound, replicas found, then
listening; so a wrong certificate or a port in use is told before anything is
touched. Replicas are opened and recovered behind: one that takes long, or whose
storage hangs, is `busy` and stops no other.

At SIGTERM or SIGINT: no more connections, idle ones closed, requests and
commits under way may end within `END_SECONDS` altogether; then the stores are
closed. What hangs is not waited for longer. A second signal ends the process at once. Neither that nor SIGKILL loses
anything: an unfinished commit is redone or undone at the next start.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
from collections.abc import Callable

from aiohttp import web

from replica.durable import FileSystem
from replica.errors import ListenError
from replica.receiver.http_api import HttpApi
from replica.receiver.limits import raise_descriptor_limit, share_arenas
from replica.receiver.listener import Listener
from replica.receiver.site import Site, SiteSpec
from replica.receiver.workers import Workers
from replica.transport.tls import server_context

log = logging.getLogger(__name__)

END_SECONDS = 60.0
LEAST_SECONDS = 2.0
"""What closing the stores is given at least, after requests that took all the time there was."""
FAREWELL_SECONDS = 0.1
KEEP_ALIVE_SECONDS = 75.0
"""How long a connection may stand without a complete request head. Clients give up theirs earlier."""
MAX_LINE_BYTES = 4096
READ_BUFFER_BYTES = 64 << 10

_LISTEN = {
    errno.EADDRINUSE: ("the port is in use", "is a receiver already running? choose another `listen` or stop that one"),
    errno.EACCES: ("that is not allowed", "ports below 1024 need a privilege; choose another `listen`"),
    errno.EADDRNOTAVAIL: ("this host has no such address", "correct `listen`; 0.0.0.0 is every IPv4 address"),
}


def serve(spec: SiteSpec, *, fs: FileSystem | None = None) -> None:
    """Serve until SIGTERM or SIGINT. Raises ConfigError, ListenError or StorageError at start."""
    raise_descriptor_limit()
    share_arenas()
    asyncio.run(_serve_until_signalled(fs or FileSystem(), spec))


async def _serve_until_signalled(fs: FileSystem, spec: SiteSpec) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def signalled(number: signal.Signals) -> None:
        log.info("%s: ending", number.name)
        stop.set()
        for other in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(other)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled, number)
    await serve_until(spec, lambda: Site(fs, spec, wait=False), stop)


async def serve_until(
    spec: SiteSpec,
    open_site: Callable[[], Site],
    stop: asyncio.Event,
    ready: Callable[[str, int], None] | None = None,
) -> None:
    """Serve until `stop` is set. `ready` is told host and port (of port 0: the one that was given)."""
    loop = asyncio.get_running_loop()
    context = server_context(spec.tls)
    aside = Workers(1, "site")
    try:
        listener = Listener(spec.listen_host, spec.listen_port)
    except (OSError, OverflowError, ValueError) as error:
        raise listen_error(spec, error) from error
    try:
        site = await aside(open_site)
        api = HttpApi(site)
        runner = web.AppRunner(
            api.application(),
            access_log=None,
            shutdown_timeout=END_SECONDS,
            keepalive_timeout=KEEP_ALIVE_SECONDS,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_LINE_BYTES,
            read_bufsize=READ_BUFFER_BYTES,
            auto_decompress=False,
        )
        await runner.setup()
        assert runner.server is not None
        try:
            try:
                listener.start(context, runner.server)
            except OSError as error:
                raise listen_error(spec, error) from error
            host, port = listener.address
            log.info("ready: listening on https://%s:%d; %s", host, port, _replicas(site))
            if ready is not None:
                ready(host, port)
            await stop.wait()
        finally:
            deadline = loop.time() + END_SECONDS
            await listener.close()
            await _end_connections(runner, listener, deadline)
            api.close()
            await _close(site, aside, max(LEAST_SECONDS, deadline - loop.time()))
    finally:
        await listener.close()
        aside.close()


def _replicas(site: Site) -> str:
    if site.recovering:
        return f"{len(site)} replicas, {site.recovering} of them still to be recovered"
    return f"{len(site)} replicas, {site.failed} stopped"


async def _close(site: Site, aside: Workers, limit_seconds: float) -> None:
    """Close the stores, and wait for that no longer than a little more than the limit, whatever hangs."""
    try:
        async with asyncio.timeout(limit_seconds + LEAST_SECONDS):
            ended = await aside(site.close, limit_seconds)
        log.info("ended%s", "" if ended else "; something was cut off, the next start finishes it")
    except TimeoutError:
        log.error("ended; a replica's storage does not answer, it was not waited for")


async def _end_connections(runner: web.AppRunner, listener: Listener, deadline: float) -> None:
    """Answer what was asked, then close; at the deadline every connection is cut, whoever still asks or reads.

    A peer that does not take part in TLS's farewell is not waited for.
    """
    loop = asyncio.get_running_loop()
    cleanup = loop.create_task(runner.cleanup())
    await asyncio.wait([cleanup], timeout=max(0.0, deadline - loop.time()))
    await asyncio.sleep(FAREWELL_SECONDS)
    await listener.abort()
    await asyncio.wait([cleanup], timeout=FAREWELL_SECONDS)
    cleanup.cancel()
    await asyncio.wait([cleanup])


def listen_error(spec: SiteSpec, error: Exception) -> ListenError:
    """What a failure to bind means, naming the address and what to do."""
    where = f"cannot listen on {spec.listen_host}:{spec.listen_port}"
    if isinstance(error, socket.gaierror):
        return ListenError(f"{where}: that host is not known", hint="`listen` is host:port, with this host's address")
    number = error.errno if isinstance(error, OSError) else None
    why, hint = _LISTEN.get(number or 0, (str(error), "correct `listen`"))
    return ListenError(f"{where}: {why}", hint=hint)
