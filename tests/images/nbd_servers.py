"""NBD servers for tests: independent ones as processes, and one that says whatever a test wants."""

from __future__ import annotations

import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DISCONNECT, STATUS = 2, 7


@contextmanager
def serving(folder: Path, *command: object, socket_name: str = "s") -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run a server whose command has {} for its socket; its URI, and its process."""
    place = folder / socket_name
    place.unlink(missing_ok=True)
    process = subprocess.Popen([str(word).replace("{}", str(place)) for word in command], stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 20
        while True:
            with suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                if place.exists():
                    probe.connect(str(place))
                    break
            assert process.poll() is None and time.monotonic() < deadline, "the server does not start"
            time.sleep(0.01)
        yield f"nbd+unix:///?socket={place}", process
    finally:
        process.kill()
        process.communicate()


def export_info(size: int, flags: int = 1) -> bytes:
    return struct.pack(">HQH", 0, size, flags)


def block_sizes(smallest: int, largest: int) -> bytes:
    return struct.pack(">HIII", 3, smallest, 4096, largest)


def chunk(cookie: int, kind: int, data: bytes = b"", done: int = 1) -> bytes:
    return struct.pack(">IHHQI", 0x668E33EF, done, kind, cookie, len(data)) + data


def data_chunk(cookie: int, offset: int, data: bytes, done: int = 1) -> bytes:
    return chunk(cookie, 1, struct.pack(">Q", offset) + data, done)


def extents_chunk(cookie: int, *extents: tuple[int, int], context: int = 7) -> bytes:
    return chunk(cookie, 5, struct.pack(">I", context) + b"".join(struct.pack(">II", *extent) for extent in extents))


class ScriptedServer:
    """Honest up to where the test says otherwise. One thread per connection, gone with the `with` block."""

    size = 1 << 20
    greeting = b"NBDMAGIC" + b"IHAVEOPT" + struct.pack(">H", 3)
    infos: tuple[bytes, ...] = ()
    option_reply: bytes | None = None
    """To any option, in place of what would be right."""

    def __init__(self, folder: Path, answer: Callable[[int, int, int, int], bytes | None] | None = None) -> None:
        """`answer`: to (command, cookie, offset, length); None hangs up."""
        self.answer = answer or (lambda command, cookie, offset, length: data_chunk(cookie, offset, bytes(length)))
        self._place = folder / "scripted"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._place))
        self._listener.listen()
        self.uri = Path(f"nbd+unix:///x?socket={self._place}")
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> ScriptedServer:
        return self

    def __exit__(self, *_: object) -> None:
        for one in (self._listener, *self._open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection = self._listener.accept()[0]
                self._open.append(connection)
                threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with suppress(OSError, struct.error), connection:
            connection.sendall(self.greeting)
            take(connection, 4)
            while True:
                _, option, length = struct.unpack(">8sII", take(connection, 16))
                take(connection, length)
                if self.option_reply is not None:
                    connection.sendall(self.option_reply)
                    continue
                replies = {7: self.infos or (export_info(self.size),), 10: (struct.pack(">I", 7) + b"base:allocation",)}
                for data in replies.get(option, ()):
                    connection.sendall(option_reply(option, 3 if option == 7 else 4, data))
                connection.sendall(option_reply(option, 1))
                if option == 7:
                    break
            while True:
                _, _, command, cookie, offset, length = struct.unpack(">IHHQQI", take(connection, 28))
                if command == DISCONNECT:
                    return
                reply = self.answer(command, cookie, offset, length)
                if reply is None:
                    return
                connection.sendall(reply)


def option_reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data)) + data


def take(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        more = connection.recv(length - len(data))
        if not more:
            raise OSError
        data += more
    return data
