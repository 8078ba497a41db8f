"""Reading VHD: fixed and dynamic.

Source: Microsoft, "Virtual Hard Disk Image Format Specification", version 1.0;
the structures are in `vhd_format`, the blocks of dynamic disks in `vhd_blocks`.

In what order the file is believed:

1. The footer at the end of the file (512 bytes, or 511 from before Virtual PC
   2004). If it is whole it decides. A fixed disk has nothing else: what stands
   at offset 0 is the guest's, even if it looks like a VHD header.
2. A dynamic disk has a copy of its footer at offset 0. It stands in when the end
   is damaged or cut off (as while a block is being added), but only if it says
   "dynamic" itself. Two whole footers that tell of different disks are refused.
3. The dynamic header and the allocation table, checked against the file.

Differencing disks need their parents and are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from replica.durable import FileSystem
from replica.errors import ImageError
from replica.images.image import check_range, coalesce, writable_bytes
from replica.images.source import Source
from replica.images.vhd_blocks import BlockMap, damaged
from replica.images.vhd_format import (
    FOOTER_BYTES,
    HEADER_BYTES,
    MAX_VHD_BYTES,
    OLD_FOOTER_BYTES,
    DiskType,
    DynamicHeader,
    Footer,
)
from replica.model import SECTOR_BYTES

if TYPE_CHECKING:
    from typing_extensions import Buffer


class VhdImage:
    """A fixed or dynamic VHD, read-only. Thread-safe. Opening costs one pass over the allocation table."""

    format = "vhd"
    sector_bytes = SECTOR_BYTES

    def __init__(self, source: Source) -> None:
        self._source = source
        self.path: Path = source.path
        self.footer, data_stop, self.end_damaged = _find_footer(source)
        self.size_bytes = _checked_size(source, self.footer)
        self.files = (source.file,)
        self._blocks: BlockMap | None = None
        if self.footer.disk_type == DiskType.DYNAMIC:
            self._blocks = _open_blocks(source, self.footer, self.size_bytes, data_stop)
        elif self.size_bytes > data_stop:
            problem = f"it says {self.size_bytes} bytes, but only {data_stop} stand before its footer"
            raise damaged(source, problem)

    @classmethod
    def open(cls, fs: FileSystem, path: Path) -> VhdImage:
        """ImageError: not there, unreadable, no VHD, damaged, or of a kind that is not supported."""
        source = Source.open(fs, path)
        try:
            return cls(source)
        except BaseException:
            source.close()
            raise

    @property
    def subformat(self) -> str:
        """`fixed` or `dynamic`."""
        return "fixed" if self._blocks is None else "dynamic"

    def allocated(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        start, stop = max(start, 0), min(stop, self.size_bytes)
        if self._blocks is None:
            return self._source.data_runs(start, stop)
        return coalesce(self._blocks.allocated(start, stop))

    def read_into(self, offset: int, buffer: Buffer) -> None:
        target = writable_bytes(buffer)
        check_range(self.path, offset, len(target), self.size_bytes)
        if self._blocks is None:
            self._source.read_into(offset, target.data)
        else:
            self._blocks.read_into(offset, target)

    def close(self) -> None:
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _find_footer(source: Source) -> tuple[Footer, int, bool]:
    """The footer that counts, where the file's data ends, and whether the footer at the end was damaged."""
    if source.size_bytes < OLD_FOOTER_BYTES:
        raise _no_vhd(source, f"it has {source.size_bytes} bytes, fewer than a VHD footer")
    end, position, problem = _end_footer(source)
    copy = None
    if source.size_bytes >= FOOTER_BYTES and (end is None or end.disk_type != DiskType.FIXED):
        copy = _whole_footer(source.read(0, FOOTER_BYTES))
    if end is None:
        if copy is None or copy.disk_type not in (DiskType.DYNAMIC, DiskType.DIFFERENCING):
            raise _no_vhd(source, f"there is no footer at its end ({problem}), nor a copy at its start")
        return copy, source.size_bytes, True
    if copy is not None and copy != end:
        raise damaged(source, "the footers at its start and at its end tell of different disks")
    return end, position, False


def _end_footer(source: Source) -> tuple[Footer | None, int, str]:
    """The footer at the end and its offset; or None, the file's size, and what is wrong with it.

    511 bytes are tried only in a file whose length says so.
    """
    lengths = [FOOTER_BYTES] if source.size_bytes >= FOOTER_BYTES else []
    if source.size_bytes % SECTOR_BYTES == OLD_FOOTER_BYTES:
        lengths.append(OLD_FOOTER_BYTES)
    problem = ""
    for length in lengths:
        position = source.size_bytes - length
        try:
            return Footer.decode(source.read(position, length)), position, ""
        except ValueError as error:
            problem = str(error)
    return None, source.size_bytes, problem


def _whole_footer(data: bytes) -> Footer | None:
    try:
        return Footer.decode(data)
    except ValueError:
        return None


def _checked_size(source: Source, footer: Footer) -> int:
    """The disk's size, if this kind of disk and such a size can be read."""
    if footer.disk_type == DiskType.DIFFERENCING:
        raise ImageError(
            f"VHD {source.path} is a differencing disk, which is not supported yet",
            hint="merge it with its parents in the hypervisor (delete the snapshot), or name a copy that is whole",
        )
    if footer.disk_type not in (DiskType.FIXED, DiskType.DYNAMIC):
        raise damaged(source, f"its disk type is {footer.disk_type}: neither fixed (2) nor dynamic (3)")
    size = footer.size_bytes
    if size > MAX_VHD_BYTES or size % SECTOR_BYTES:
        problem = f"its size is {size} bytes: not whole sectors of {SECTOR_BYTES}, or more than {MAX_VHD_BYTES}"
        raise damaged(source, problem)
    if size == 0 and footer.current_size_bytes:
        raise damaged(source, "its geometry, which gives the size in an image of its creator, is empty")
    return size


def _open_blocks(source: Source, footer: Footer, size_bytes: int, stop: int) -> BlockMap:
    """The checked blocks of a dynamic disk."""
    offset = footer.data_offset
    if offset < FOOTER_BYTES or offset + HEADER_BYTES > source.size_bytes:
        raise damaged(source, f"its dynamic header at {offset} is not inside the file, behind the footer's copy")
    try:
        header = DynamicHeader.decode(source.read(offset, HEADER_BYTES))
    except ValueError as error:
        raise damaged(source, f"its dynamic header at {offset} cannot be used: {error}") from error
    table_stop = header.table_offset + 4 * header.max_table_entries
    if header.table_offset < FOOTER_BYTES or (header.table_offset < offset + HEADER_BYTES and offset < table_stop):
        raise damaged(source, f"its table at {header.table_offset} lies on the headers")
    return BlockMap(source, header, offset, size_bytes, stop)


def _no_vhd(source: Source, problem: str) -> ImageError:
    hint = 'if it is a raw disk set format = "raw", else put back a whole copy of it'
    return ImageError(f"image {source.path} is no VHD that can be read: {problem}", hint=hint)
