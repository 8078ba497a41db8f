"""A TCP relay that can be told to break: the network between the sites."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from types import TracebackType
from typing import Self


class Relay:
    """Forwards one port of loopback to another. After `cut_after` bytes towards the receiver, the line is dead.

    What went towards the receiver is kept in `sent` when `record` is set.
    """

    def __init__(self, target_port: int, *, record: bool = False) -> None:
        self._target_port = target_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._lock = threading.Lock()
        self._left: int | None = None
        self._open: set[socket.socket] = set()
        self._record = record
        self.sent = bytearray()
        self.count_bytes = 0
        self.cuts = 0
        self._ended = False
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._ended = True
        self._listener.close()
        self._close_all()

    def cut_after(self, count_bytes: int | None) -> None:
        """Break every connection once that many more bytes went through, and each later one; None heals the line."""
        with self._lock:
            self._left = count_bytes

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._left == 0 or self._ended:
                client.close()
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self._target_port), timeout=10)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            with self._lock:
                self._open |= {client, server}
            threading.Thread(target=self._pump, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, False), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, outward: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if outward and not self._count(data):
                    self._close_all()
                    return
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _count(self, data: bytes) -> bool:
        """Account for bytes towards the receiver; False when the line breaks here."""
        with self._lock:
            self.count_bytes += len(data)
            if self._record:
                self.sent += data
            if self._left is None:
                return True
            self._left = max(0, self._left - len(data))
            if self._left == 0:
                self.cuts += 1
            return self._left > 0

    def _close_all(self) -> None:
        with self._lock:
            ends, self._open = self._open, set()
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
