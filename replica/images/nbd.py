"""NBD: a disk behind a Network Block Device server, read over several connections.

    with NbdImage.open(fs, Path("nbd://host/export")) as image: ...

A read is cut into pieces, which are asked for ahead of their answers and, where the
server allows it (`CAN_MULTI_CONN`), over several connections at once. What is zero
the server says by `base:allocation`; without that all of it counts as allocated.
Over-reporting is allowed, so an answer that says too little at a time (a server that
would be asked for ever) makes the range count as data.

A server has no file here, so nothing shows whether the disk stood still: see `still`.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from replica.durable import FileSystem
from replica.errors import ImageError
from replica.images import nbd_protocol as nbd
from replica.images.facts import FileFacts
from replica.images.image import ImageFile, check_range, coalesce, writable_bytes
from replica.images.nbd_client import NbdConnection, Piece
from replica.images.nbd_protocol import Flag
from replica.images.nbd_uri import NbdUri, parse
from replica.model import SECTOR_BYTES

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAX_CONNECTIONS = 4
PIECE_BYTES = 512 << 10
LEAST_STATUS_BYTES = 1 << 20
"""An answer about extents that covers less than this is no help: that much counts as data then."""


class NbdImage:
    """An export that is read. Thread-safe. Failures are ImageErrors."""

    format: str = "nbd"

    def __init__(
        self,
        path: Path,
        uri: NbdUri,
        connections: Sequence[NbdConnection],
        limit: int = 1,
        files: tuple[ImageFile, ...] = (),
    ) -> None:
        """`connections` are open, and this object's from now on; more are made up to `limit` where the server allows.

        `files`: those under the server, if it is one's own.
        """
        export = connections[0].export
        self.path, self.files, self._uri, self._export = path, files, uri, export
        self.size_bytes = export.size_bytes
        self.sector_bytes = SECTOR_BYTES if export.min_block_bytes <= SECTOR_BYTES else 4096
        self._count = max(len(connections), limit if Flag.CAN_MULTI_CONN in export.flags else 1)
        self._all = list(connections)
        self._idle: queue.SimpleQueue[NbdConnection | None] = queue.SimpleQueue()
        for connection in connections:
            self._idle.put(connection)
        for _ in range(self._count - len(connections)):
            self._idle.put(None)  # made by whoever needs it first
        self._threads = ThreadPoolExecutor(self._count, "nbd") if self._count > 1 else None

    @classmethod
    def open(cls, fs: FileSystem, path: Path, parents: Sequence[Path] = ()) -> NbdImage:
        """Connect to what the URI `path` names. An export has no parents."""
        uri = parse(path)
        return cls(path, uri, [NbdConnection(uri)], MAX_CONNECTIONS)

    @contextmanager
    def _connection(self) -> Iterator[NbdConnection]:
        connection = self._idle.get()
        try:
            if connection is None:
                connection = NbdConnection(self._uri)
                self._all.append(connection)
                if connection.export != self._export:
                    raise ImageError(f"{self._uri.place} changed while it was opened", hint="try again")
            yield connection
        finally:
            self._idle.put(connection)

    def read_into(self, offset: int, buffer: Buffer) -> None:
        target = writable_bytes(buffer)
        check_range(self.path, offset, len(target), self.size_bytes)
        block = self._export.min_block_bytes
        start, stop = offset // block * block, -(-(offset + len(target)) // block) * block
        if (start, stop) == (offset, offset + len(target)):
            self._read(start, target.data)
            return
        whole = np.empty(stop - start, np.uint8)
        self._read(start, whole.data)
        target[:] = whole[offset - start :][: len(target)]

    def _read(self, offset: int, memory: memoryview) -> None:
        step = min(PIECE_BYTES, self._export.max_request_bytes)
        pieces = [Piece(offset + at, memory[at : at + step]) for at in range(0, len(memory), step)]
        share = -(-len(pieces) // self._count)
        if self._threads is None or share == len(pieces):
            self._read_pieces(pieces)
            return
        reads = [
            self._threads.submit(self._read_pieces, pieces[at : at + share]) for at in range(0, len(pieces), share)
        ]
        errors = [error for read in reads if (error := read.exception()) is not None]
        if errors:
            raise errors[0]

    def _read_pieces(self, pieces: Sequence[Piece]) -> None:
        with self._connection() as connection:
            connection.read(pieces)

    def allocated(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        return coalesce(self._runs(max(start, 0), min(stop, self.size_bytes)))

    def _runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        if not self._export.has_allocation:
            if start < stop:
                yield start, stop
            return
        while start < stop:
            block = self._export.min_block_bytes
            begin = start // block * block
            length = min(nbd.STATUS_BYTES, -(-stop // block) * block - begin)
            with self._connection() as connection:
                lengths, flags = connection.extents(begin, length)
            edges = begin + np.cumsum(lengths)
            end = min(int(edges[-1]), begin + length, stop)
            if end < min(begin + LEAST_STATUS_BYTES, stop):
                end = min(start + LEAST_STATUS_BYTES, stop)
                yield start, end
            else:
                for number in np.flatnonzero(flags & nbd.STATE_ZERO == 0).tolist():
                    first, last = int(edges[number] - lengths[number]), int(edges[number])
                    if max(first, start) < min(last, end):
                        yield max(first, start), min(last, end)
            start = end

    def facts(self) -> tuple[FileFacts, ...]:
        kind = "read-only export" if Flag.READ_ONLY in self._export.flags else "export"
        block = self._export.min_block_bytes
        return (
            FileFacts(
                path=str(self.path),
                subformat=kind,
                size_bytes=self.size_bytes,
                block_bytes=block if block > 1 else None,
            ),
        )

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown()
        for connection in self._all:
            connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
