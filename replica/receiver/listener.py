"""Accepting connections, so many and no more: the count starts at `accept`, before a byte of TLS.

A connection that has shown no certificate costs a descriptor and some buffers
just like any other, so it is counted from the moment it exists: at most
`MAX_CONNECTIONS` altogether and `MAX_OF_ADDRESS` of one address (of one /64 in
IPv6, where addresses are free). One more is reset at once. Should the process
run out of descriptors all the same, accepting pauses and goes on by itself;
the log says so once a minute.

    listener = Listener(host, port)                # the address is ours, nothing is answered
    listener.start(context, make_protocol)         # in an event loop
    await listener.close()                         # no more connections; those there are go on
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import struct
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from ipaddress import IPv6Address, IPv6Network, ip_address

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 512
MAX_OF_ADDRESS = 64
BACKLOG = 128
HANDSHAKE_SECONDS = 10.0
PAUSE_SECONDS = 0.5
SILENCE_SECONDS = 60.0
ABORT_TURNS = 20
_RESET = struct.pack("ii", 1, 0)


class Listener:
    """Listening sockets of one address, and the connections that came through them. For one event loop."""

    def __init__(self, host: str, port: int) -> None:
        """Bind and listen; who connects waits for `start`. An empty host is every address.

        Raises OSError (gaierror, too) or OverflowError.
        """
        self._sockets: list[socket.socket] = []
        self._shaking: dict[asyncio.Task[None], socket.socket] = {}
        self._through: set[_Counted] = set()
        self._open: Counter[str] = Counter()
        self._accepting: list[asyncio.Task[None]] = []
        self._quiet: dict[str, float] = {}
        try:
            self._bind(host, port)
        except BaseException:
            self._close_sockets()
            raise

    def _bind(self, host: str, port: int) -> None:
        dual = not host and socket.has_dualstack_ipv6()
        where: list[tuple[int, tuple[object, ...]]] = [(socket.AF_INET6 if dual else socket.AF_INET, ("", port))]
        if host:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            where = list(dict.fromkeys((entry[0], entry[4]) for entry in found))
        for family, address in where:
            made = socket.socket(family, socket.SOCK_STREAM)
            self._sockets.append(made)
            made.setblocking(False)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not dual)
            made.bind(address)
            made.listen(BACKLOG)  # at once: until then another process may bind the same port and believe it is its own

    @property
    def address(self) -> tuple[str, int]:
        """Host (in brackets if it is IPv6) and port of the first socket."""
        host, port = self._sockets[0].getsockname()[:2]
        return f"[{host}]" if ":" in host else host, port

    def __len__(self) -> int:
        """Connections open now, those in their handshake included."""
        return self._open.total()

    def start(self, context: ssl.SSLContext, make_protocol: Callable[[], asyncio.Protocol]) -> None:
        """Take connections from now on."""
        loop = asyncio.get_running_loop()
        self._accepting = [loop.create_task(self._accept(one, context, make_protocol)) for one in self._sockets]

    async def close(self) -> None:
        """Take no more, and give handshakes up. Connections that are through go on. Idempotent.

        A handshake is not cancelled but loses its peer: asyncio would leave one that has not begun to itself.
        """
        for task in self._accepting:
            task.cancel()
        await asyncio.gather(*self._accepting, return_exceptions=True)
        for made in self._shaking.values():
            _cut(made)
        await asyncio.gather(*self._shaking, return_exceptions=True)
        self._close_sockets()

    async def abort(self) -> None:
        """Cut every connection, also one whose peer does not take part in TLS's farewell."""
        for connection in self._through:
            with suppress(AttributeError):  # CPython 3.11.2: a TLS transport that was closed twice raises it
                connection.transport.abort()
            _cut(connection.socket)  # such a one knows of no connection to abort in later versions, either
        for _ in range(ABORT_TURNS):  # the socket, its transport, TLS and the protocol above are told one by one
            if not self._through:
                break
            await asyncio.sleep(0)

    def _close_sockets(self) -> None:
        for listening in self._sockets:
            listening.close()

    async def _accept(
        self, listening: socket.socket, context: ssl.SSLContext, make_protocol: Callable[[], asyncio.Protocol]
    ) -> None:
        while True:
            try:
                made, address = await _next_connection(listening)
            except (ConnectionAbortedError, InterruptedError):
                continue
            except OSError as error:
                self._say("cannot accept", f"cannot accept a connection: {error.strerror}; trying again")
                await asyncio.sleep(PAUSE_SECONDS)
                continue
            key = address_key(address[0])
            full = len(self) >= MAX_CONNECTIONS
            if full or self._open[key] >= MAX_OF_ADDRESS:
                limit = f"{MAX_CONNECTIONS} are open" if full else f"{MAX_OF_ADDRESS} of {key} are open"
                self._say("full" if full else key, f"connections are reset: {limit}")
                with suppress(OSError):
                    made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                made.close()
                continue
            self._open[key] += 1
            shaking = asyncio.get_running_loop().create_task(self._shake_hands(made, key, context, make_protocol))
            self._shaking[shaking] = made
            shaking.add_done_callback(self._shaking.pop)

    async def _shake_hands(
        self, made: socket.socket, key: str, context: ssl.SSLContext, make_protocol: Callable[[], asyncio.Protocol]
    ) -> None:
        """TLS; then the connection is the protocol's, and counts until it is lost."""
        loop = asyncio.get_running_loop()
        counted = _Counted(made, make_protocol, self._through, lambda: self._less(key))
        try:
            with suppress(OSError):
                made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.connect_accepted_socket(
                lambda: counted, made, ssl=context, ssl_handshake_timeout=HANDSHAKE_SECONDS
            )
        except OSError as error:
            log.debug("a connection of %s ended in its TLS handshake: %s", key, error)
        finally:
            if not counted.taken:
                made.close()
                self._less(key)

    def _less(self, key: str) -> None:
        self._open[key] -= 1
        if not self._open[key]:
            del self._open[key]

    def _say(self, what: str, text: str) -> None:
        """A line in the log, of each kind at most once a minute."""
        now = asyncio.get_running_loop().time()
        self._quiet = {kind: until for kind, until in self._quiet.items() if until > now}
        if what not in self._quiet and len(self._quiet) < MAX_CONNECTIONS:
            self._quiet[what] = now + SILENCE_SECONDS
            log.warning("%s", text)


async def _next_connection(listening: socket.socket) -> tuple[socket.socket, tuple[str, int]]:
    """As `loop.sock_accept`, but nothing is accepted and forgotten when the task is cancelled just then."""
    loop = asyncio.get_running_loop()
    await asyncio.sleep(0)  # others have their turn, too, however many are waiting to be let in
    while True:
        try:
            made, address = listening.accept()
        except BlockingIOError:
            ready = asyncio.Event()
            loop.add_reader(listening, ready.set)
            try:
                await ready.wait()
            finally:
                loop.remove_reader(listening)
        else:
            made.setblocking(False)
            return made, address


class _Counted(asyncio.Protocol):
    """Passes everything on to the real protocol, made when the handshake is over; tells when it is lost."""

    transport: asyncio.Transport

    def __init__(
        self,
        made: socket.socket,
        make_protocol: Callable[[], asyncio.Protocol],
        through: set[_Counted],
        lost: Callable[[], None],
    ) -> None:
        self.socket = made
        self._make = make_protocol
        self._through = through
        self._lost = lost
        self.taken = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.taken, self.transport = True, transport
        self._through.add(self)
        self._inner = self._make()
        self.data_received = self._inner.data_received  # type: ignore[method-assign]
        self.eof_received = self._inner.eof_received  # type: ignore[method-assign]
        self.pause_writing = self._inner.pause_writing  # type: ignore[method-assign]
        self.resume_writing = self._inner.resume_writing  # type: ignore[method-assign]
        self._inner.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.taken:
            self._through.discard(self)
            self._lost()
            self._inner.connection_lost(exc)


def _cut(made: socket.socket) -> None:
    """End a connection both ways; the socket is closed by whoever finds that out. One that is closed stays so."""
    with suppress(OSError):
        made.shutdown(socket.SHUT_RDWR)


def address_key(address: str) -> str:
    """What connections are counted by: an IPv4 address, or the /64 of an IPv6 address."""
    ip = ip_address(address.partition("%")[0])
    if isinstance(ip, IPv6Address):
        return str(ip.ipv4_mapped or IPv6Network((int(ip) >> 64 << 64, 64)))
    return str(ip)
