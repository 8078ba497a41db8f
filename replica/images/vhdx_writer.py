"""Writing VHDX: fixed, dynamic, and differencing children. A file appears whole or not at all.

Source: [MS-VHDX]. The file is made under a temporary name: log (1 MiB, empty),
metadata, allocation table, then blocks in the order in which they are first
written. The structures are written by `finish`, which also syncs the file and
gives it its name; until then nobody can open it, so that no log is needed.

Thin: what is never written is never allocated, and inside a block it is a hole
of the file. A fixed disk has all its blocks, as holes until they are written.

A differencing child (§2.4, §2.5.1) keeps a bit per sector. A block all of whose
sectors were written is fully present, one that was zeroed as a whole is in the
state "zero" and takes no place, others are partially present. Writes to a child are
whole sectors; the disk's end may be short. One chunk's bitmap is held in memory,
so writes should ascend, as far as speed goes.

    with VhdxWriter(fs, path, size_bytes) as writer:
        writer.write(4096, data)
        writer.finish()
"""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self
from uuid import UUID

import numpy as np

from replica.durable import FileSystem
from replica.errors import ImageError, StorageError
from replica.images.image import check_range
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


@dataclass(frozen=True, slots=True)
class ParentLink:
    """The parent of a child to be written: where it lies, and the id of its content (`Header.data_write_id`)."""

    path: Path
    data_write_id: UUID

    def pairs(self, child: Path) -> dict[str, str]:
        """As a parent locator says it (§2.6.2.6.3), relative to the child's folder. ImageError if Windows cannot."""
        relative = os.path.relpath(os.path.realpath(self.path), os.path.realpath(child.parent))
        if "\\" in relative:
            raise ImageError(f"{self.path} cannot be the parent of a VHDX: its path has a backslash")
        text = relative.replace("/", "\\")
        linkage = f"{{{self.data_write_id}}}"
        return {"parent_linkage": linkage, "relative_path": text if text.startswith("..") else f".\\{text}"}


def usual_block_bytes(size_bytes: int) -> int:
    """The block size used unless another one is asked for: 2 MiB, larger where the table would be over 16 MiB."""
    block_bytes = _USUAL_BLOCK_BYTES
    while block_bytes * _USUAL_BLOCKS < size_bytes:
        block_bytes *= 2
    return block_bytes


class VhdxWriter:
    """A VHDX being written by one thread. Failures of the file system are `StorageError`."""

    def __init__(
        self,
        fs: FileSystem,
        path: Path,
        size_bytes: int,
        *,
        fixed: bool = False,
        block_bytes: int | None = None,
        sector_bytes: int = 512,
        disk_id: UUID | None = None,
        parent: ParentLink | None = None,
    ) -> None:
        """Make the temporary file beside `path`. ImageError for sizes that the format does not have, zero among them.

        A size that is no whole number of sectors is filled up with zeros in the
        disk. `disk_id` is the disk's identity, which stays the same in all files of a chain.
        """
        block_bytes = block_bytes or usual_block_bytes(size_bytes)
        padded = -(-size_bytes // sector_bytes) * sector_bytes if sector_bytes in (512, 4096) else -1
        if not 0 < padded <= MAX_DISK_BYTES:
            raise ImageError(f"{path}: a VHDX has no disk of {size_bytes} bytes in sectors of {sector_bytes}")
        if not MIN_BLOCK_BYTES <= block_bytes <= MAX_BLOCK_BYTES or block_bytes & (block_bytes - 1):
            raise ImageError(f"{path}: blocks of {block_bytes} bytes are no power of two from 1 to 256 MiB")
        if fixed and parent:
            raise ImageError(f"{path}: a fixed VHDX has no parent")
        pairs = parent.pairs(path) if parent else {}
        self.path = path
        self.size_bytes = size_bytes
        self.data_write_id = random_id()
        """What a child of this file names as its parent's id."""
        self._metadata = Metadata(
            block_bytes, padded, disk_id or random_id(), sector_bytes, 4096, fixed, parent is not None, pairs
        )
        count = self._metadata.count_entries
        self._bat = Region(_METADATA.stop, max(1, -(-count * 8 // MIB)) * MIB)
        self._entries: Entries = np.frombuffer(mmap.mmap(-1, max(1, count) * 8), dtype="<u8")[:count]
        self._end = self._bat.stop
        self._chunk = -1
        self._bitmap: Bytes = np.empty(0, dtype=np.uint8)
        if fixed:
            self._lay_out_fixed()
        self._fs = fs
        self._temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")
        self._file = fs.create(self._temporary)
        self._finished = False

    @property
    def link(self) -> ParentLink:
        """This file as the parent of another one, once it is finished."""
        return ParentLink(self.path, self.data_write_id)

    def write(self, offset: int, data: Buffer) -> None:
        """Write all of `data`. ImageError past the disk's end, and in a child for parts of sectors."""
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
        """Make a range read as zeros: nothing, or holes. ImageError as `write`."""
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

    def finish(self, *, replace: bool = False) -> None:
        """Write the structures, sync, and give the file its name: what has it by now is replaced, or stays an error.

        StorageError; TargetExistsError.
        """
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
        publish = self._fs.publish if replace else self._fs.publish_new
        publish(self._temporary, self.path)
        self._finished = True

    def close(self) -> None:
        """Close the file; unless it was finished, nothing is left of it. Idempotent."""
        self._file.close()
        if not self._finished:
            self._finished = True
            with suppress(StorageError):
                self._fs.unlink(self._temporary)

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
            raise ImageError(f"{self.path}: {length} bytes at {offset} are no whole sectors of {sector}")

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
