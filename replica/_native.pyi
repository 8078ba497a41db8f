"""The native kernels (Rust, `native/`): per-grain and per-extent work on whole windows.

Buffers are any C-contiguous buffers and are taken as plain bytes, so a numpy array
of any dtype, structured ones included, can be handed over as it is; 64-bit numbers
in them are little-endian. All functions release the GIL and are thread-safe as
long as nobody writes to a buffer that a running call was given. A buffer of the
wrong size, read-only where it is written, not contiguous, or overlapping another
argument, and content that is not valid, raise ValueError; negative numbers raise
OverflowError.

Grains and leaves are powers of two from 512 B to 1 MiB. The last piece of a window
may be short and counts as if filled up with zeros.
"""

from collections.abc import Sequence
from typing import Any, final

import numpy.typing as npt
from typing_extensions import Buffer

_Memory = Buffer | npt.NDArray[Any]

__all__ = [
    "MAX_CHUNKS",
    "MAX_EXTENTS",
    "SEGMENT_RAW_BYTES",
    "TAG_BYTES",
    "Cipher",
    "__version__",
    "crc32c",
    "decode_extents",
    "encode_extents",
    "gather",
    "hash_leaves",
    "hash_leaves_at",
    "hash_node",
    "overlay",
    "scan",
    "zeros",
]

__version__: str
SEGMENT_RAW_BYTES: int
MAX_EXTENTS: int
MAX_CHUNKS: int
TAG_BYTES: int

def scan(
    window: _Memory, grain_bytes: int, secret: _Memory, old: _Memory | None, new: _Memory, dirty: _Memory
) -> tuple[int, int]:
    """Digest every grain of `window` and compare with what was stored; one pass.

    `secret` has 192 bytes. `old` (or None: nothing known, all dirty) and `new` hold
    a u64 per grain, `dirty` a u8. Written: `new[i]` = 0 for a zero grain, else its
    XXH3-64 under the secret with 0 made 1; `dirty[i]` = 1 where that differs from
    `old[i]`, else 0. `new` must not be `old`. Returns (dirty grains, zero grains).
    """

def zeros(window: _Memory, grain_bytes: int, out: _Memory) -> None:
    """Write `out[i]` (u8) = 1 where grain i is all zero, else 0."""

def hash_leaves(window: _Memory, leaf_bytes: int, first_leaf: int, select: _Memory | None, out: _Memory) -> None:
    """Write the 32-byte Merkle digest of every leaf with `select[i] != 0` (None: all); leave the others."""

def hash_leaves_at(window: _Memory, leaf_bytes: int, numbers: _Memory, out: _Memory) -> None:
    """Merkle digests of leaves that lie one behind the other in `window` and anywhere in the disk.

    numbers: u64[n], the leaves' indexes; out: u8[n, 32]. Only the last leaf may be short.
    """

def hash_node(children: _Memory, level: int) -> bytes:
    """The digest (32 bytes) of a node at `level` (1 to 4) from its 256 children's (8192 bytes)."""

def encode_extents(rows: _Memory) -> bytes:
    """Encode a table (u64[n, 3]: first, count, data 0|1; ascending, disjoint, count >= 1) as varints."""

def decode_extents(encoded: _Memory, max_rows: int) -> bytes:
    """The table that `encode_extents` made these bytes of, as the bytes of u64[n, 3]; at most `max_rows` rows.

    Every table has exactly one encoding; anything else is refused.
    """

def overlay(lower: _Memory, upper: _Memory) -> bytes:
    """`upper` laid over `lower` (tables as above), as the bytes of u64[n, 5].

    A row is (first, count, data, source, offset): source 0 is `lower`, 1 is `upper`;
    offset is the place in the source's payload in grains, and 0 for zero extents.
    Rows ascend, do not overlap, and are merged only where one source simply goes on.
    """

def gather(rows: _Memory, sources: Sequence[_Memory], grain_bytes: int) -> bytes:
    """The payload of the data rows of such a u64[n, 5] table, concatenated; `sources` by number."""

def crc32c(data: _Memory, crc: int = 0) -> int:
    """CRC-32C (Castagnoli) of `data`, going on from the CRC `crc` of what stands before it."""

@final
class Cipher:
    """AES-256-GCM in one delta file; `name` is the file's, for messages. Thread-safe, also while calls are running.

    Numbers are of 32 bits. Methods that open raise DamageError for what was not sealed under this key in this file
    (`header_digest`: BLAKE3 of its header), at this place, as this; FormatError for what was, and still is no
    segment; ValueError for a wrong call. No memory is asked for by a number that is neither authentic nor bounded.
    """

    def __new__(cls, key: bytes, header_digest: bytes, name: str) -> Cipher: ...
    def seal(self, kind: int, segment: int, chunk: int, data: _Memory, raw_bytes: int, flags: int = 0) -> bytes:
        """Ciphertext and tag. Never twice for one (kind, segment, chunk)."""

    def open(self, kind: int, segment: int, chunk: int, sealed: _Memory, raw_bytes: int, flags: int = 0) -> bytes:
        """What `seal` was given there."""

    def seal_segment(
        self, number: int, disk: int, extents: _Memory, payload: _Memory, level: int
    ) -> tuple[bytes, bytes]:
        """(blob, its BLAKE3 digest). Never twice for one number. `extents`: u64[n, 3], `level`: of zstd."""

    def open_table(self, number: int, sealed: _Memory, blob_bytes: int) -> tuple[int, bytes, bytes]:
        """(disk, chunks as u32[n, 3]: raw length, flags, sealed length, extents as u64[n, 3])."""

    def open_chunk(self, number: int, index: int, row: tuple[int, int, int], sealed: _Memory) -> bytes:
        """The raw bytes of the chunk with that row of the table."""

    def open_segment(self, number: int, blob: _Memory, table_bytes: int, grain_bytes: int) -> tuple[int, bytes, bytes]:
        """(disk, extents as u64[n, 3], payload). `table_bytes`: of the sealed table, as the blob's prefix says."""
