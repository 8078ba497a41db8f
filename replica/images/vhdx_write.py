"""Writing VHDX: fixed, dynamic and differencing.

    headers | log, empty | metadata | allocation table | blocks, in the order in which they were first written

Source: [MS-VHDX]. The file is whole when `sync` returns, and not before: it is
made under a temporary name and published by the caller, so no log is needed, and
nothing of it is worth anything after a crash.

Thin: what is never written is never allocated, and inside a block it is a hole
of the file. A fixed disk has all its blocks, as holes until they are written.

A differencing disk (§2.4, §2.5.1) keeps a bit per sector. A block all of whose
sectors were written is fully present, one that was zeroed as a whole is in the
state "zero" and takes no place, others are partially present. One chunk's bitmap
is held in memory, so writes should ascend as far as speed goes.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self
from uuid import UUID

import numpy as np

from replica.durable import File, FileSystem
from replica.errors import ImageError
from replica.images.image import ParentLink, check_range
from replica.images.vhdx_format import (
    BAT_REGION,
    BITMAP_BLOCK_BYTES,
    BITMAP_PRESENT,
    FULLY_PRESENT,
    HEADER_OFFSETS,
    HEADER_SECTION_BYTES,
    METADATA_REGION,
    MIB,
    NO_ID,
    NOT_PRESENT,
    PARTIALLY_PRESENT,
    REGION_TABLE_OFFSETS,
    ZERO,
    Header,
    Region,
    encode_identifier,
    encode_regions,
)
from replica.images.vhdx_metadata import MAX_BLOCK_BYTES, MIN_BLOCK_BYTES, Metadata
from replica.model import MAX_DISK_BYTES, random_id

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from replica.images.image import Bytes

    Entries = np.ndarray[tuple[int], np.dtype[np.uint64]]

_LOG: Final = Region(HEADER_SECTION_BYTES, MIB)
_METADATA: Final = Region(_LOG.stop, MIB)
_USUAL_BLOCK_BYTES: Final = 2 * MIB
_USUAL_BLOCKS: Final = 1 << 21
_STATE: Final = 7
_WINDOW_ENTRIES: Final = 1 << 17


def usual_block_bytes(size_bytes: int) -> int:
    """The block size used unless another one is asked for: 2 MiB, larger where the table would be over 16 MiB."""
    block_bytes = _USUAL_BLOCK_BYTES
    while block_bytes * _USUAL_BLOCKS < size_bytes:
        block_bytes *= 2
    return block_bytes


class VhdxWriter:
    """A new VHDX. For one thread. Memory: eight bytes per block, and one bitmap of 1 MiB.

    Failures of the file system are `StorageError`.
    """

    format = "vhdx"

    def __init__(self, file: File, size_bytes: int, metadata: Metadata) -> None:
        """`create` has checked these."""
        self._file, self._metadata = file, metadata
        self.path, self.size_bytes, self.unique_id = file.path, size_bytes, metadata.disk_id
        self.data_write_id = random_id()
        """What a child of this file names as its parent's id."""
        count = metadata.count_entries
        self._bat = Region(_METADATA.stop, max(1, -(-count * 8 // MIB)) * MIB)
        self._entries: Entries = np.zeros(count, dtype="<u8")
        self._end = self._bat.stop
        self._chunk = -1
        self._bitmap: Bytes = np.empty(0, dtype=np.uint8)
        if metadata.keeps_blocks:
            self._lay_out_fixed()

    @classmethod
    def create(
        cls,
        fs: FileSystem,
        path: Path,
        size_bytes: int,
        unique_id: UUID,
        *,
        fixed: bool = False,
        block_bytes: int | None = None,
        sector_bytes: int = 512,
        parent: ParentLink | None = None,
    ) -> VhdxWriter:
        """A new file that reads as zeros, or as its parent; it must not exist. ImageError for what no VHDX can be.

        `unique_id` is the disk's identity, the same in all files of a chain; `parent` makes it a differencing disk. A
        size that is no whole number of sectors is rounded up in the file; a disk of no bytes has no VHDX.
        """
        block_bytes = block_bytes or usual_block_bytes(size_bytes)
        padded = -(-size_bytes // sector_bytes) * sector_bytes if sector_bytes in (512, 4096) else 0
        if not 0 < padded <= MAX_DISK_BYTES:
            raise ImageError(f"{path}: a VHDX has no disk of {size_bytes} bytes in sectors of {sector_bytes}")
        if not MIN_BLOCK_BYTES <= block_bytes <= MAX_BLOCK_BYTES or block_bytes & (block_bytes - 1):
            raise ImageError(f"{path}: blocks of {block_bytes} bytes are no power of two from 1 to 256 MiB")
        if fixed and parent:
            raise ImageError(f"{path}: a fixed VHDX has no parent")
        pairs = _pairs_of(parent, path) if parent else {}
        metadata = Metadata(block_bytes, padded, unique_id, sector_bytes, 4096, fixed, parent is not None, pairs)
        return cls(fs.create(path), size_bytes, metadata)

    def write(self, offset: int, data: Buffer) -> None:
        """Write all of `data`. ImageError past the disk's end.

        Into a differencing disk in whole sectors, but for the disk's end: ValueError otherwise.
        """
        view = memoryview(data).cast("B")
        check_range(self.path, offset, len(view), self.size_bytes)
        self._check_sectors(offset, len(view))
        for block, within, done, length in self._parts(offset, len(view)):
            part = view[done : done + length]
            if not self._is_child and self._state(block) == NOT_PRESENT and not np.frombuffer(part, np.uint8).any():
                continue
            self._file.write(self._place(block) + within, part)
            self._mark(block, within, length)

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeros, as a hole; in a differencing disk whatever its parent has. As `write`."""
        check_range(self.path, offset, length, self.size_bytes)
        self._check_sectors(offset, length)
        for block, within, _, part in self._parts(offset, length):
            state = self._state(block)
            if state == ZERO or (state == NOT_PRESENT and not self._is_child):
                continue
            if state == NOT_PRESENT and self._fills(block, within, part):
                self._entries[self._index(block)] = ZERO
                continue
            place = self._place(block)
            if state != NOT_PRESENT:
                self._file.zero(place + within, part)
            self._mark(block, within, part)

    def sync(self) -> None:
        """The file is whole and on stable storage when this returns."""
        self._keep_bitmap()
        self._file.truncate(self._end)
        for start in range(0, len(self._entries), _WINDOW_ENTRIES):
            window = self._entries[start : start + _WINDOW_ENTRIES]
            if window.any():
                self._file.write(self._bat.offset + start * 8, window.data)
        self._file.write(_METADATA.offset, self._metadata.encode())
        regions = encode_regions({BAT_REGION: self._bat, METADATA_REGION: _METADATA})
        for offset in REGION_TABLE_OFFSETS:
            self._file.write(offset, regions)
        file_write_id = random_id()
        for sequence, offset in enumerate(HEADER_OFFSETS, 1):
            header = Header(sequence, file_write_id, self.data_write_id, NO_ID, _LOG.offset, _LOG.length)
            self._file.write(offset, header.encode())
        self._file.write(0, encode_identifier("replica"))
        self._file.sync()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def _is_child(self) -> bool:
        return self._metadata.has_parent

    def _check_sectors(self, offset: int, length: int) -> None:
        sector = self._metadata.sector_bytes
        if self._is_child and (offset % sector or (length % sector and offset + length != self.size_bytes)):
            raise ValueError(f"{length} bytes at {offset} of a differencing disk are no whole sectors of {sector}")

    def _parts(self, offset: int, length: int) -> list[tuple[int, int, int, int]]:
        """(block, byte in it, bytes before, bytes) of every block's part of a range."""
        parts, done = [], 0
        while done < length:
            block, within = divmod(offset + done, self._metadata.block_bytes)
            part = min(self._metadata.block_bytes - within, length - done)
            parts.append((block, within, done, part))
            done += part
        return parts

    def _index(self, block: int) -> int:
        """Of a payload block in the table (§2.5)."""
        return block + block // self._metadata.chunk_blocks

    def _state(self, block: int) -> int:
        return int(self._entries[self._index(block)]) & _STATE

    def _place(self, block: int) -> int:
        """The byte of the file at which the block lies, allocated if it is not yet.

        What was zeros as a whole is fully present from then on; in a child, a new block is partially present.
        """
        index = self._index(block)
        entry = int(self._entries[index])
        state = entry & _STATE
        if state not in (FULLY_PRESENT, PARTIALLY_PRESENT):
            entry = self._end | (PARTIALLY_PRESENT if self._is_child and state == NOT_PRESENT else FULLY_PRESENT)
            self._entries[index] = entry
            self._end += self._metadata.block_bytes
        return entry & -MIB

    def _fills(self, block: int, within: int, length: int) -> bool:
        """Whether the range is all of the block that belongs to the disk."""
        start = block * self._metadata.block_bytes
        return within == 0 and (length == self._metadata.block_bytes or start + length == self.size_bytes)

    def _mark(self, block: int, within: int, length: int) -> None:
        """The sectors are there from now on: their bits in the chunk's bitmap, if the block is partially present."""
        if self._state(block) != PARTIALLY_PRESENT:
            return
        if self._fills(block, within, length):
            self._entries[self._index(block)] ^= np.uint64(PARTIALLY_PRESENT ^ FULLY_PRESENT)
            return
        chunk, row = divmod(block, self._metadata.chunk_blocks)
        self._load_bitmap(chunk)
        sector = self._metadata.sector_bytes
        first = (row * self._metadata.block_bytes + within) // sector
        last = -(-(row * self._metadata.block_bytes + within + length) // sector)
        low, high = first // 8, -(-last // 8)
        bits = np.unpackbits(self._bitmap[low:high], bitorder="little")
        bits[first - low * 8 : last - low * 8] = 1
        self._bitmap[low:high] = np.packbits(bits, bitorder="little")

    def _load_bitmap(self, chunk: int) -> None:
        """Take the chunk's bitmap into memory, and put back the one that was there."""
        if chunk == self._chunk:
            return
        self._keep_bitmap()
        self._chunk = chunk
        entry = int(self._entries[self._bitmap_index(chunk)])
        self._bitmap = np.zeros(BITMAP_BLOCK_BYTES, dtype=np.uint8)
        if entry:
            self._file.read_into(entry & -MIB, self._bitmap.data)

    def _keep_bitmap(self) -> None:
        """Write the bitmap in memory to its place, allocated if it has none yet; full blocks become fully present."""
        if self._chunk < 0:
            return
        index, ratio = self._bitmap_index(self._chunk), self._metadata.chunk_blocks
        first = self._chunk * (ratio + 1)
        last = min(first + ratio, index)
        entries = self._entries[first:last]
        whole = self._bitmap.reshape(ratio, -1).min(axis=1)[: len(entries)] == 0xFF
        full = whole & (entries & np.uint64(_STATE) == PARTIALLY_PRESENT)
        entries[full] ^= np.uint64(PARTIALLY_PRESENT ^ FULLY_PRESENT)
        if not self._entries[index]:
            self._entries[index] = self._end | BITMAP_PRESENT
            self._end += BITMAP_BLOCK_BYTES
        self._file.write(int(self._entries[index]) & -MIB, self._bitmap.data)
        self._chunk = -1

    def _bitmap_index(self, chunk: int) -> int:
        """Of a chunk's sector bitmap in the table (§2.5)."""
        return (chunk + 1) * self._metadata.chunk_blocks + chunk

    def _lay_out_fixed(self) -> None:
        """Every block is there, in the order of the disk."""
        count, size = self._metadata.count_blocks, self._metadata.block_bytes
        for start in range(0, count, _WINDOW_ENTRIES):
            blocks = np.arange(start, min(start + _WINDOW_ENTRIES, count))
            places = self._end + blocks * size
            self._entries[blocks + blocks // self._metadata.chunk_blocks] = places | FULLY_PRESENT
        self._end += count * size


def _pairs_of(parent: ParentLink, child: Path) -> dict[str, str]:
    """The parent as a parent locator has it (§2.6.2.6.3): by a path from the child's folder."""
    relative = os.path.relpath(parent.path.absolute(), child.absolute().parent).replace("/", "\\")
    path = relative if relative.startswith("..") else f".\\{relative}"
    return {"parent_linkage": f"{{{parent.unique_id}}}", "relative_path": path}
