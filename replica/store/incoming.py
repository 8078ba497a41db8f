"""A delta on its way in: written where the sender said, resumable, complete or nothing.

While it arrives it is `incoming/<delta id>.part` (header, then sealed segments
at the offsets the sender allotted) and `incoming/<delta id>.index` (one record
per segment that was written). Neither is synced on the way: an acknowledged
segment may be lost in a power failure, and the sender is told which ones are
there when it opens the delta again. `finish` adds manifest and trailer, checks
that every segment the authenticated manifest names is here with its digest,
syncs, and only then gives the file its final name: *received*.

Index record, 64 bytes, little-endian: number u32, 0 u32, offset u64, length
u64, BLAKE3-256 of the segment 32, xxh3-64 of the 56 bytes before. A torn or
rotten record ends the index; segments are read again and their digests checked
when a process that did not write them takes the index over.

What is here is known in memory as a row of 44 bytes per segment, and a segment has a least size, so that a sender
that cuts a delta into a million of them costs tens of MiB and no more.

Thread-safe: segments may be received from several threads at once.
"""

from __future__ import annotations

import struct
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

import numpy as np
import numpy.typing as npt
import xxhash
from blake3 import blake3

from replica.delta import HEADER_BYTES, DeltaFileReader, Keyring, decode_header
from replica.delta.manifest import MAX_SEGMENTS
from replica.delta.segment import MAX_BLOB_BYTES, MIN_BLOB_BYTES
from replica.durable import File, FileSystem
from replica.errors import ConflictError, FormatError, ProtocolError, ReplicaError
from replica.model import DIGEST_BYTES, DeltaId
from replica.store.layout import Layout

if TYPE_CHECKING:
    from typing_extensions import Buffer

_RECORD = struct.Struct("<IIQQ32s")
_RECORD_BYTES = _RECORD.size + 8
MAX_DELTA_BYTES = 1 << 47


_ROW = np.dtype([("offset", "<u8"), ("length", "<u4"), ("digest", "u1", (DIGEST_BYTES,))])
_LEAST_ROWS = 64


class _Segments:
    """Which segments are here: a row for each number, its length 0 if that one is not."""

    def __init__(self) -> None:
        self._rows: npt.NDArray[np.void] = np.zeros(_LEAST_ROWS, _ROW)

    def __setitem__(self, number: int, row: npt.NDArray[np.void]) -> None:
        if number >= len(self._rows):
            rows = np.zeros(min(max(2 * len(self._rows), number + 1), MAX_SEGMENTS), _ROW)
            rows[: len(self._rows)] = self._rows
            self._rows = rows
        self._rows[number : number + 1] = row

    def __getitem__(self, number: int) -> npt.NDArray[np.void] | None:
        here = number < len(self._rows) and self._rows[number]["length"]
        return self._rows[number : number + 1] if here else None

    def numbers(self) -> npt.NDArray[np.intp]:
        """Of those that are here, ascending."""
        return np.flatnonzero(self._rows["length"])

    def differing(self, named: npt.NDArray[np.void]) -> npt.NDArray[np.intp]:
        """Numbers of a manifest's rows that are not here, or not as they are there."""
        rows = self._rows[: len(named)]
        named, beyond = named[: len(rows)], np.arange(len(rows), len(named))
        same = (rows["offset"] == named["offset"]) & (rows["length"] == named["length"])
        same &= (rows["digest"] == named["digest"]).all(axis=1)
        return np.concatenate((np.flatnonzero(~same), beyond))


def _row(offset: int, length: int, digest: bytes) -> npt.NDArray[np.void]:
    return np.array([(offset, length, np.frombuffer(digest, np.uint8))], _ROW)


class Incoming:
    """One delta that is arriving."""

    def __init__(
        self, fs: FileSystem, layout: Layout, delta_id: DeltaId, data: File, index: File, header: bytes
    ) -> None:
        self._fs = fs
        self._layout = layout
        self.delta_id = delta_id
        self.header = header
        self._data = data
        self._index = index
        self._index_end = 0
        self._segments = _Segments()
        self._mutex = threading.Condition()
        self._writing = 0
        self._closed = False

    @classmethod
    def start(cls, fs: FileSystem, layout: Layout, header: bytes) -> Incoming:
        """Take up the part file of `header`'s delta, or make it. ConflictError if it was begun with another header."""
        delta_id = decode_header(header).delta_id
        part, index = part_path(layout, delta_id), index_path(layout, delta_id)
        incoming = cls._resume_whole(fs, layout, delta_id) if fs.exists(part) and fs.exists(index) else None
        if incoming is not None:
            if incoming.header == header:
                return incoming
            incoming.close()
            raise ConflictError(
                f"delta {delta_id} was begun with another header",
                hint="a sender that reads its source again makes a new delta",
            )
        fs.unlink(part)
        fs.unlink(index)
        with ExitStack() as undo:
            data = undo.enter_context(fs.create(part))
            data.write(0, header)
            incoming = cls(fs, layout, delta_id, data, fs.create(index), header)
            undo.pop_all()
        return incoming

    @classmethod
    def _resume_whole(cls, fs: FileSystem, layout: Layout, delta_id: DeltaId) -> Incoming | None:
        """None if a power cut left not even the header: then nothing of it was worth keeping."""
        try:
            return cls.resume(fs, layout, delta_id)
        except FormatError:
            return None

    @classmethod
    def resume(cls, fs: FileSystem, layout: Layout, delta_id: DeltaId) -> Incoming:
        """Take up a delta that another process began: its segments are read, only whole ones count."""
        with ExitStack() as undo:
            data = undo.enter_context(fs.open(part_path(layout, delta_id), write=True))
            index = undo.enter_context(fs.open(index_path(layout, delta_id), write=True))
            header = data.read(0, HEADER_BYTES)
            decode_header(header)
            incoming = cls(fs, layout, delta_id, data, index, header)
            incoming._read_index()
            undo.pop_all()
        return incoming

    def _read_index(self) -> None:
        for position in range(0, self._index.size() - _RECORD_BYTES + 1, _RECORD_BYTES):
            record = self._index.read(position, _RECORD_BYTES)
            body, check = record[: _RECORD.size], record[_RECORD.size :]
            if check != xxhash.xxh3_64_intdigest(body).to_bytes(8, "little"):
                break
            number, _zero, offset, length, digest = _RECORD.unpack(body)
            blob = self._data.read(offset, min(length, MAX_BLOB_BYTES))
            if number < MAX_SEGMENTS and len(blob) == length and blake3(blob).digest() == digest:
                self._segments[number] = _row(offset, length, digest)
            self._index_end = position + _RECORD_BYTES

    def close(self) -> None:
        """Waits for writes that are under way: a descriptor must not be closed, and given out anew, under them."""
        with self._mutex:
            self._closed = True
            self._mutex.wait_for(lambda: self._writing == 0)
            self._data.close()
            self._index.close()

    def received(self) -> list[tuple[int, int]]:
        """Half-open ranges of the segment numbers that are here."""
        with self._mutex:
            numbers = self._segments.numbers()
        runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1) if len(numbers) else []
        return [(int(run[0]), int(run[-1]) + 1) for run in runs]

    def receive(self, number: int, offset: int, digest: bytes, blob: Buffer) -> None:
        """Write one segment at its offset. The same one again changes nothing.

        Raises ProtocolError (bounds), FormatError (digest), ConflictError
        (another segment of that number is here), StorageError.
        """
        length = memoryview(blob).nbytes
        if not (0 <= number < MAX_SEGMENTS and MIN_BLOB_BYTES <= length <= MAX_BLOB_BYTES):
            raise ProtocolError(f"segment {number} of {length} bytes is out of bounds")
        if not HEADER_BYTES <= offset <= MAX_DELTA_BYTES:
            raise ProtocolError(f"segment {number} at offset {offset} is out of bounds")
        if blake3(blob).digest() != digest:
            raise FormatError(f"segment {number} of delta {self.delta_id} does not have the digest it was sent with")
        row = _row(offset, length, digest)
        with self._mutex:
            if self._closed:
                raise ProtocolError(f"delta {self.delta_id} is not open any more", hint="begin it first")
            present = self._segments[number]
            if present is None:
                self._writing += 1
        if present is not None:
            if present.tobytes() != row.tobytes():
                raise ConflictError(f"another segment {number} of delta {self.delta_id} is already here")
            return
        try:
            self._data.write(offset, blob)
            self._data.start_writing(offset, length)
            body = _RECORD.pack(number, 0, offset, length, digest)
            with self._mutex:
                self._index.write(self._index_end, body + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little"))
                self._index_end += _RECORD_BYTES
                self._segments[number] = row
        finally:
            with self._mutex:
                self._writing -= 1
                self._mutex.notify_all()

    def finish(self, tail: bytes, tail_offset: int, keyring: Keyring) -> None:
        """Add manifest and trailer; when this returns the delta is durable and has its final name.

        Raises ProtocolError if a segment the manifest names is missing (send
        it, then finish again), DamageError if anything does not authenticate.
        """
        if not HEADER_BYTES <= tail_offset <= MAX_DELTA_BYTES:
            raise ProtocolError(f"manifest at offset {tail_offset} is out of bounds")
        with self._mutex:  # no segment may be written any more, and none may be under way when the files are closed
            self._closed = True
            self._mutex.wait_for(lambda: self._writing == 0)
        try:
            self._data.truncate(tail_offset)
            self._data.write(tail_offset, tail)
            with DeltaFileReader(self._fs.open(self._data.path), keyring) as reader:
                self._check_complete(reader)
        except ReplicaError:
            self._closed = False
            raise
        self._data.sync()
        self._fs.publish(self._data.path, final_path(self._layout, self.delta_id))
        self.close()
        self._fs.unlink(index_path(self._layout, self.delta_id))

    def _check_complete(self, reader: DeltaFileReader) -> None:
        if reader.marks_lost:
            raise FormatError(f"delta {self.delta_id} says that content is lost, which only a replica's inverses may")
        table = reader.manifest.table
        missing = self._segments.differing(table)
        if len(missing):
            raise ProtocolError(f"segment {missing[0]} of delta {self.delta_id} is missing", hint="send it again")
        if len(table) != len(self._segments.numbers()):
            raise ProtocolError(f"delta {self.delta_id} has segments that its manifest does not name")


def part_path(layout: Layout, delta_id: DeltaId) -> Path:
    return layout.incoming / f"{delta_id}.part"


def index_path(layout: Layout, delta_id: DeltaId) -> Path:
    return layout.incoming / f"{delta_id}.index"


def final_path(layout: Layout, delta_id: DeltaId) -> Path:
    return layout.incoming / str(delta_id)


def received(fs: FileSystem, layout: Layout) -> DeltaId | None:
    """A delta that arrived whole: it is being committed, or waits for that."""
    return next((delta_id for name, delta_id in held(fs, layout).items() if "." not in name), None)


def receiving(fs: FileSystem, layout: Layout) -> DeltaId | None:
    """The delta that is arriving or was received. What is committed leaves here only after `state` says so."""
    return next(iter(held(fs, layout).values()), None)


def held(fs: FileSystem, layout: Layout) -> dict[str, DeltaId]:
    """File name -> delta id of everything in `incoming/`; what has another kind of name is not the engine's."""
    found: dict[str, DeltaId] = {}
    for name in fs.list_names(layout.incoming):
        stem, _, suffix = name.partition(".")
        if suffix in ("", "part", "index"):
            with suppress(ValueError):
                found[name] = DeltaId(UUID(stem))
    return found


def discard_all(fs: FileSystem, layout: Layout, *, keep: DeltaId | None = None) -> None:
    """Remove every delta that is arriving or was received, but for `keep`."""
    for name, delta_id in held(fs, layout).items():
        if delta_id != keep:
            fs.unlink(layout.incoming / name)
