"""The blocks of a dynamic VHD: allocation table and sector bitmaps.

The block allocation table (BAT, section "Block Allocation Table and Data
Blocks") has one entry per block of the disk: the sector of the file at which
the block lies, or 0xFFFFFFFF. A block in the file is a sector bitmap, padded to
whole sectors, and the block's data behind it. In the bitmap bit 0x80 of the
first byte is the block's first sector; a cleared bit means that the sector was
never written: it reads as zeros whatever lies in its place.

Nothing in the table is believed before it was checked as a whole (`BlockMap`):
every block lies inside the file, on nothing else, and nowhere twice. After that
a read is at most one `pread` per block, plus one for the block's bitmap when it
is first met. That a bitmap is all ones (what Hyper-V and qemu write) is
remembered in a byte per block; the others are kept in a cache of bounded size.

Memory: at most `MAX_BLOCKS` entries of five bytes, and the cache.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import numpy as np

from replica.errors import ImageError
from replica.images.source import DataCursor, Source
from replica.images.vhd_format import FOOTER_BYTES, HEADER_BYTES, NO_BLOCK, DynamicHeader
from replica.model import SECTOR_BYTES

if TYPE_CHECKING:
    from replica.images.image import Bytes

    Table = np.ndarray[tuple[int], np.dtype[np.uint32]]

MAX_BLOCKS: Final = 1 << 22
"""Most blocks of a disk. The largest VHD has 2^20 blocks of the usual 2 MiB, and fewer than 2^22 of 512 KiB."""
MIN_BLOCK_BYTES: Final = SECTOR_BYTES
MAX_BLOCK_BYTES: Final = 256 << 20
_CACHED_BITMAP_BYTES: Final = 8 << 20


class BlockMap:
    """Where the disk's blocks lie. Thread-safe; the table is as it was when opened."""

    def __init__(self, source: Source, header: DynamicHeader, header_offset: int, size_bytes: int, stop: int) -> None:
        """Read and check the table. `stop`: where blocks must end (the footer, or the end of the file)."""
        self.source = source
        self.block_bytes = _block_bytes(source, header)
        self.size_bytes = size_bytes
        bits = self.block_bytes // SECTOR_BYTES
        self.bitmap_bytes = -(-bits // (8 * SECTOR_BYTES)) * SECTOR_BYTES
        self._table = _table(source, header, size_bytes)
        reserved = [
            (0, FOOTER_BYTES),
            (header_offset, header_offset + HEADER_BYTES),
            (header.table_offset, header.table_offset + 4 * header.max_table_entries),
        ]
        _check_places(source, self._table, self.bitmap_bytes + self.block_bytes, reserved, stop)
        self._full = np.zeros(len(self._table), dtype=np.uint8)
        self._bitmaps: OrderedDict[int, Bytes] = OrderedDict()
        self._lock = threading.Lock()

    def allocated(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Half-open ranges of the disk that lie in allocated blocks and in no hole of the file (may touch)."""
        cursor = DataCursor(self.source)
        first, last = start // self.block_bytes, -(-stop // self.block_bytes)
        for step in range(first, last, 1 << 16):
            for block in step + np.flatnonzero(self._table[step : min(step + (1 << 16), last)] != NO_BLOCK):
                begin = int(block) * self.block_bytes
                end = min(begin + self.block_bytes, stop)
                shift = self._data_offset(int(block)) - begin
                for run_start, run_stop in cursor.runs(max(begin, start) + shift, end + shift):
                    yield run_start - shift, run_stop - shift

    def read_into(self, offset: int, target: Bytes) -> None:
        """Fill `target` from the disk; the caller has checked the range."""
        done = 0
        while done < len(target):
            block, within = divmod(offset + done, self.block_bytes)
            length = min(self.block_bytes - within, len(target) - done)
            part = target[done : done + length]
            if self._table[block] == NO_BLOCK:
                part[:] = 0
            else:
                self._read_block(block, within, part)
            done += length

    def _read_block(self, block: int, within: int, part: Bytes) -> None:
        """Read inside one allocated block: its data, then zeros over the sectors that were never written."""
        bitmap = None if self._full[block] else self._bitmap(block)
        if bitmap is None:
            self.source.read_into(self._data_offset(block) + within, part.data)
            return
        first, last = within // SECTOR_BYTES, -(-(within + len(part)) // SECTOR_BYTES)
        byte = first // 8
        present = np.unpackbits(bitmap[byte : -(-last // 8)])[first - byte * 8 : last - byte * 8]
        if not present.any():
            part[:] = 0
            return
        self.source.read_into(self._data_offset(block) + within, part.data)
        edges = np.flatnonzero(np.diff(present, prepend=1, append=1))
        for begin, end in edges.reshape(-1, 2).tolist():
            part[max(0, (first + begin) * SECTOR_BYTES - within) : (first + end) * SECTOR_BYTES - within] = 0

    def _bitmap(self, block: int) -> Bytes | None:
        """The block's sector bitmap, or None if every sector is there (and that is remembered)."""
        with self._lock:
            if block in self._bitmaps:
                self._bitmaps.move_to_end(block)
                return self._bitmaps[block]
        count_bits = self.block_bytes // SECTOR_BYTES
        data = self.source.read(int(self._table[block]) * SECTOR_BYTES, self.bitmap_bytes)
        bitmap = np.frombuffer(data, dtype=np.uint8, count=-(-count_bits // 8))
        if np.unpackbits(bitmap, count=count_bits).all():
            self._full[block] = 1
            return None
        with self._lock:
            self._bitmaps[block] = bitmap
            while len(self._bitmaps) * self.bitmap_bytes > _CACHED_BITMAP_BYTES:
                self._bitmaps.popitem(last=False)
        return bitmap

    def _data_offset(self, block: int) -> int:
        return int(self._table[block]) * SECTOR_BYTES + self.bitmap_bytes


def _block_bytes(source: Source, header: DynamicHeader) -> int:
    size = header.block_bytes
    if not MIN_BLOCK_BYTES <= size <= MAX_BLOCK_BYTES or size & (size - 1):
        limits = f"a power of two from {MIN_BLOCK_BYTES} to {MAX_BLOCK_BYTES}"
        raise damaged(source, f"its blocks have {size} bytes, which is not {limits}")
    return size


def _table(source: Source, header: DynamicHeader, size_bytes: int) -> Table:
    """The table's entries for the disk's size, bounded before anything is allocated."""
    count = -(-size_bytes // header.block_bytes)
    if count > MAX_BLOCKS:
        raise damaged(source, f"{size_bytes} bytes in blocks of {header.block_bytes} are more than {MAX_BLOCKS} blocks")
    if header.max_table_entries < count:
        problem = f"its table has {header.max_table_entries} entries, the size {size_bytes} needs {count}"
        raise damaged(source, problem)
    if header.table_offset + 4 * header.max_table_entries > source.size_bytes:
        problem = f"its table ({header.max_table_entries} entries at {header.table_offset}) is not inside the file"
        raise damaged(source, problem)
    table: Table = np.empty(count, dtype=np.uint32)
    source.read_into(header.table_offset, table.data)
    return table.byteswap(inplace=True) if sys.byteorder == "little" else table


def _check_places(source: Source, table: Table, span: int, reserved: list[tuple[int, int]], stop: int) -> None:
    """Every allocated block (of `span` bytes) lies inside the file, beside the structures, and on no other block.

    In sectors, as the table has them: the arrays stay as small as it is.
    """
    starts = table[table != NO_BLOCK]
    starts.sort()
    if not len(starts):
        return
    last = int(starts[-1]) * SECTOR_BYTES
    if last + span > stop:
        raise damaged(source, f"a block at byte {last} reaches beyond the end of the file's data at {stop}")
    for begin, end in reserved:
        before_end = int(np.searchsorted(starts, -(-end // SECTOR_BYTES)))
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
