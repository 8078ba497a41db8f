"""The blocks of a VHDX: block allocation table and sector bitmaps.

Source: [MS-VHDX] §2.4, §2.5. An entry of the block allocation table (BAT) has 64
bits: the block's state in the lowest three, its place in the file in MiB in the
upper 44. The payload blocks of a chunk (2^23 sectors of the disk) are followed by
one entry of the chunk's sector bitmap block, which lies in the file like a
payload block, has 1 MiB, and counts for payload blocks that are partially
present: bit 0 of byte 0 is the chunk's first sector, and a cleared bit means that
the sector is the parent's.

    state                              reads as
    0 not present                      the parent's; zeros without a parent
    1 undefined, 2 zero, 3 unmapped    zeros, with and without a parent
    6 fully present                    the block in the file
    7 partially present                by the bitmap; not allowed without a parent
    4, 5                               reserved: refused

Without a parent the bitmap entries mean nothing (and some writers leave anything
in them), so they are not looked at.

Nothing in the table is believed before it was checked as a whole: every block
lies inside the file, on nothing else, and nowhere twice. The last block may be
cut off behind the disk's end, as qemu leaves it in fixed images.

Memory: four bytes per block, only where the table in the file is no hole, and a
bounded cache of bitmaps.
"""

from __future__ import annotations

import itertools
import mmap
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

import numpy as np

from replica.images.overlay import ZEROS, clip, make_extents
from replica.images.source import Source
from replica.images.vhdx_format import (
    BITMAP_BLOCK_BYTES,
    BITMAP_PRESENT,
    FULLY_PRESENT,
    MIB,
    NOT_PRESENT,
    PARTIALLY_PRESENT,
    Region,
)
from replica.images.vhdx_log import damaged
from replica.images.vhdx_metadata import Metadata

if TYPE_CHECKING:
    from replica.images.image import Bytes
    from replica.images.overlay import Extents

    Table = np.ndarray[tuple[int], np.dtype[np.uint32]]
    Entries = np.ndarray[tuple[int, ...], np.dtype[np.uint64]]

# The table in memory: 0 for the parent's, `_ZEROS`, or the place in MiB with `_PARTIAL` over it.
_ZEROS: Final = 0x7FFFFFFF
_PARTIAL: Final = 0x80000000
_PLACE: Final = 0x7FFFFFFF
_READ_ENTRIES: Final = 1 << 17
_CACHED_BITMAP_BYTES: Final = 8 << 20


class BlockMap:
    """Where the disk's blocks lie. Thread-safe; the table is as it was when opened."""

    def __init__(self, source: Source, region: Region, metadata: Metadata, reserved: list[Region]) -> None:
        """Read and check the table in `region`. `reserved`: where no block may lie. ImageError for what cannot be."""
        self._source = source
        self._metadata = metadata
        self.block_bytes = metadata.block_bytes
        self._span = metadata.block_bytes // MIB
        if metadata.count_entries * 8 > region.length:
            problem = f"its table has {region.length // 8} entries, its size needs {metadata.count_entries}"
            raise damaged(source, problem)
        count = max(1, metadata.count_blocks)
        self._table: Table = np.frombuffer(mmap.mmap(-1, count * 4), dtype=np.uint32)[: metadata.count_blocks]
        self._bitmaps: dict[int, int] = {}
        self._read(region)
        self._check_places(reserved)
        self._pieces: OrderedDict[int, Bytes] = OrderedDict()
        self._lock = threading.Lock()

    def outline(self, start: int, stop: int) -> Extents:
        """What the file may answer for in [start, stop), from the table alone (`overlay.Layer`).

        Behind the disk's end it answers with zeros, so that a child that is larger does not see a larger parent's.
        """
        end = self._metadata.size_bytes
        beyond = make_extents([max(start, end)], [stop], [ZEROS])[: stop > end]
        stop = min(stop, end)
        if start >= stop:
            return beyond
        first, last = start // self.block_bytes, -(-stop // self.block_bytes)
        table = self._table[first:last]
        blocks = np.flatnonzero(table)
        entries = table[blocks]
        lies = entries != _ZEROS
        step = np.where(lies, np.uint32(self._span), np.uint32(0))
        joined = (np.diff(blocks) == 1) & (entries[1:] == entries[:-1] + step[:-1])
        joined &= (entries[1:] < _PARTIAL) & (entries[:-1] < _PARTIAL)
        heads = np.flatnonzero(np.concatenate(([True], ~joined))[: len(blocks)])
        ends = np.append(heads[1:], len(blocks))
        place = np.where(lies, (entries & np.uint32(_PLACE)).astype(np.int64) * MIB, ZEROS)[heads]
        begin = (first + blocks[heads]) * self.block_bytes
        rows = clip(
            make_extents(begin, begin + (ends - heads) * self.block_bytes, place, entries[heads] < _PARTIAL),
            start,
            stop,
        )
        return np.concatenate([rows, beyond]) if len(beyond) else rows

    def extents(self, start: int, stop: int) -> Extents:
        """What the file answers for in [start, stop), sector bitmaps looked at (`overlay.Layer`)."""
        rows = self.outline(start, stop)
        partial = np.flatnonzero(~rows["whole"]).tolist()
        if not partial:
            return rows
        parts = [rows[: partial[0]]]
        for index, after in zip(partial, [*partial[1:], len(rows)], strict=True):
            parts += [self._sectors(*rows[index].item()[:3]), rows[index + 1 : after]]
        return np.concatenate(parts)

    def _sectors(self, start: int, stop: int, place: int) -> Extents:
        """The sectors that are there of [start, stop), a part of one block."""
        sector = self._metadata.sector_bytes
        block, within = divmod(start, self.block_bytes)
        first, last = within // sector, -(-(within + stop - start) // sector)
        byte = first // 8
        bits = np.unpackbits(self._bitmap(block)[byte : -(-last // 8)], bitorder="little")
        present = bits[first - byte * 8 : last - byte * 8]
        edges = np.flatnonzero(np.diff(present, prepend=0, append=0)).reshape(-1, 2) * sector + (first * sector)
        edges += block * self.block_bytes
        begin = np.maximum(edges[:, 0], start)
        return make_extents(begin, np.minimum(edges[:, 1], stop), place + begin - start)

    def _bitmap(self, block: int) -> Bytes:
        """The block's part of its chunk's sector bitmap."""
        with self._lock:
            if block in self._pieces:
                self._pieces.move_to_end(block)
                return self._pieces[block]
        chunk, within = divmod(block, self._metadata.chunk_blocks)
        length = BITMAP_BLOCK_BYTES // self._metadata.chunk_blocks
        data = self._source.read(self._bitmaps[chunk] * MIB + within * length, length)
        piece = np.frombuffer(data, dtype=np.uint8)
        with self._lock:
            self._pieces[block] = piece
            while len(self._pieces) * length > _CACHED_BITMAP_BYTES:
                self._pieces.popitem(last=False)
        return piece

    def _read(self, region: Region) -> None:
        """Fill the table, a piece of whole chunks at a time; holes of the file are entries of zero."""
        ratio = self._metadata.chunk_blocks
        chunks = max(1, _READ_ENTRIES // (ratio + 1))
        for chunk in range(0, -(-len(self._table) // ratio), chunks):
            table = self._table[chunk * ratio : (chunk + chunks) * ratio]
            start = region.offset + chunk * (ratio + 1) * 8
            stop = min(start + chunks * (ratio + 1) * 8, region.offset + self._metadata.count_entries * 8)
            if self._source.next_data(start) >= stop:
                continue
            entries: Entries = np.zeros((-(-len(table) // ratio), ratio + 1), dtype=np.uint64)
            self._source.read_into(start, entries.reshape(-1).view(np.uint8)[: stop - start].data)
            payload = entries[:, :ratio].reshape(-1)[: len(table)]
            self._take(payload.astype("<u8", copy=False), table, chunk * ratio)
            if self._metadata.has_parent:
                self._take_bitmaps(entries[:, ratio], table, chunk)

    def _take(self, entries: Entries, table: Table, first: int) -> None:
        """Payload entries into the table; `first` is the number of the first block."""
        states, places = entries & np.uint64(7), entries >> np.uint64(20)
        lies = states >= FULLY_PRESENT
        allowed = lies | (states < 4)
        if not self._metadata.has_parent:
            allowed &= states != PARTIALLY_PRESENT
        if not allowed.all():
            block = int(np.argmin(allowed))
            problem = f"block {first + block} is in state {int(states[block])}, which is not allowed"
            raise damaged(self._source, problem)
        limit = -(-self._source.size_bytes // MIB)
        outside = lies & ((places < 1) | (places >= limit))
        if outside.any():
            block = int(np.argmax(outside))
            raise damaged(self._source, f"block {first + block} at MiB {int(places[block])} is not inside the file")
        zeros = ~lies & (states != NOT_PRESENT)
        table[lies] = places[lies]
        table[zeros] = _ZEROS
        table[states == PARTIALLY_PRESENT] |= np.uint32(_PARTIAL)

    def _take_bitmaps(self, entries: Entries, table: Table, first_chunk: int) -> None:
        """Where the chunks' bitmaps lie. One must be there where a block is partially present (§2.5.1.2)."""
        ratio = self._metadata.chunk_blocks
        for index, entry in enumerate(entries.tolist()):
            chunk, state, place = first_chunk + index, entry & 7, entry >> 20
            if state not in (NOT_PRESENT, BITMAP_PRESENT):
                problem = f"the sector bitmap of chunk {chunk} is in state {state}, which is not allowed"
                raise damaged(self._source, problem)
            if state == BITMAP_PRESENT:
                if not place >= 1 or place * MIB + BITMAP_BLOCK_BYTES > self._source.size_bytes:
                    problem = f"the sector bitmap of chunk {chunk} at MiB {place} is not inside the file"
                    raise damaged(self._source, problem)
                self._bitmaps[chunk] = place
            elif (table[index * ratio : (index + 1) * ratio] >= _PARTIAL).any():
                problem = f"blocks of chunk {chunk} are partially present, but it has no sector bitmap"
                raise damaged(self._source, problem)

    def _check_places(self, reserved: list[Region]) -> None:
        """Every block lies inside the file, on no other block, and on none of the `reserved` places."""
        starts = self._table & np.uint32(_PLACE)
        starts = starts[(starts != 0) & (starts != _ZEROS)]
        starts.sort()
        others = [*reserved, *(Region(place * MIB, BITMAP_BLOCK_BYTES) for place in self._bitmaps.values())]
        others.sort(key=lambda region: region.offset)
        for before, after in itertools.pairwise(others):
            if before.stop > after.offset:
                problem = f"the structures at bytes {before.offset} and {after.offset} overlap"
                raise damaged(self._source, problem)
        crowded = np.flatnonzero(np.diff(starts) < self._span)
        if len(crowded):
            where = [int(place) * MIB for place in starts[crowded[0] : crowded[0] + 2]]
            raise damaged(self._source, f"the blocks at bytes {where[0]} and {where[1]} overlap")
        for other in others:
            nearest = int(np.searchsorted(starts, -(-other.stop // MIB))) - 1
            if nearest >= 0 and (int(starts[nearest]) + self._span) * MIB > other.offset:
                problem = f"the block at byte {int(starts[nearest]) * MIB} lies on another structure at {other.offset}"
                raise damaged(self._source, problem)
        self._check_end(starts)

    def _check_end(self, starts: Table) -> None:
        """No block reaches beyond the file's end, but for the part of the last one that is beyond the disk's."""
        last = int(self._table[-1]) & _PLACE if len(self._table) else 0
        for place in starts[len(starts) - 2 :].tolist():
            used = self.block_bytes
            if place == last:
                used -= self._metadata.count_blocks * self.block_bytes - self._metadata.size_bytes
            if place * MIB + used > self._source.size_bytes:
                problem = f"the block at byte {place * MIB} reaches beyond the file's end at {self._source.size_bytes}"
                raise damaged(self._source, problem)
