"""The blocks of a dynamic or differencing VHD: allocation table and sector bitmaps.

The block allocation table (BAT, section "Block Allocation Table and Data
Blocks") has one entry per block of the disk: the sector of the file at which
the block lies, or 0xFFFFFFFF. A block in the file is a sector bitmap, padded to
whole sectors, and the block's data behind it. In the bitmap bit 0x80 of the
first byte is the block's first sector; a cleared bit means that the sector was
never written: whatever lies in its place, it is the parent's, or zeros where
there is no parent.

Nothing in the table is believed before it was checked as a whole (`BlockMap`):
every block lies inside the file, on nothing else, and nowhere twice. What is
kept of it are two arrays with a row for each block that is there. A block's
bitmap is read when the block is first met. That it is all ones (what Hyper-V
and qemu write) or all zeros is remembered in a byte per block; the others are
kept in a cache of bounded size, one for all files of a chain.

Memory: nine bytes for each of at most `MAX_CHAIN_BLOCKS` allocated blocks, and the cache.
"""

from __future__ import annotations

import sys
from itertools import count
from typing import TYPE_CHECKING, Final, cast

import numpy as np

from replica.cache import Cache
from replica.errors import ImageError
from replica.images.overlay import clip, make_extents
from replica.images.source import Source
from replica.images.vhd_format import FOOTER_BYTES, HEADER_BYTES, NO_BLOCK, DynamicHeader
from replica.model import SECTOR_BYTES

if TYPE_CHECKING:
    from replica.images.image import Bytes
    from replica.images.overlay import Extents

    Flags = np.ndarray[tuple[int], np.dtype[np.bool_]]
    Grid = np.ndarray[tuple[int, int], np.dtype[np.uint8]]
    Rows = np.ndarray[tuple[int], np.dtype[np.int64]]
    Table = np.ndarray[tuple[int], np.dtype[np.uint32]]

MAX_BLOCKS: Final = 1 << 22
"""Most blocks of a disk. The largest VHD has 2^20 blocks of the usual 2 MiB, and fewer than 2^22 of 512 KiB."""
MAX_CHAIN_BLOCKS: Final = 6 << 20
"""Most allocated blocks of all files of a chain."""
MIN_BLOCK_BYTES: Final = SECTOR_BYTES
MAX_BLOCK_BYTES: Final = 256 << 20
_CACHED_BITMAP_BYTES: Final = 8 << 20
_ENTRIES_PER_READ: Final = 1 << 18
_UNKNOWN, _SOME, _ALL, _NONE = range(4)
"""What is known of a block's bitmap: nothing; that some bits are set; that all are; that none is."""


class ChainMemory:
    """What the block maps of one chain share, so that the chain's memory is bounded and not only each file's."""

    def __init__(self) -> None:
        self.bitmaps = Cache(_CACHED_BITMAP_BYTES)
        self.maps = count()
        self._left = MAX_CHAIN_BLOCKS

    def take(self, blocks: int) -> bool:
        """Whether so many allocated blocks may still be kept."""
        self._left -= blocks
        return self._left >= 0


class BlockMap:
    """Where the disk's blocks lie in one file. Thread-safe; the table is as it was when opened."""

    def __init__(
        self,
        source: Source,
        header: DynamicHeader,
        header_offset: int,
        size_bytes: int,
        stop: int,
        memory: ChainMemory,
    ) -> None:
        """Read and check the table. `stop`: where blocks must end (the footer, or the end of the file)."""
        self.source = source
        self.block_bytes = _block_bytes(source, header)
        self.size_bytes = size_bytes
        bits = self.block_bytes // SECTOR_BYTES
        self.bitmap_bytes = bitmap_bytes(self.block_bytes)
        self._bits = bits
        self._ones = np.packbits(np.ones(bits, dtype=np.uint8))
        self._numbers, self._sectors = _read_table(source, header, size_bytes, memory)
        reserved = [
            (0, FOOTER_BYTES),
            (header_offset, header_offset + HEADER_BYTES),
            (header.table_offset, header.table_offset + 4 * header.max_table_entries),
        ]
        _check_places(source, self._sectors, self.bitmap_bytes + self.block_bytes, reserved, stop)
        self._bits_set = np.full(len(self._numbers), _UNKNOWN, dtype=np.uint8)
        self._cache, self._key = memory.bitmaps, next(memory.maps)

    @property
    def count_allocated(self) -> int:
        """How many blocks are in the file."""
        return len(self._numbers)

    def outline(self, start: int, stop: int) -> Extents:
        """`Layer.outline`: whole blocks, `whole` where the bitmap is known to be all ones."""
        return clip(self._rows(*self._find(start, stop)), start, stop)

    def extents(self, start: int, stop: int) -> Extents:
        """`Layer.extents`: the sectors that were written. Reads bitmaps that are met for the first time."""
        first, last = self._find(start, stop)
        rows = self._rows(first, last)
        if not rows["whole"].all():
            some = np.flatnonzero(self._bits_set[first:last] <= _SOME) + first
            bitmaps = self._bitmaps(some)
            whole = self._remember(some, bitmaps)
            runs = self._runs(self._places(some[~whole]), bitmaps[~whole])
            rows = np.concatenate((rows[rows["whole"]], self._places(some[whole]), runs))
            rows = rows[np.argsort(rows["start"])]
        return clip(rows, start, min(stop, self.size_bytes))

    def _find(self, start: int, stop: int) -> tuple[int, int]:
        """The rows of the blocks that [start, stop) touches."""
        edges = np.array([start // self.block_bytes, -(-stop // self.block_bytes)], dtype=np.uint32)
        first, last = np.searchsorted(self._numbers, edges).tolist()
        return first, max(first, last)

    def _rows(self, first: int, last: int) -> Extents:
        """One row per block, but for those that are known to be empty."""
        bits = self._bits_set[first:last]
        rows = self._places(slice(first, last))
        rows["whole"] = bits == _ALL
        there = bits != _NONE
        return rows if there.all() else rows[there]

    def _places(self, which: slice | Rows) -> Extents:
        """One row per block, whatever its bitmap says."""
        starts = self._numbers[which].astype(np.int64) * self.block_bytes
        places = self._sectors[which].astype(np.int64) * SECTOR_BYTES + self.bitmap_bytes
        return make_extents(starts, np.minimum(starts + self.block_bytes, self.size_bytes), places)

    def _runs(self, blocks: Extents, bitmaps: Grid) -> Extents:
        """The runs of ones of these blocks' bitmaps."""
        present = np.zeros((len(blocks), self._bits + 2), dtype=np.bool_)  # each with a 0 before and behind it
        present[:, 1:-1] = np.unpackbits(bitmaps, axis=1, count=self._bits)
        flat = present.reshape(-1)
        edges = np.flatnonzero(flat[1:] != flat[:-1]).reshape(-1, 2)
        block, sector = np.divmod(edges, self._bits + 2)
        block, sector = block[:, 0], sector * SECTOR_BYTES
        begin, place = blocks["start"][block], blocks["place"][block]
        return make_extents(sector[:, 0] + begin, sector[:, 1] + begin, sector[:, 0] + place)

    def _bitmaps(self, rows: Rows) -> Grid:
        """These blocks' sector bitmaps, one in a row, from the cache or the file."""
        places = self._sectors[rows].astype(np.int64) * SECTOR_BYTES
        if not self._bits_set[rows].any():
            return self.source.read_each(places.tolist(), self.bitmap_bytes)
        cached = [cast("Bytes | None", self._cache.get((self._key, row))) for row in rows.tolist()]
        new = np.array([bitmap is None for bitmap in cached])
        bitmaps = np.empty((len(rows), self.bitmap_bytes), dtype=np.uint8)
        bitmaps[new] = self.source.read_each(places[new].tolist(), self.bitmap_bytes)
        for bitmap, known in zip(bitmaps, cached, strict=True):
            if known is not None:
                bitmap[:] = known
        return bitmaps

    def _remember(self, rows: Rows, bitmaps: Grid) -> Flags:
        """Which of these blocks have all their sectors. That, and which have none, is remembered; others are cached."""
        bits = bitmaps[:, : len(self._ones)] & self._ones
        whole: Flags = np.logical_and.reduce(bits == self._ones, axis=1)
        empty = ~np.logical_or.reduce(bits, axis=1)
        self._bits_set[rows[whole]], self._bits_set[rows[empty]] = _ALL, _NONE
        some = ~(whole | empty)
        self._bits_set[rows[some]] = _SOME
        for index in np.flatnonzero(some).tolist():
            self._cache.put((self._key, int(rows[index])), bitmaps[index].copy(), self.bitmap_bytes)
        return whole


def bitmap_bytes(block_bytes: int) -> int:
    """The size of a block's sector bitmap in the file, padded to whole sectors."""
    return -(-block_bytes // (SECTOR_BYTES * 8 * SECTOR_BYTES)) * SECTOR_BYTES


def _block_bytes(source: Source, header: DynamicHeader) -> int:
    size = header.block_bytes
    if not MIN_BLOCK_BYTES <= size <= MAX_BLOCK_BYTES or size & (size - 1):
        limits = f"a power of two from {MIN_BLOCK_BYTES} to {MAX_BLOCK_BYTES}"
        raise damaged(source, f"its blocks have {size} bytes, which is not {limits}")
    return size


def _read_table(source: Source, header: DynamicHeader, size_bytes: int, memory: ChainMemory) -> tuple[Table, Table]:
    """The allocated blocks of the disk's size: their numbers and sectors. Bounded before anything is allocated."""
    blocks = -(-size_bytes // header.block_bytes)
    if blocks > MAX_BLOCKS:
        problem = f"{size_bytes} bytes in blocks of {header.block_bytes} are more than {MAX_BLOCKS} blocks"
        raise damaged(source, problem)
    if header.max_table_entries < blocks:
        problem = f"its table has {header.max_table_entries} entries, the size {size_bytes} needs {blocks}"
        raise damaged(source, problem)
    if header.table_offset + 4 * header.max_table_entries > source.size_bytes:
        problem = f"its table ({header.max_table_entries} entries at {header.table_offset}) is not inside the file"
        raise damaged(source, problem)
    numbers: list[Table] = []
    sectors: list[Table] = []
    for first in range(0, blocks, _ENTRIES_PER_READ):
        table = np.empty(min(_ENTRIES_PER_READ, blocks - first), dtype=np.uint32)
        source.read_into(header.table_offset + 4 * first, table.data)
        if sys.byteorder == "little":
            table.byteswap(inplace=True)
        there = np.flatnonzero(table != NO_BLOCK)
        if not memory.take(len(there)):
            raise damaged(source, f"it and its parents have more than {MAX_CHAIN_BLOCKS} blocks in their files")
        numbers.append((there + first).astype(np.uint32))
        sectors.append(table[there])
    empty = [np.empty(0, dtype=np.uint32)]
    return np.concatenate(empty + numbers), np.concatenate(empty + sectors)


def _check_places(source: Source, sectors: Table, span: int, reserved: list[tuple[int, int]], stop: int) -> None:
    """Every allocated block (of `span` bytes) lies inside the file, beside the structures, and on no other block.

    In sectors, as the table has them: the arrays stay as small as it is.
    """
    starts = np.sort(sectors)
    if not len(starts):
        return
    last = int(starts[-1]) * SECTOR_BYTES
    if last + span > stop:
        raise damaged(source, f"a block at byte {last} reaches beyond the end of the file's data at {stop}")
    for begin, end in reserved:
        sector = min(-(-end // SECTOR_BYTES), NO_BLOCK)  # structures may lie where no table entry can point to
        before_end = int(np.searchsorted(starts, np.uint32(sector)))
        nearest = int(starts[before_end - 1]) * SECTOR_BYTES if before_end else -span
        if nearest + span > begin:
            raise damaged(source, f"a block at byte {nearest} lies on the headers or the table")
    crowded = np.flatnonzero(np.diff(starts) < span // SECTOR_BYTES)
    if len(crowded):
        where = (starts[crowded[0] : crowded[0] + 2].astype(np.int64) * SECTOR_BYTES).tolist()
        raise damaged(source, f"the blocks at bytes {where[0]} and {where[1]} overlap")


def damaged(source: Source, problem: str) -> ImageError:
    """The error for a VHD whose structures cannot be believed."""
    hint = "check it with the program that wrote it, or put back a copy"
    return ImageError(f"VHD {source.path} is damaged: {problem}", hint=hint)
