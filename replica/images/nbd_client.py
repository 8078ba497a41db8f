"""One connection to an NBD server: the handshake, then requests and their replies.

The server is not trusted with this process: it may lie about every number. What
it sends is bounded before it is received, lands only in the buffer that was asked
to be filled and only where it was asked for, and a reply counts when every byte of
it came exactly once. Each call is over within `ANSWER_SECONDS` besides, whether
the server says nothing or dribbles. After any failure but an error that the server
reported in due form, the connection is closed: nobody knows where in it one is.

TLS is demanded or absent, never opportunistic (`doc/proto.md`, "TLS versions"): with
it STARTTLS is the first option sent, and nothing that came before counts.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from replica.errors import ImageError
from replica.images import nbd_protocol as nbd
from replica.images.nbd_protocol import ChunkType, Command, Flag, Info, Option, Reply
from replica.images.nbd_uri import NbdUri
from replica.model import MAX_DISK_BYTES, SECTOR_BYTES

CONNECT_SECONDS = 20.0
ANSWER_SECONDS = 60.0


class Export(NamedTuple):
    """What the server said of an export."""

    size_bytes: int
    flags: Flag
    min_block_bytes: int
    max_request_bytes: int
    has_allocation: bool
    """`base:allocation` can be asked for."""


class Piece(NamedTuple):
    """A range of the export, and where in memory it goes."""

    offset: int
    memory: memoryview


class _Read:
    """A read that was asked for, and what has come of it."""

    def __init__(self, piece: Piece) -> None:
        self.piece = piece
        self.failed = False
        self._ranges: list[tuple[int, int]] = []

    def got(self, offset: int, length: int) -> bool:
        """Note a range that came; False if there are more of them than sectors."""
        self._ranges.append((offset, length))
        return len(self._ranges) <= 1 + len(self.piece.memory) // SECTOR_BYTES

    def is_whole(self) -> bool:
        """Every byte came, and came once."""
        place = self.piece.offset
        for offset, length in sorted(self._ranges):
            if offset != place:
                return False
            place += length
        return place == self.piece.offset + len(self.piece.memory)


class NbdConnection:
    """For one thread at a time. Failures are ImageErrors that name the server."""

    def __init__(self, uri: NbdUri, *, answer_seconds: float = ANSWER_SECONDS) -> None:
        self.uri = uri
        self._answer_seconds = answer_seconds
        self._deadline = time.monotonic() + CONNECT_SECONDS
        self._cookie = 0
        self._context_id: int | None = None
        self._structured = False
        self._socket = self._connect()
        try:
            self.export = self._handshake()
        except BaseException:
            self._socket.close()
            raise

    # Bytes

    def _connect(self) -> socket.socket:
        with contextlib.ExitStack() as stack, self._failures("connect to"):
            if self.uri.socket:
                made = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                made.settimeout(CONNECT_SECONDS)
                made.connect(self.uri.socket)
            else:
                made = socket.create_connection((self.uri.host, self.uri.port), timeout=CONNECT_SECONDS)
                made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            stack.pop_all()
        return made

    def _receive(self, memory: memoryview) -> None:
        done = 0
        while done < len(memory):
            self._socket.settimeout(self._remaining())
            count = self._socket.recv_into(memory[done:])
            if count == 0:
                raise ConnectionError("it closed the connection")
            done += count

    def _take(self, length: int) -> bytes:
        """The caller has bounded `length`."""
        data = bytearray(length)
        self._receive(memoryview(data))
        return bytes(data)

    def _send(self, *parts: bytes | memoryview) -> None:
        self._socket.settimeout(self._remaining())
        for part in parts:
            self._socket.sendall(part)

    def _remaining(self) -> float:
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        return remaining

    @contextlib.contextmanager
    def _failures(self, what: str) -> Iterator[None]:
        try:
            yield
        except TimeoutError as error:
            raise self._error(what, "it did not answer in time") from error
        except ssl.SSLCertVerificationError as error:
            raise ImageError(
                f"the NBD server of {self.uri.place} has a certificate that was refused: {error.verify_message}",
                hint="`tls-certificates` must hold the CA of the server, and `tls-hostname` the name it is issued for",
            ) from error
        except ssl.SSLError as error:
            raise self._error(what, f"TLS failed: {error.reason or error}") from error
        except OSError as error:
            raise self._error(what, error.strerror or str(error)) from error

    def _error(self, what: str, why: str) -> ImageError:
        hint = "is the server running, and is this its address?" if what == "connect to" else ""
        return ImageError(f"cannot {what} {self.uri.place} over NBD: {why}", hint=hint)

    def _nonsense(self, what: str) -> ConnectionError:
        return ConnectionError(f"it breaks the protocol: {what}")

    # Handshake

    def _handshake(self) -> Export:
        with self._failures("open"):
            first, second, flags = nbd.HANDSHAKE.unpack(self._take(nbd.HANDSHAKE.size))
            if first != nbd.NBD_MAGIC or second != nbd.OPTION_MAGIC or not flags & nbd.FIXED_NEWSTYLE:
                raise self._nonsense("this is no NBD server with the fixed newstyle handshake")
            self._send((nbd.FIXED_NEWSTYLE | (flags & nbd.NO_ZEROES)).to_bytes(4, "big"))
            if self.uri.tls:
                self._option(Option.STARTTLS, b"")
                self._socket = self._tls().wrap_socket(self._socket, server_hostname=self.uri.hostname)
            self._structured = self._option(Option.STRUCTURED_REPLY, b"", may_fail=True) is not None
            name = len(self.uri.export).to_bytes(4, "big") + self.uri.export
            if self._structured:
                query = (1).to_bytes(4, "big") + len(nbd.ALLOCATION).to_bytes(4, "big") + nbd.ALLOCATION
                for kind, data in self._option(Option.SET_META_CONTEXT, name + query, may_fail=True) or ():
                    if kind == Reply.META_CONTEXT and data[4:] == nbd.ALLOCATION:
                        self._context_id = int.from_bytes(data[:4], "big")
            wanted = (1).to_bytes(2, "big") + Info.BLOCK_SIZE.to_bytes(2, "big")
            told = self._option(Option.GO, name + wanted) or ()
            return self._export(told)

    def _tls(self) -> ssl.SSLContext:
        assert self.uri.certificates is not None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        folder: Path = self.uri.certificates
        ca, cert, key = (folder / f"{name}.pem" for name in ("ca-cert", "client-cert", "client-key"))
        try:
            context.load_verify_locations(ca)
            if cert.exists():
                context.load_cert_chain(cert, key, password=lambda: b"")
        except (OSError, ssl.SSLError) as error:
            raise ImageError(
                f"the certificates in {folder} cannot be used: {error}",
                hint="it holds ca-cert.pem, and client-cert.pem with its client-key.pem, unencrypted",
            ) from error
        return context

    def _option(self, option: Option, data: bytes, *, may_fail: bool = False) -> list[tuple[int, bytes]] | None:
        """Send an option; the server's replies up to its ACK. None if it refused and may."""
        self._send(nbd.OPTION.pack(nbd.OPTION_MAGIC, option, len(data)) + data)
        replies: list[tuple[int, bytes]] = []
        while len(replies) < nbd.MAX_OPTION_REPLIES:
            magic, of, kind, length = nbd.OPTION_REPLY.unpack(self._take(nbd.OPTION_REPLY.size))
            if magic != nbd.OPTION_REPLY_MAGIC or of != option or length > nbd.MAX_OPTION_REPLY_BYTES:
                raise self._nonsense("a reply to an option is none")
            said = self._take(length)
            if kind == Reply.ACK:
                return replies
            if kind & nbd.ERROR_REPLY:
                code = kind & ~nbd.ERROR_REPLY
                if may_fail and code != nbd.TLS_REQUIRED:
                    return None
                raise self._refused(option, code, said)
            replies.append((kind, said))
        raise self._nonsense("its replies to an option do not end")

    def _refused(self, option: Option, code: int, said: bytes) -> ImageError:
        why = nbd.REFUSALS.get(code, f"error {code}")
        hints = {
            nbd.TLS_REQUIRED: "write nbds instead of nbd in the URI, with `tls-certificates`",
            nbd.UNKNOWN_EXPORT: "correct the export's name in the URI; `nbdinfo --list` shows those that there are",
            nbd.UNSUPPORTED: "the server is too old, or offers no TLS" if option == Option.STARTTLS else "",
        }
        return ImageError(
            f"the NBD server refuses {self.uri.place}: {why}{_words(said)}",
            hint=hints.get(code, ""),
        )

    def _export(self, replies: Sequence[tuple[int, bytes]]) -> Export:
        size, flags, smallest, largest = -1, Flag(0), 1, nbd.MAX_REQUEST_BYTES
        for kind, data in replies:
            about = int.from_bytes(data[:2], "big") if kind == Reply.INFO and len(data) >= 2 else None
            if about == Info.EXPORT and len(data) == nbd.EXPORT_INFO.size:
                _, size, bits = nbd.EXPORT_INFO.unpack(data)
                flags = Flag(bits)
            elif about == Info.BLOCK_SIZE and len(data) == nbd.BLOCK_SIZE_INFO.size:
                _, smallest, _, largest = nbd.BLOCK_SIZE_INFO.unpack(data)
        if size < 0:
            raise self._nonsense("it does not tell the export's size")
        if size > MAX_DISK_BYTES:
            raise ImageError(f"{self.uri.place} has {size} bytes, more than {MAX_DISK_BYTES} (64 TiB)")
        if not 1 <= smallest <= nbd.MAX_BLOCK_BYTES or smallest & (smallest - 1) or size % smallest:
            raise self._nonsense(f"blocks of {smallest} bytes in an export of {size}")
        if largest < max(smallest, 512):
            raise self._nonsense(f"requests of {largest} bytes at most")
        largest = min(largest, nbd.MAX_REQUEST_BYTES) // smallest * smallest
        return Export(size, flags, smallest, largest, self._context_id is not None)

    # Requests. Offsets and lengths are inside the export and multiples of its smallest block.

    def read(self, pieces: Sequence[Piece]) -> None:
        """Fill them all; asked for at once, answered in any order."""
        with self._request("read"):
            waiting: dict[int, _Read] = {}
            asked = bytearray()
            for piece in pieces:
                asked += self._ask(Command.READ, piece.offset, len(piece.memory))
                waiting[self._cookie] = _Read(piece)
            self._send(memoryview(asked))
            failure: ImageError | None = None
            while waiting:
                cookie, done, failed = self._read_reply(waiting)
                failure = failure or failed
                if done:
                    read = waiting.pop(cookie)
                    if not read.failed and not read.is_whole():
                        raise self._nonsense("a read that was not answered in full")
        if failure is not None:
            raise failure

    def _read_reply(self, waiting: dict[int, _Read]) -> tuple[int, bool, ImageError | None]:
        """Take one reply, or chunk of one: of which request, whether it was the last, what the server failed in."""
        if not self._structured:
            cookie, code = self._simple()
            read = self._known(waiting, cookie)
            if code:
                read.failed = True
                return cookie, True, self._failed(read.piece, code, b"")
            self._receive(read.piece.memory)
            read.got(read.piece.offset, len(read.piece.memory))
            return cookie, True, None
        flags, kind, cookie, length = self._chunk()
        read = self._known(waiting, cookie)
        done = bool(flags & nbd.DONE)
        if kind & nbd.ERROR_CHUNK:
            read.failed = True
            return cookie, done, self._failed(read.piece, *self._take_error(kind, length))
        if kind == ChunkType.OFFSET_DATA and length > nbd.OFFSET.size:
            (offset,) = nbd.OFFSET.unpack(self._take(nbd.OFFSET.size))
            self._receive(self._place(read, offset, length - nbd.OFFSET.size))
        elif kind == ChunkType.OFFSET_HOLE and length == nbd.HOLE.size:
            offset, count = nbd.HOLE.unpack(self._take(length))
            np.frombuffer(self._place(read, offset, count), np.uint8)[:] = 0
        elif kind != ChunkType.NONE or length or not done:
            raise self._nonsense(f"a chunk of kind {kind} with {length} bytes in the reply to a read")
        return cookie, done, None

    def _place(self, read: _Read, offset: int, length: int) -> memoryview:
        start = offset - read.piece.offset
        if length <= 0 or start < 0 or start + length > len(read.piece.memory) or not read.got(offset, length):
            raise self._nonsense(f"{length} bytes at {offset}, which were not asked for")
        return read.piece.memory[start : start + length]

    def _known(self, waiting: dict[int, _Read], cookie: int) -> _Read:
        if cookie not in waiting:
            raise self._nonsense("a reply to no request")
        return waiting[cookie]

    def extents(self, offset: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """`base:allocation` from `offset` on: lengths, at least one and none 0, and flags. It may end early or late."""
        found: tuple[np.ndarray, np.ndarray] | None = None
        failure: ImageError | None = None
        with self._request("ask for the holes of"):
            self._send(self._ask(Command.BLOCK_STATUS, offset, length))
            done = False
            while not done:
                flags, kind, cookie, size = self._chunk()
                done = bool(flags & nbd.DONE)
                if cookie != self._cookie:
                    raise self._nonsense("a reply to no request")
                if kind & nbd.ERROR_CHUNK:
                    failure = self._failed(Piece(offset, memoryview(b"")), *self._take_error(kind, size))
                elif (
                    kind == ChunkType.BLOCK_STATUS
                    and 12 <= size <= nbd.MAX_STATUS_BYTES
                    and size % 8 == 4
                    and not found
                ):
                    about = int.from_bytes(self._take(4), "big")
                    rows = np.frombuffer(self._take(size - 4), dtype=">u4").reshape(-1, 2).astype(np.int64)
                    found = rows[:, 0], rows[:, 1]
                    if about != self._context_id or not rows[:, 0].all():
                        raise self._nonsense("extents that are none")
                elif kind != ChunkType.NONE or size or not done:
                    raise self._nonsense(f"a chunk of kind {kind} with {size} bytes in a reply about extents")
            if failure is None and found is None:
                raise self._nonsense("a reply without the extents that it is about")
        if failure is not None:
            raise failure
        assert found is not None
        return found

    def write(self, offset: int, data: memoryview) -> None:
        self._change("write", Command.WRITE, offset, len(data), data)

    def zero(self, offset: int, length: int) -> None:
        """A hole, where the server can. The export must have `WRITE_ZEROES`."""
        self._change("zero", Command.WRITE_ZEROES, offset, length)

    def flush(self) -> None:
        """All that was written is on stable storage, if the server can say so."""
        if Flag.SEND_FLUSH in self.export.flags:
            self._change("flush", Command.FLUSH, 0, 0)

    def _change(self, what: str, command: Command, offset: int, length: int, data: memoryview | None = None) -> None:
        failure: ImageError | None = None
        with self._request(what):
            self._send(self._ask(command, offset, length), *([data] if data is not None else []))
            done = False
            while not done:
                magic = self._take(4)
                if int.from_bytes(magic, "big") == nbd.SIMPLE_REPLY_MAGIC:
                    cookie, code = self._simple(magic)
                    done, said = True, b""
                else:
                    flags, kind, cookie, size = self._chunk(magic)
                    done = bool(flags & nbd.DONE)
                    if not kind & nbd.ERROR_CHUNK and (kind != ChunkType.NONE or size or not done):
                        raise self._nonsense(f"a chunk of kind {kind} with {size} bytes in a reply without content")
                    code, said = self._take_error(kind, size) if kind & nbd.ERROR_CHUNK else (0, b"")
                if cookie != self._cookie:
                    raise self._nonsense("a reply to no request")
                if code:
                    failure = self._failed(Piece(offset, memoryview(b"")), code, said, what)
        if failure is not None:
            raise failure

    def _ask(self, command: Command, offset: int, length: int) -> bytes:
        self._cookie += 1
        return nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, command, self._cookie, offset, length)

    @contextlib.contextmanager
    def _request(self, what: str) -> Iterator[None]:
        """Within the time for an answer. What broke off leaves the connection closed."""
        self._deadline = time.monotonic() + self._answer_seconds
        if self._socket.fileno() < 0:
            raise self._error(what, "the connection broke before")
        try:
            with self._failures(what):
                yield
        except BaseException:
            self._socket.close()
            raise

    def _simple(self, magic: bytes = b"") -> tuple[int, int]:
        found, code, cookie = nbd.SIMPLE_REPLY.unpack(magic + self._take(nbd.SIMPLE_REPLY.size - len(magic)))
        if found != nbd.SIMPLE_REPLY_MAGIC:
            raise self._nonsense("a reply is none")
        return cookie, code

    def _chunk(self, magic: bytes = b"") -> tuple[int, int, int, int]:
        found, flags, kind, cookie, length = nbd.CHUNK.unpack(magic + self._take(nbd.CHUNK.size - len(magic)))
        if found != nbd.STRUCTURED_REPLY_MAGIC:
            raise self._nonsense("a reply is none")
        return flags, kind, cookie, length

    def _take_error(self, kind: int, length: int) -> tuple[int, bytes]:
        if not nbd.ERROR.size <= length <= nbd.MAX_OPTION_REPLY_BYTES:
            raise self._nonsense(f"an error of {length} bytes")
        data = self._take(length)
        code, size = nbd.ERROR.unpack(data[: nbd.ERROR.size])
        return code or errno.EINVAL, data[nbd.ERROR.size :][:size]

    def _failed(self, piece: Piece, code: int, said: bytes, what: str = "read") -> ImageError:
        why = os.strerror(code) if code < 200 else f"error {code}"
        return ImageError(
            f"the NBD server failed to {what} {self.uri.place} at byte {piece.offset}: {why}{_words(said)}"
        )

    def close(self) -> None:
        """Say goodbye. Idempotent; no other call may be under way."""
        if self._socket.fileno() >= 0:
            with contextlib.suppress(OSError, TimeoutError):
                self._deadline = time.monotonic() + 1
                self._send(self._ask(Command.DISCONNECT, 0, 0))
            self._socket.close()


def _words(said: bytes) -> str:
    """What a server says for people to read: short, and nothing that a terminal would act on."""
    text = "".join(c if c.isprintable() else " " for c in said[:200].decode(errors="replace")).strip()
    return f" ({text})" if text else ""
