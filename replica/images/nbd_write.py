"""Writing to an NBD export: what is zero is left to the server (WRITE_ZEROES: holes where it can)."""

from __future__ import annotations

from pathlib import Path

from replica.errors import ImageError
from replica.images.nbd_client import NbdConnection, Piece
from replica.images.nbd_protocol import Flag
from replica.images.nbd_uri import parse

STEP_BYTES = 1 << 20
ZERO_STEP_BYTES = 64 << 20
"""Zeroed at a time: a server without fast zeroes must be able to answer in time."""


class NbdTarget:
    """An export that is overwritten (`in_place.Target`). ImageErrors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._connection = NbdConnection(parse(path))
        export = self._connection.export
        if Flag.READ_ONLY in export.flags:
            self.close()
            raise ImageError(f"{self._connection.uri.place} is read-only", hint="export it for writing")
        self.size_bytes = export.size_bytes
        self._block = export.min_block_bytes
        self._step = max(min(STEP_BYTES, export.max_request_bytes) // self._block, 1) * self._block
        self._can_zero = Flag.WRITE_ZEROES in export.flags

    def write(self, offset: int, data: memoryview) -> None:
        head, tail = offset % self._block, -(offset + len(data)) % self._block
        if head or tail:
            data = self._widened(offset - head, data, head, tail)
        for at in range(0, len(data), self._step):
            self._connection.write(offset - head + at, data[at : at + self._step])

    def _widened(self, start: int, data: memoryview, head: int, tail: int) -> memoryview:
        """Whole blocks: what is around `data` in its first and last one is as the server has it."""
        whole = bytearray(head + len(data) + tail)
        view = memoryview(whole)
        for at in {0, len(whole) - self._block}:
            self._connection.read([Piece(start + at, view[at : at + self._block])])
        view[head : head + len(data)] = data
        return view

    def zero(self, offset: int, length: int) -> None:
        stop = offset + length
        first, last = -(-offset // self._block) * self._block, stop // self._block * self._block
        if not self._can_zero or first >= last:
            blank = memoryview(bytes(min(self._step, length)))
            for at in range(offset, stop, self._step):
                self.write(at, blank[: min(len(blank), stop - at)])
            return
        self.write(offset, memoryview(bytes(first - offset)))
        for at in range(first, last, ZERO_STEP_BYTES):
            self._connection.zero(at, min(ZERO_STEP_BYTES, last - at))
        self.write(last, memoryview(bytes(stop - last)))

    def flush(self) -> None:
        self._connection.flush()

    def close(self) -> None:
        self._connection.close()
