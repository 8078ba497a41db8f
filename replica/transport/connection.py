"""One HTTPS connection to the other side: requests, answers, and what their failures mean.

`http.client` speaks HTTP; what is added here: a head and a small body leave in
one write (one TLS record, one packet), a large body leaves in pieces, each
under its own time limit, so that a slow line is not mistaken for a dead one;
and every byte handed to TLS is counted.

Time: an answer has to go on within `ANSWER_SECONDS`, its head to be there by
then, and its body after as much again and `MIN_RATE` bytes a second. A limit on
silence alone would let a receiver that sends a byte a minute hold a cycle for
ever.

Each request is one attempt. The one exception is a kept connection that proves
dead before a byte of the answer came: the server may have closed it while it
was idle (RFC 9112 §9.3.1), every request is idempotent, so it is made once
more on a new one. All else is for the caller to repeat, with its own patience.

Certificates are read anew for every connection, so that renewed ones are used
without a restart. Not thread-safe.
"""

from __future__ import annotations

import http.client
import math
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from replica.errors import ConfigError, ProtocolError, ReplicaError, TransportError
from replica.transport import wire
from replica.transport.tls import TlsFiles, client_context, refusal

if TYPE_CHECKING:
    from typing_extensions import Buffer

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 60.0
"""Longest silence of the other side, and longest time to get one piece of a body out."""
MIN_RATE = 16 << 10
"""Bytes a second that the body of an answer has to come at, the same that a receiver asks of a request's."""
IDLE_SECONDS = 50.0
"""A connection idle for longer is not used again: the server closes it after 75 s."""
PIECE_BYTES = 256 << 10
TOGETHER_BYTES = 16 << 10
READ_BYTES = 1 << 20


class _Socket(ssl.SSLSocket):
    """Reads that end at the deadline at the latest, however many there are until then. A write is one call to TLS."""

    _silence, _deadline = CONNECT_SECONDS, math.inf
    _went_on = False

    def limit(self, silence_seconds: float, total_seconds: float) -> None:
        """From now on: what one read may take, and all of them together."""
        self._silence, self._deadline, self._went_on = silence_seconds, time.monotonic() + total_seconds, False

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        try:
            rest = self._deadline - time.monotonic()
            if rest <= 0:
                raise TimeoutError
            self.settimeout(min(self._silence, rest))
            count = super().recv_into(buffer, nbytes, flags)
        except TimeoutError as error:
            if self._went_on and time.monotonic() >= self._deadline:
                raise _TooSlowError from error
            raise
        self._went_on = True
        return count


class _TooSlowError(TimeoutError):
    """There was no silence, but there was no end either."""


class _Connection(http.client.HTTPSConnection):
    """Collects what http.client would write piecemeal; `deliver` writes it with the body."""

    def __init__(self, host: str, port: int, context: ssl.SSLContext) -> None:
        super().__init__(host, port, timeout=CONNECT_SECONDS, context=context)
        self.auto_open = 0
        self.answers = 0
        self.used_at = time.monotonic()
        self.bytes_sent = 0
        self._head = bytearray()
        self._tls_context = context
        self._tls_context.sslsocket_class = _Socket
        self._tls: _Socket | None = None

    def connect(self) -> None:
        """Like the parent's, but `sock` is there from the first packet on, so that it can be shut down."""
        raw = self._connect_tcp()
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        tls = self._tls_context.wrap_socket(raw, server_hostname=self.host, do_handshake_on_connect=False)
        assert isinstance(tls, _Socket)
        self.sock = self._tls = tls
        tls.do_handshake()

    def _connect_tcp(self) -> socket.socket:
        failure = OSError("it has no address")
        for family, kind, protocol, _, address in socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM):
            self.sock = raw = socket.socket(family, kind, protocol)
            try:
                raw.settimeout(CONNECT_SECONDS)
                raw.connect(address)
                return raw
            except OSError as error:
                raw.close()
                failure = error
        raise failure

    def limit(self, silence_seconds: float, total_seconds: float) -> None:
        """How long the other side may be silent, and take in all for what is read next.

        `sock` is gone as soon as the head of an answer says that it is the last one; its body is still to come.
        """
        if self._tls is not None:
            self._tls.limit(silence_seconds, total_seconds)

    def shut_down(self) -> None:
        """From any thread: whoever reads or writes gets an error. The descriptor stays theirs to close."""
        sock = self.sock or self._tls
        if sock is not None:
            with suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # not SSLSocket's own: it takes the session away

    def send(self, data: object) -> None:
        assert isinstance(data, bytes)
        self._head += data

    def deliver(self, body: Sequence[Buffer]) -> None:
        """Write the head (made by `putrequest` … `endheaders`) and the body."""
        parts = [memoryview(self._head), *(memoryview(part).cast("B") for part in body)]
        small = 0
        while small < len(parts) and sum(map(len, parts[: small + 1])) <= TOGETHER_BYTES:
            small += 1
        self._write(memoryview(b"".join(parts[:small])))
        for part in parts[small:]:
            for start in range(0, len(part), PIECE_BYTES):
                self._write(part[start : start + PIECE_BYTES])
        parts.clear()
        self._head = bytearray()

    def _write(self, piece: memoryview) -> None:
        if self.sock is None:
            raise http.client.NotConnected
        self.bytes_sent += len(piece)
        self.sock.sendall(piece)


class Connection:
    """A connection to `url` that opens itself, and again after it broke."""

    def __init__(self, url: str, tls: TlsFiles, answer_seconds: float = ANSWER_SECONDS) -> None:
        self.url = url.rstrip("/")
        self._host, self._port, self._path = _parse(url)
        self._tls = tls
        self._answer_seconds = answer_seconds
        self._connection: _Connection | None = None
        self._bytes_before = 0
        self._aborted = False

    @property
    def bytes_sent(self) -> int:
        """HTTP bytes written so far, before TLS, request lines and headers and repeats included."""
        return self._bytes_before + (self._connection.bytes_sent if self._connection else 0)

    def close(self) -> None:
        """Close the connection; the next request opens a new one."""
        if self._connection is not None:
            self._bytes_before += self._connection.bytes_sent
            self._connection.close()
            self._connection = None

    def abort(self) -> None:
        """Thread-safe: end the request that another thread is in with a TransportError; the next one connects anew."""
        self._aborted = True
        connection = self._connection
        if connection is not None:
            connection.shut_down()

    def exchange(
        self,
        method: str,
        path: str,
        body: Sequence[Buffer] = (),
        headers: dict[str, str] | None = None,
        wait_seconds: float = 0,
    ) -> tuple[int, bytes]:
        """Status and body of a good answer; a problem is raised as the error it is."""
        response = self._open(method, path, body, headers or {}, wait_seconds)
        try:
            self._expect(wire.MAX_RESPONSE_BYTES if response.length is None else response.length)
            data = response.read(wire.MAX_RESPONSE_BYTES + 1)
            _check_complete(response, len(data) > wire.MAX_RESPONSE_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(error) from error
        if len(data) > wire.MAX_RESPONSE_BYTES:
            self.close()
            raise ProtocolError(f"{self.url} answered with more than {wire.MAX_RESPONSE_BYTES} bytes")
        if response.will_close:
            self.close()
        if response.status >= 300:
            raise self._problem(response, data)
        return response.status, data

    def stream(self, path: str, content_range: str) -> Iterator[bytes]:
        """The body of a good answer piece by piece. The connection is busy until the iterator ends."""
        response = self._open("GET", path, (), {"Range": content_range}, 0)
        try:
            self._expect(READ_BYTES)
            if response.status >= 300:
                raise self._problem(response, response.read(wire.MAX_DOCUMENT_BYTES))
            while piece := response.read(READ_BYTES):
                yield piece
                self._expect(READ_BYTES)
            _check_complete(response)
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(error) from error

    def _expect(self, count_bytes: int) -> None:
        """So many bytes of a body are read next, at the most."""
        if self._connection is not None:
            total = self._answer_seconds + min(count_bytes, wire.MAX_RESPONSE_BYTES) / MIN_RATE
            self._connection.limit(self._answer_seconds, total)

    def _open(
        self, method: str, path: str, body: Sequence[Buffer], headers: dict[str, str], wait_seconds: float
    ) -> http.client.HTTPResponse:
        """Send a request and read the head of its answer."""
        self._aborted = False
        while True:
            connection = self._connected()
            kept = connection.answers > 0
            try:
                return self._attempt(connection, method, path, body, headers, wait_seconds)
            except (OSError, http.client.HTTPException) as error:
                if kept and _is_stale(error) and not self._aborted:
                    self.close()
                    continue
                raise self._broken(error) from error

    def _attempt(
        self,
        connection: _Connection,
        method: str,
        path: str,
        body: Sequence[Buffer],
        headers: dict[str, str],
        wait_seconds: float,
    ) -> http.client.HTTPResponse:
        connection.putrequest(method, self._path + path, skip_accept_encoding=True)
        if body or method in ("PUT", "POST"):
            connection.putheader("Content-Length", str(sum(memoryview(part).nbytes for part in body)))
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        connection.sock.settimeout(self._answer_seconds)
        try:
            connection.deliver(body)
        except (ConnectionError, ssl.SSLError) as error:
            return self._last_words(connection, error)
        connection.limit(self._answer_seconds + wait_seconds, self._answer_seconds + wait_seconds)
        response = connection.getresponse()
        connection.answers += 1
        connection.used_at = time.monotonic()
        return response

    def _last_words(self, connection: _Connection, error: OSError) -> http.client.HTTPResponse:
        """The peer hung up while the request was being written: why is in what it sent before, if anything."""
        try:
            connection.limit(1, 1)
            response = connection.getresponse()
        except ssl.SSLError as alert:
            raise alert from error
        except (OSError, http.client.HTTPException):
            raise error from None
        response.will_close = True
        return response

    def _connected(self) -> _Connection:
        if self._connection is not None and time.monotonic() - self._connection.used_at > IDLE_SECONDS:
            self.close()
        if self._connection is None:
            self._connection = connection = _Connection(self._host, self._port, client_context(self._tls))
            try:
                connection.connect()
            except (OSError, http.client.HTTPException) as error:
                self.close()
                raise _unreachable(error, self.url, self._tls) from error
            connection.used_at = time.monotonic()
        return self._connection

    def _broken(self, error: Exception) -> ReplicaError:
        """The connection is given up; what its end means."""
        fresh = self._connection is not None and self._connection.answers == 0
        self.close()
        if fresh and isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
            return refusal(error, self.url, self._tls)
        if isinstance(error, _TooSlowError):
            hint = f"a line slower than {MIN_RATE >> 10} KiB/s is too slow for it; else look at the receiver"
            return TransportError(f"{self.url} answers so slowly that its answer was given up", hint=hint)
        if isinstance(error, TimeoutError):
            return TransportError(f"{self.url} did not answer for {self._answer_seconds:.0f} s")
        return TransportError(f"the connection to {self.url} broke: {_plain(error)}", hint="it is safe to try again")

    def _problem(self, response: http.client.HTTPResponse, data: bytes) -> ReplicaError:
        if response.headers.get_content_type() == wire.PROBLEM_TYPE:
            return wire.from_problem(wire.decode(data, wire.Problem, f"the error {self.url} answered with"))
        kind = TransportError if response.status >= 500 else ProtocolError
        return kind(
            f"{self.url} answered {response.status} {response.reason}, which is no answer of a receiver",
            hint="is there a proxy in between, or another service at that address?",
        )


def _parse(url: str) -> tuple[str, int, str]:
    try:
        parts = urlsplit(url)
        port = parts.port or 443
    except ValueError as error:
        raise ConfigError(f"{url!r} is no URL: {error}") from error
    if parts.scheme != "https" or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise ConfigError(f"{url!r} is not a receiver's address", hint="write it as https://host:port")
    return parts.hostname, port, parts.path.rstrip("/")


def _check_complete(response: http.client.HTTPResponse, more_expected: bool = False) -> None:
    """`read(amount)` ends quietly where the connection did; `length` then tells what is still missing."""
    if response.length and not more_expected:
        raise http.client.IncompleteRead(b"", response.length)


def _is_stale(error: Exception) -> bool:
    """Is this how a connection ends that the other side had closed? (`RemoteDisconnected` is a ConnectionError.)"""
    return isinstance(error, ConnectionError | ssl.SSLEOFError | ssl.SSLZeroReturnError)


def _unreachable(error: Exception, url: str, tls: TlsFiles) -> ReplicaError:
    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
        return refusal(error, url, tls)
    if isinstance(error, ConnectionRefusedError):
        return TransportError(f"nobody listens at {url}", hint="is the receiver running?")
    if isinstance(error, TimeoutError):
        hint = "check the address and the firewalls in between"
        return TransportError(f"{url} does not answer within {CONNECT_SECONDS:.0f} s", hint=hint)
    if isinstance(error, socket.gaierror):
        return TransportError(f"the host of {url} is not known: {error.strerror}", hint="check the address and the DNS")
    return TransportError(f"cannot connect to {url}: {_plain(error)}", hint="is it the receiver's address and port?")


def _plain(error: Exception) -> str:
    if isinstance(error, ssl.SSLEOFError | http.client.RemoteDisconnected | http.client.IncompleteRead):
        return "the other side hung up"
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
