"""Writing VHD: dynamic and differencing. A fixed one is a flat image (`flat`).

    footer copy 512 | header 1024 | allocation table | locators | blocks, in the order they were first written | footer

A block (section "Block Allocation Table and Data Blocks") is its sector bitmap
and its data. Data begins at a multiple of 4 KiB of the file, so that no write
tears a page and runs of zeros stay holes. A dynamic disk's bitmaps are all ones,
as Hyper-V and qemu write them: what was not written is a hole of the file, and
reads as zeros. In a differencing disk a bit says that a sector is this file's
and not its parent's, so zeros over the parent's content are bits without data.

The file is whole when `sync` returns, and not before. It is made under a
temporary name and published by the caller; nothing of it is worth anything
after a crash.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self
from uuid import UUID

import numpy as np

from replica.durable import File, FileSystem
from replica.errors import ImageError
from replica.images.image import ParentLink, check_range
from replica.images.vhd_blocks import MAX_BLOCK_BYTES, MAX_BLOCKS, MIN_BLOCK_BYTES, bitmap_bytes
from replica.images.vhd_format import (
    FOOTER_BYTES,
    HEADER_BYTES,
    MAX_VHD_BYTES,
    NO_BLOCK,
    DiskType,
    DynamicHeader,
    Footer,
    Locator,
    stamp_of,
)
from replica.model import SECTOR_BYTES

if TYPE_CHECKING:
    from typing_extensions import Buffer

BLOCK_BYTES: Final = 2 << 20
"""The specification's default, and what every other writer takes."""
_ALIGNMENT: Final = 4096
_TABLE_OFFSET: Final = FOOTER_BYTES + HEADER_BYTES


class VhdWriter:
    """A new dynamic or differencing VHD. For one thread. Memory: four bytes per block, and one bitmap.

    Failures of the file system are `StorageError`.
    """

    format = "vhd"

    def __init__(
        self, file: File, size_bytes: int, unique_id: UUID, block_bytes: int, parent: ParentLink | None
    ) -> None:
        """`create` has checked these."""
        self._file, self._parent = file, parent
        self.path, self.size_bytes, self.unique_id = file.path, size_bytes, unique_id
        self._block_bytes, self._bitmap_bytes = block_bytes, bitmap_bytes(block_bytes)
        self._table = np.full(-(-size_bytes // block_bytes), NO_BLOCK, dtype=np.uint32)
        self._names = [] if parent is None else _names_of(parent.path, file.path)
        self._stop = self._locators_start + SECTOR_BYTES * sum(_sectors(name) for _, name in self._names)
        self._bitmap_of = -1
        self._bitmap = bytearray()

    @classmethod
    def create(
        cls,
        fs: FileSystem,
        path: Path,
        size_bytes: int,
        unique_id: UUID,
        *,
        block_bytes: int = BLOCK_BYTES,
        parent: ParentLink | None = None,
    ) -> VhdWriter:
        """A new file that reads as zeros, or as its parent; it must not exist. ImageError for what no VHD can be.

        `parent` makes it a differencing disk. A size that is no multiple of 512 is rounded up in the file.
        """
        if not 0 <= size_bytes <= MAX_VHD_BYTES:
            hint = "choose vhdx or raw for it"
            raise ImageError(f"{path}: {size_bytes} bytes do not fit a VHD of at most {MAX_VHD_BYTES}", hint=hint)
        if not MIN_BLOCK_BYTES <= block_bytes <= MAX_BLOCK_BYTES or block_bytes & (block_bytes - 1):
            limits = f"a power of two from {MIN_BLOCK_BYTES} to {MAX_BLOCK_BYTES}"
            raise ImageError(f"{path}: blocks of a VHD have {limits} bytes, not {block_bytes}")
        if -(-size_bytes // block_bytes) > MAX_BLOCKS:
            raise ImageError(
                f"{path}: {size_bytes} bytes in blocks of {block_bytes} are too many", hint="larger blocks"
            )
        return cls(fs.create(path), size_bytes, unique_id, block_bytes, parent)

    def write(self, offset: int, data: Buffer) -> None:
        """Write all of `data`. ImageError past the disk's end.

        Into a differencing disk in whole sectors (512 bytes), but for the disk's end: ValueError otherwise.
        """
        view = memoryview(data).cast("B")
        for block, within, at, length in self._pieces(offset, len(view)):
            self._file.write(self._place(block, within, length) + within, view[at : at + length])

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeros, as a hole; in a differencing disk whatever its parent has. As `write`."""
        for block, within, _, count in self._pieces(offset, length):
            if self._parent is not None or self._table[block] != NO_BLOCK:
                self._file.zero(self._place(block, within, count) + within, count)

    def sync(self) -> None:
        """The file is whole and on stable storage when this returns."""
        self._flush_bitmap()
        place = self._locators_start
        locators = []
        for code, name in self._names:
            self._file.write(place, name)
            locators.append(Locator(code, len(name), place))
            place += SECTOR_BYTES * _sectors(name)
        header = DynamicHeader(_TABLE_OFFSET, len(self._table), self._block_bytes)
        if self._parent is not None:
            parent = self._parent
            header = replace(
                header,
                parent_id=parent.unique_id,
                parent_stamp=stamp_of(parent.modified_at) if parent.modified_at else 0,
                parent_name=parent.path.name,
                locators=tuple(locators),
            )
        padded = -(-self.size_bytes // SECTOR_BYTES) * SECTOR_BYTES
        kind = DiskType.DYNAMIC if self._parent is None else DiskType.DIFFERENCING
        footer = Footer.new(kind, padded, self.unique_id).encode()
        table = self._table.byteswap() if sys.byteorder == "little" else self._table
        self._file.write(_TABLE_OFFSET, table.data)
        self._file.write(0, footer + header.encode())
        self._file.write(self._stop, footer)
        self._file.sync()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def _locators_start(self) -> int:
        return -(-(_TABLE_OFFSET + 4 * len(self._table)) // SECTOR_BYTES) * SECTOR_BYTES

    def _pieces(self, offset: int, length: int) -> list[tuple[int, int, int, int]]:
        """(block, offset in it, offset in the data, length) for each block of a range that was checked."""
        check_range(self.path, offset, length, self.size_bytes)
        torn = offset % SECTOR_BYTES or (length % SECTOR_BYTES and offset + length != self.size_bytes)
        if self._parent is not None and torn:
            raise ValueError(f"{length} bytes at {offset} of a differencing disk are no whole sectors")
        pieces = []
        done = 0
        while done < length:
            block, within = divmod(offset + done, self._block_bytes)
            count = min(self._block_bytes - within, length - done)
            pieces.append((block, within, done, count))
            done += count
        return pieces

    def _place(self, block: int, within: int, length: int) -> int:
        """Where the block's data lies in the file; room is made for it if needed. Its bitmap covers the range."""
        if self._table[block] == NO_BLOCK:
            data = -(-(self._stop + self._bitmap_bytes) // _ALIGNMENT) * _ALIGNMENT
            self._table[block] = (data - self._bitmap_bytes) // SECTOR_BYTES
            self._file.truncate(self._stop)  # a footer that an earlier sync left would be taken for a bitmap
            self._stop = data + self._block_bytes
            self._file.truncate(self._stop)
            if self._parent is None:
                bits = self._block_bytes // SECTOR_BYTES
                self._file.write(data - self._bitmap_bytes, np.packbits(np.ones(bits, np.uint8)).data)
        place = int(self._table[block]) * SECTOR_BYTES + self._bitmap_bytes
        if self._parent is not None:
            self._mark(block, place - self._bitmap_bytes, within // SECTOR_BYTES, -(-(within + length) // SECTOR_BYTES))
        return place

    def _mark(self, block: int, place: int, first: int, last: int) -> None:
        """Set bits [first, last) of a block's bitmap, which lies at `place`."""
        if self._bitmap_of != place:
            self._flush_bitmap()
            self._bitmap_of, self._bitmap = place, bytearray(self._file.read(place, self._bitmap_bytes))
        bits = np.unpackbits(np.frombuffer(self._bitmap, np.uint8))
        bits[first:last] = 1
        self._bitmap[:] = np.packbits(bits).tobytes()

    def _flush_bitmap(self) -> None:
        if self._bitmap_of >= 0:
            self._file.write(self._bitmap_of, self._bitmap)


def _names_of(parent: Path, child: Path) -> list[tuple[bytes, bytes]]:
    """The parent's paths for the locators: for Xen, absolute, and from the child's folder."""
    relative = os.path.relpath(parent.absolute(), child.absolute().parent)
    relative = relative if relative.startswith("..") else f"./{relative}"
    windows = [str(parent.absolute()), relative]
    absolute, near = (path.replace("/", "\\").encode("utf-16-le", "surrogatepass") for path in windows)
    return [(b"MacX", f"file://{relative}".encode("utf-8", "surrogateescape")), (b"W2ku", absolute), (b"W2ru", near)]


def _sectors(data: bytes) -> int:
    return -(-len(data) // SECTOR_BYTES)
