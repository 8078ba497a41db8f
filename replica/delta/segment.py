"""A segment: an immutable part of a delta, at most 4 MiB of raw data, sealed by itself.

    blob  = number u32 ‖ length of the sealed table u32 ‖ sealed table ‖ sealed chunks, one after the other
    table = disk u32 ‖ chunks u32 ‖ extents u32 ‖ chunk rows ‖ encoded extents
    chunk row = raw length u32 ‖ flags u32 (0 stored, 1 zstd frame) ‖ sealed length u32

The payload is cut into chunks of 128, 64 or 32 KiB so that a random read opens
one chunk, of at most 32 KiB sealed, and not 4 MiB. How, and which of them are
compressed, is in `native/src/chunk.rs`: a segment is sealed in one native call
that needs no interpreter, and opened in one. Equal payloads make equal chunks.

The blob's BLAKE3 digest goes into the manifest. It stands for the whole blob:
whoever checked it against an authentic manifest has the segment that was meant.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from blake3 import blake3

from replica import _native
from replica.delta.extents import EXTENT, Rows, as_bytes
from replica.delta.seal import TAG_BYTES, Opener, Sealer
from replica.errors import FormatError

if TYPE_CHECKING:
    from typing_extensions import Buffer

SEGMENT_RAW_BYTES = _native.SEGMENT_RAW_BYTES
MAX_EXTENTS = _native.MAX_EXTENTS
MAX_CHUNKS = _native.MAX_CHUNKS
DEFAULT_LEVEL = 1

_PREFIX = struct.Struct("<II")
PREFIX_BYTES = _PREFIX.size
_TABLE_HEAD_BYTES = 12
CHUNK = np.dtype([("raw", "<u4"), ("flags", "<u4"), ("sealed", "<u4")])
MAX_TABLE_BYTES = TAG_BYTES + _TABLE_HEAD_BYTES + MAX_CHUNKS * CHUNK.itemsize + MAX_EXTENTS * 21
MAX_BLOB_BYTES = PREFIX_BYTES + MAX_TABLE_BYTES + SEGMENT_RAW_BYTES + MAX_CHUNKS * TAG_BYTES
MIN_BLOB_BYTES = PREFIX_BYTES + TAG_BYTES + _TABLE_HEAD_BYTES + 2
"""A table of one extent and no chunk."""


@dataclass(frozen=True, eq=False)
class Segment:
    """Extents of one disk and the content of their DATA grains, one after the other.

    `disk` is the index in the delta's disk table. The last grain of a disk is
    filled up with zeros, so the payload is always whole grains. Immutable by
    agreement: nobody writes to `extents` or `payload`.
    """

    disk: int
    extents: Rows
    payload: Buffer

    @property
    def first(self) -> int:
        """First grain of the first extent."""
        return int(self.extents["first"][0])

    @property
    def last(self) -> int:
        """Last grain of the last extent (inclusive)."""
        return int(self.extents["first"][-1] + self.extents["count"][-1]) - 1

    @property
    def raw_bytes(self) -> int:
        return memoryview(self.payload).nbytes

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Segment):
            return NotImplemented
        same = self.disk == other.disk and self.extents.tobytes() == other.extents.tobytes()
        return same and bytes(self.payload) == bytes(other.payload)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class SealedSegment:
    """A segment as it travels and lies; `blob` goes to whatever file offset its sender allots."""

    number: int
    disk: int
    first: int
    last: int
    blob: bytes
    digest: bytes
    raw_bytes: int


@dataclass(frozen=True, eq=False)
class Table:
    """A segment's opened table: everything about it but the payload."""

    number: int
    disk: int
    extents: Rows
    chunks: np.ndarray[tuple[int], np.dtype[np.void]]
    raw_starts: np.ndarray[tuple[int], np.dtype[np.int64]]
    sealed_starts: np.ndarray[tuple[int], np.dtype[np.int64]]
    """Where each chunk begins in the payload, and in the blob; one entry more than chunks."""

    @property
    def payload_bytes(self) -> int:
        return int(self.raw_starts[-1])

    @property
    def blob_bytes(self) -> int:
        return int(self.sealed_starts[-1])


def seal_segment(sealer: Sealer, number: int, segment: Segment, level: int = DEFAULT_LEVEL) -> SealedSegment:
    """Compress and seal. Pure CPU, thread-safe; each number once per sealer."""
    assert 0 < len(segment.extents) <= MAX_EXTENTS and segment.raw_bytes <= SEGMENT_RAW_BYTES
    sealer.claim_segment(number)
    blob, digest = sealer.cipher.seal_segment(number, segment.disk, segment.extents, segment.payload, level)
    return SealedSegment(number, segment.disk, segment.first, segment.last, blob, digest, segment.raw_bytes)


def table_bytes(prefix: Buffer, number: int, blob_bytes: int, name: str) -> int:
    """Length of the sealed table after a blob's 8 bytes `prefix`. FormatError if it cannot be."""
    found, length = _PREFIX.unpack(prefix)
    if found != number:
        raise FormatError(f"where {name} should have segment {number} lies segment {found}")
    if not TAG_BYTES < length <= min(MAX_TABLE_BYTES, blob_bytes - PREFIX_BYTES):
        raise FormatError(f"segment {number} of {name} says its table has {length} bytes")
    return int(length)


def open_table(opener: Opener, number: int, sealed: Buffer, blob_bytes: int) -> Table:
    """The table in `sealed` of a blob of `blob_bytes`. DamageError, FormatError. Thread-safe."""
    disk, rows, extents = opener.cipher.open_table(number, sealed, blob_bytes)
    chunks = np.frombuffer(rows, dtype=CHUNK)
    lengths = chunks["sealed"].astype(np.int64)
    raw_starts = np.concatenate(([0], np.cumsum(chunks["raw"], dtype=np.int64)))
    sealed_starts = np.cumsum(np.concatenate(([blob_bytes - int(lengths.sum())], lengths)))
    return Table(number, disk, np.frombuffer(extents, dtype=EXTENT), chunks, raw_starts, sealed_starts)


def open_chunk(opener: Opener, table: Table, index: int, sealed: Buffer) -> bytes:
    """The raw bytes of one chunk. DamageError, FormatError. Thread-safe."""
    return opener.cipher.open_chunk(table.number, index, table.chunks[index].item(), sealed)


def open_segment(opener: Opener, number: int, blob: Buffer, grain_bytes: int) -> Segment:
    """The segment in `blob`, whose disk has grains of `grain_bytes`. Thread-safe.

    DamageError or FormatError when one bit of it, or the place it lies at, is not as sealed.
    """
    view = memoryview(blob).cast("B")
    if not MIN_BLOB_BYTES <= len(view) <= MAX_BLOB_BYTES:
        raise FormatError(f"segment {number} of {opener.name} has {len(view)} bytes")
    length = table_bytes(view[:PREFIX_BYTES], number, len(view), opener.name)
    disk, extents, payload = opener.cipher.open_segment(number, view, length, grain_bytes)
    return Segment(disk, np.frombuffer(extents, dtype=EXTENT), payload)


def check_blob(blob: Buffer, digest: bytes, number: int) -> None:
    """What a receiver can check on arrival, without the key: bounds, number and digest. FormatError."""
    view = memoryview(blob).cast("B")
    if not MIN_BLOB_BYTES <= len(view) <= MAX_BLOB_BYTES:
        raise FormatError(f"segment {number} has {len(view)} bytes; {MIN_BLOB_BYTES} to {MAX_BLOB_BYTES} are possible")
    table_bytes(view[:PREFIX_BYTES], number, len(view), "the delta")
    if blake3(as_bytes(view).data).digest() != digest:
        raise FormatError(f"segment {number} is not what its digest says")
