"""Reading delta files: header ‖ segments in any order ‖ sealed manifest ‖ trailer.

Opening a file checks everything but the segments: header, key commitment,
trailer, manifest, and that the segments it names fill the file exactly. After
that nothing is read past what an authentic number asked for. `segment` checks
one segment against the manifest; `verify` checks them all, and is what a
receiver runs before it lets a delta near a head.

A reader is a `Delta` (walk it in order) and a `Layer` (read it at random, see
`read`). It holds the manifest as a table and opens one segment at a time.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from types import TracebackType
from typing import Self

import numpy as np
from blake3 import blake3

from replica.delta.change import DiskChange, check_rows, check_segment
from replica.delta.extents import Rows, stop_of
from replica.delta.header import HEADER_BYTES, MIN_MANIFEST_BYTES, TRAILER_BYTES, decode_header, decode_trailer
from replica.delta.keys import KeySource
from replica.delta.manifest import SegmentEntry, check_layout, decode_manifest
from replica.delta.seal import TAG_BYTES, Kind, Opener
from replica.delta.segment import (
    MAX_BLOB_BYTES,
    PREFIX_BYTES,
    Segment,
    Table,
    open_chunk,
    open_segment,
    open_table,
    table_bytes,
)
from replica.durable import File
from replica.errors import FormatError
from replica.model import DeltaId, Stamp, State
from replica.progress import Progress, silent

OPENING_THREADS = 2
"""Segments that are opened ahead."""


class _Scratch(threading.local):
    """Where a thread reads blobs to, again and again: fresh memory for each costs more than reading does."""

    @cached_property
    def blob(self) -> memoryview:
        return np.empty(MAX_BLOB_BYTES, np.uint8).data  # not zeroed: most deltas use little of it


class DeltaFileReader:
    """An open delta file. Thread-safe. Owns `file`, and closes it even when it turns out to be no delta.

    Raises FormatError (no complete delta file), KeyMissingError, DamageError (a seal does not fit),
    StorageError (cannot read).
    """

    def __init__(self, file: File, keys: KeySource) -> None:
        self._file = file
        self.name = str(file.path)
        self._scratch = _Scratch()
        try:
            self._open(keys)
        except BaseException:
            file.close()
            raise

    def _open(self, keys: KeySource) -> None:
        size = self._file.size()
        if size < HEADER_BYTES + MIN_MANIFEST_BYTES + TRAILER_BYTES:
            raise FormatError(f"{self.name} has {size} bytes, too few for a delta file")
        self.header = decode_header(self._read(0, HEADER_BYTES), self.name)
        trailer = decode_trailer(self._read(size - TRAILER_BYTES, TRAILER_BYTES), size, self.name)
        self._opener = Opener(self.header, keys, self.name)
        sealed = self._read(trailer.manifest_offset, trailer.manifest_bytes)
        plain = self._opener.open(Kind.MANIFEST, 0, 0, sealed, len(sealed) - TAG_BYTES)
        self.manifest = decode_manifest(plain, self.name)
        if self.manifest.delta_id != self.header.delta_id or self.base.replica_id != self.header.replica_id:
            raise FormatError(f"the manifest of {self.name} belongs to another delta")
        check_layout(self.manifest.table, trailer.manifest_offset, self.name)
        self.stored_bytes = size

    @property
    def delta_id(self) -> DeltaId:
        return self.manifest.delta_id

    @property
    def base(self) -> State:
        return self.manifest.base

    @property
    def result(self) -> State:
        return self.manifest.result

    @property
    def committed(self) -> Stamp:
        """Of an inverse: when its result had been committed."""
        return self.manifest.committed

    @property
    def disks(self) -> tuple[DiskChange, ...]:
        return self.manifest.disks

    @property
    def marks_lost(self) -> bool:
        """Whether there may be LOST extents in it: content that nobody has any more."""
        return self.manifest.lost

    def __len__(self) -> int:
        """Number of segments."""
        return len(self.manifest.table)

    def segment(self, number: int) -> Segment:
        """One segment, read, opened and checked to be canonical. DamageError, FormatError."""
        entry = self.manifest.entry(number)
        blob = self._scratch.blob[: entry.length]
        if self._file.read_into(entry.offset, blob) != entry.length:
            raise FormatError(f"{self.name} ends inside of what it holds")
        if blake3(blob).digest() != entry.digest:
            raise FormatError(f"segment {number} of {self.name} is not the one its manifest names")
        change = self.disks[entry.disk]
        segment = open_segment(self._opener, number, blob, change.grain_bytes)
        self._check_range(entry, segment.disk, segment.extents)
        check_segment(change, segment, lost=self.marks_lost)
        return segment

    def segments(self) -> Iterator[Segment]:
        """All, in number order; the next ones are read and opened in threads meanwhile."""
        if len(self) < 2:
            yield from (self.segment(number) for number in range(len(self)))
            return
        with ThreadPoolExecutor(OPENING_THREADS, "open") as pool:
            running: deque[Future[Segment]] = deque()
            try:
                for number in range(len(self)):
                    running.append(pool.submit(self.segment, number))
                    if len(running) > OPENING_THREADS:
                        yield running.popleft().result()
                while running:
                    yield running.popleft().result()
            finally:
                for future in running:
                    future.cancel()

    def table(self, number: int) -> Table:
        """A segment's extents and chunks, without reading its payload. Opened anew at every call."""
        entry = self.manifest.entry(number)
        length = table_bytes(self._read(entry.offset, PREFIX_BYTES), number, entry.length, self.name)
        table = open_table(self._opener, number, self._read(entry.offset + PREFIX_BYTES, length), entry.length)
        self._check_range(entry, table.disk, table.extents)
        check_rows(self.disks[entry.disk], table.extents, lost=self.marks_lost)
        return table

    def chunk(self, table: Table, index: int) -> bytes:
        """Raw bytes of one chunk of a segment's payload. Opened anew at every call."""
        start, stop = (int(table.sealed_starts[i]) for i in (index, index + 1))
        return open_chunk(
            self._opener, table, index, self._read(self.manifest.entry(table.number).offset + start, stop - start)
        )

    def extents(self) -> Iterator[tuple[int, Rows]]:
        """(disk index, rows) of all segments in number order; no payload is read."""
        return ((t.disk, t.extents) for t in (self.table(n) for n in range(len(self))))

    def overlapping(self, disk: int, first: int, stop: int) -> range:
        """Numbers of the segments of `disk` that may touch grains [first, stop)."""
        table = self.manifest.table
        low, high = (int(np.searchsorted(table["disk"], disk, side)) for side in ("left", "right"))
        part = table[low:high]
        begin = low + int(np.searchsorted(part["last"], np.uint64(first), "left"))
        end = low + int(np.searchsorted(part["first"], np.uint64(stop), "left"))
        return range(begin, max(begin, end))

    def span(self, number: int) -> tuple[int, int]:
        """First grain of a segment, and the one behind its last, as the manifest says."""
        entry = self.manifest.entry(number)
        return entry.first, entry.last + 1

    def verify(self, progress: Progress = silent) -> None:
        """Read and open everything. DamageError or FormatError at the first thing that is not as sealed."""
        done = 0
        for number in range(len(self)):
            self.segment(number)
            done += int(self.manifest.table["length"][number])
            progress(done, self.stored_bytes)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _check_range(self, entry: SegmentEntry, disk: int, rows: Rows) -> None:
        if (disk, int(rows["first"][0]), stop_of(rows) - 1) != (entry.disk, entry.first, entry.last):
            raise FormatError(f"segment {entry.number} of {self.name} covers something else than its manifest says")

    def _read(self, offset: int, length: int) -> bytes:
        """Exactly that; the numbers were checked against the file's size."""
        data = self._file.read(offset, length)
        if len(data) != length:
            raise FormatError(f"{self.name} ends inside of what it holds")
        return data
