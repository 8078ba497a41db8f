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

In memory the table is a table of extents: blocks that follow each other on the
disk and in the file are one row of twelve bytes, so a fixed disk is one row, and
what the file says nothing of is none. The rows of a chain are limited together.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final, cast

import numpy as np

from replica.images.overlay import ZEROS, clip, make_extents
from replica.images.source import Source
from replica.images.vhd_blocks import ChainMemory
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

# What answers for an extent's blocks: `_ZEROS`, or the place of the first in MiB, with `_PARTIAL` over it.
_ZEROS: Final = 0x7FFFFFFF
_PARTIAL: Final = 0x80000000
_PLACE: Final = 0x7FFFFFFF
_READ_ENTRIES: Final = 1 << 17


class BlockMap:
    """Where the disk's blocks lie in one file. Thread-safe; the table is as it was when opened."""

    def __init__(
        self, source: Source, region: Region, metadata: Metadata, reserved: list[Region], memory: ChainMemory
    ) -> None:
        """Read and check the table in `region`. `reserved`: where no block may lie. ImageError for what cannot be."""
        self._source = source
        self._metadata = metadata
        self.block_bytes = metadata.block_bytes
        self._span = metadata.block_bytes // MIB
        if metadata.count_entries * 8 > region.length:
            problem = f"its table has {region.length // 8} entries, its size needs {metadata.count_entries}"
            raise damaged(source, problem)
        self._bitmaps: dict[int, int] = {}
        self._first, self._count, self._place = self._read(region, memory)
        self._check_places(reserved)
        self._cache, self._key = memory.bitmaps, next(memory.maps)

    @property
    def count_allocated(self) -> int:
        """How many blocks are in the file."""
        return int(self._count[self._place != _ZEROS].sum())

    def outline(self, start: int, stop: int) -> Extents:
        """`Layer.outline`: whole blocks, `whole` where no sector bitmap counts."""
        stop = min(stop, self._metadata.size_bytes)
        edges = np.array([start // self.block_bytes, -(-stop // self.block_bytes)], dtype=np.uint32)
        last = int(np.searchsorted(self._first, edges[1], "left"))
        first = max(0, int(np.searchsorted(self._first, edges[0], "right")) - 1)
        begin = self._first[first:last].astype(np.int64) * self.block_bytes
        end = begin + self._count[first:last].astype(np.int64) * self.block_bytes
        entries = self._place[first:last]
        place = np.where(entries == _ZEROS, ZEROS, (entries & np.uint32(_PLACE)).astype(np.int64) * MIB)
        return clip(make_extents(begin, end, place, entries < _PARTIAL), start, stop)

    def extents(self, start: int, stop: int) -> Extents:
        """`Layer.extents`: sector bitmaps are looked at."""
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
        key = (self._key, block)
        if (known := self._cache.get(key)) is not None:
            return cast("Bytes", known)
        chunk, within = divmod(block, self._metadata.chunk_blocks)
        length = BITMAP_BLOCK_BYTES // self._metadata.chunk_blocks
        data = self._source.read(self._bitmaps[chunk] * MIB + within * length, length)
        piece = np.frombuffer(data, dtype=np.uint8)
        self._cache.put(key, piece, length)
        return piece

    def _read(self, region: Region, memory: ChainMemory) -> tuple[Table, Table, Table]:
        """(first block, count, place) of every extent; read by whole chunks, but for holes of the file."""
        ratio, total = self._metadata.chunk_blocks, self._metadata.count_blocks
        chunks = max(1, _READ_ENTRIES // (ratio + 1))
        columns: list[tuple[Table, Table, Table]] = [(np.empty(0, np.uint32),) * 3]
        for chunk in range(0, -(-total // ratio), chunks):
            first, last = chunk * ratio, min((chunk + chunks) * ratio, total)
            start = region.offset + chunk * (ratio + 1) * 8
            stop = min(start + chunks * (ratio + 1) * 8, region.offset + self._metadata.count_entries * 8)
            if self._source.next_data(start) >= stop:
                continue
            entries: Entries = np.zeros((-(-(last - first) // ratio), ratio + 1), dtype="<u8")
            self._source.read_into(start, entries.reshape(-1).view(np.uint8)[: stop - start].data)
            table = self._parsed(entries[:, :ratio].reshape(-1)[: last - first], first)
            if self._metadata.has_parent:
                self._take_bitmaps(entries[:, ratio], table, chunk)
            found = self._joined(table, first)
            if not memory.take(len(found[0])):
                raise damaged(self._source, "its blocks, and its parents', lie in too many pieces")
            columns.append(found)
        first_blocks, counts, places = zip(*columns, strict=True)
        return np.concatenate(first_blocks), np.concatenate(counts), np.concatenate(places)

    def _parsed(self, entries: Entries, first: int) -> Table:
        """What answers for each block, 0 for none; `first` is the number of the first block."""
        states, places = entries & np.uint64(7), entries >> np.uint64(20)
        lies = states >= FULLY_PRESENT
        allowed = lies | (states < 4)
        if not self._metadata.has_parent:
            allowed &= states != PARTIALLY_PRESENT
        if not allowed.all():
            block = int(np.argmin(allowed))
            problem = f"block {first + block} is in state {int(states[block])}, which is not allowed"
            raise damaged(self._source, problem)
        outside = lies & ((places < 1) | (places >= -(-self._source.size_bytes // MIB)))
        if outside.any():
            block = int(np.argmax(outside))
            raise damaged(self._source, f"block {first + block} at MiB {int(places[block])} is not inside the file")
        table: Table = np.where(lies, places, 0).astype(np.uint32)
        table[~lies & (states != NOT_PRESENT)] = _ZEROS
        table[states == PARTIALLY_PRESENT] |= np.uint32(_PARTIAL)
        return table

    def _joined(self, table: Table, first: int) -> tuple[Table, Table, Table]:
        """The extents of these blocks; a block that is partially present is one by itself."""
        blocks = np.flatnonzero(table).astype(np.uint32)
        entries = table[blocks]
        step = np.where(entries != _ZEROS, np.uint32(self._span), np.uint32(0))
        joined = (np.diff(blocks) == 1) & (entries[1:] == entries[:-1] + step[:-1])
        joined &= (entries[1:] < _PARTIAL) & (entries[:-1] < _PARTIAL)
        heads = np.flatnonzero(np.concatenate(([True], ~joined))[: len(blocks)]).astype(np.uint32)
        counts = np.diff(heads, append=np.uint32(len(blocks)))
        return blocks[heads] + np.uint32(first), counts, entries[heads]

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
        lies = self._place != _ZEROS
        starts = (self._place[lies] & np.uint32(_PLACE)).astype(np.int64)
        order = np.argsort(starts)
        starts = starts[order]
        stops = starts + self._count[lies][order].astype(np.int64) * self._span
        crowded = np.flatnonzero(starts[1:] < stops[:-1])
        if len(crowded):
            where = [int(place) * MIB for place in starts[crowded[0] : crowded[0] + 2]]
            raise damaged(self._source, f"the blocks at bytes {where[0]} and {where[1]} overlap")
        others = [*reserved, *(Region(place * MIB, BITMAP_BLOCK_BYTES) for place in self._bitmaps.values())]
        others.sort(key=lambda region: region.offset)
        for before, after in itertools.pairwise(others):
            if before.stop > after.offset:
                problem = f"the structures at bytes {before.offset} and {after.offset} overlap"
                raise damaged(self._source, problem)
        for other in others:
            nearest = int(np.searchsorted(starts, -(-other.stop // MIB))) - 1
            if nearest >= 0 and int(stops[nearest]) * MIB > other.offset:
                problem = f"the blocks from byte {int(starts[nearest]) * MIB} lie on what is at byte {other.offset}"
                raise damaged(self._source, problem)
        if len(stops):
            self._check_end(int(stops[-1]) * MIB, int(self._first[lies][order][-1]), int(self._count[lies][order][-1]))

    def _check_end(self, stop: int, first: int, count: int) -> None:
        """The blocks that lie last end inside the file, but for what is beyond the disk's end.

        All others do, because they start inside it and none of them overlap.
        """
        if first + count == self._metadata.count_blocks:
            stop -= self._metadata.count_blocks * self.block_bytes - self._metadata.size_bytes
        if stop > self._source.size_bytes:
            raise damaged(self._source, f"a block reaches to byte {stop}, beyond the file's end")
