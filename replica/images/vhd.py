"""Reading VHD: fixed, dynamic and differencing.

Source: Microsoft, "Virtual Hard Disk Image Format Specification", version 1.0;
the structures are in `vhd_format`, the blocks in `vhd_blocks`.

In what order a file is believed:

1. The footer at the end of the file (512 bytes, or 511 from before Virtual PC
   2004). If it is whole it decides. A fixed disk has nothing else: what stands
   at offset 0 is the guest's, even if it looks like a VHD header.
2. A dynamic or differencing disk has a copy of its footer at offset 0. It stands
   in when the end is damaged or cut off (as while a block is being added), but
   only if it says such a kind itself. Two whole footers that tell of different
   disks are refused.
3. The dynamic header and the allocation table, checked against the file.

A differencing disk (section "Implementing a Differencing Hard Disk") names its
parent three times: by locators, by a name in its header, and by the unique id
that the parent's footer must have. The disk's size is its own; a parent that
ends before reads as zeros from there on. The header's time stamp is the one that
the parent file had; copying changes that, so a difference is told (`remarks`)
and not refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from replica.durable import FileSystem
from replica.errors import ImageError
from replica.images.chain import Parent, close_all, open_chain
from replica.images.facts import FileFacts
from replica.images.image import ImageFile, check_range, coalesce, writable_bytes
from replica.images.overlay import EXTENT, Overlay, make_extents
from replica.images.source import Source
from replica.images.vhd_blocks import BlockMap, ChainMemory, damaged
from replica.images.vhd_format import (
    FOOTER_BYTES,
    HEADER_BYTES,
    MAX_VHD_BYTES,
    OLD_FOOTER_BYTES,
    DiskType,
    DynamicHeader,
    Footer,
    stamp_of,
)
from replica.model import SECTOR_BYTES

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from replica.images.overlay import Extents

MAX_LOCATOR_BYTES = 1 << 16
"""The longest path that Windows has, in UTF-16."""


class VhdLayer:
    """One VHD file: its structures and its own blocks, without its parents. Thread-safe once `load` is done."""

    def __init__(self, source: Source) -> None:
        """Read the footers and the header. ImageError: no VHD, damaged, or of an unknown kind."""
        self.source = source
        self.footer, self._data_stop, self.end_damaged = _find_footer(source)
        self.kind, self.size_bytes = _checked_kind(source, self.footer), _checked_size(source, self.footer)
        self.header: DynamicHeader | None = None
        self.blocks: BlockMap | None = None
        if self.kind != DiskType.FIXED:
            self.header = _read_header(source, self.footer)
        elif self.size_bytes > self._data_stop:
            problem = f"it says {self.size_bytes} bytes, but only {self._data_stop} stand before its footer"
            raise damaged(source, problem)
        self.parent = self._find_parent()

    def load(self, memory: ChainMemory) -> None:
        """Read and check the allocation table. ImageError."""
        if self.header is not None:
            offset, size = self.footer.data_offset, self.size_bytes
            self.blocks = BlockMap(self.source, self.header, offset, size, self._data_stop, memory)

    @property
    def block_bytes(self) -> int:
        return self.header.block_bytes if self.header is not None else 1 << 21

    def extents(self, start: int, stop: int) -> Extents:
        return self._all(start, stop) if self.blocks is None else self.blocks.extents(start, stop)

    def outline(self, start: int, stop: int) -> Extents:
        return self._all(start, stop) if self.blocks is None else self.blocks.outline(start, stop)

    def _all(self, start: int, stop: int) -> Extents:
        """A fixed disk: byte n of the disk is byte n of the file."""
        stop = min(stop, self.size_bytes)
        return make_extents([start], [stop], [start]) if start < stop else np.empty(0, EXTENT)

    def _find_parent(self) -> Parent[VhdLayer] | None:
        if self.kind != DiskType.DIFFERENCING or self.header is None:
            return None
        header = self.header

        def misfit(layer: VhdLayer) -> str:
            found, wanted = layer.footer.unique_id, header.parent_id
            return "" if found == wanted else f"has the id {found}, not {wanted}"

        return Parent((*_located_names(self.source, header), header.parent_name), misfit)

    def facts(self, parent: VhdLayer | None) -> FileFacts:
        """What can be said of this file; `parent` is the one that was found."""
        footer = self.footer
        return FileFacts(
            path=str(self.source.path),
            subformat=self.kind.name.lower(),
            size_bytes=self.size_bytes,
            sizes={"current": footer.current_size_bytes, "geometry": footer.geometry.size_bytes},
            id=str(footer.unique_id),
            creator=footer.creator.decode("ascii", "backslashreplace").rstrip(" \0"),
            block_bytes=None if self.header is None else self.header.block_bytes,
            allocated_bytes=None if self.blocks is None else self.blocks.count_allocated * self.blocks.block_bytes,
            remarks=tuple(self.remarks(parent)),
        )

    def remarks(self, parent: VhdLayer | None) -> list[str]:
        """What an operator should know of this file, though it can be read."""
        remarks = []
        if self.end_damaged:
            remarks.append(f"the footer at the end of {self.source.path} is damaged; its copy at the start was used")
        if self.footer.saved_state:
            remarks.append(f"{self.source.path} belongs to a machine with a saved state")
        if parent is not None and self.header is not None and self.header.parent_stamp:
            stamps = (parent.footer.time_stamp, stamp_of(parent.source.modified_at))
            if self.header.parent_stamp not in stamps:
                remarks.append(
                    f"{parent.source.path} has another time stamp than {self.source.path} expects of its parent: "
                    "it was copied, or written since"
                )
        return remarks


class VhdImage:
    """A VHD with all its parents, read-only. Thread-safe. Opening costs one pass over each allocation table."""

    format = "vhd"
    sector_bytes = SECTOR_BYTES

    def __init__(self, layers: Sequence[VhdLayer]) -> None:
        """Of a chain as `open_chain` returns it, its tables loaded. Takes the files over."""
        self.layers = tuple(layers)
        top = self.layers[0]
        self.path: Path = top.source.path
        self.footer, self.end_damaged, self.size_bytes = top.footer, top.end_damaged, top.size_bytes
        self.files: tuple[ImageFile, ...] = tuple(layer.source.file for layer in self.layers)
        self._overlay = Overlay(self.layers)

    @classmethod
    def open(cls, fs: FileSystem, path: Path, parents: Sequence[Path] = ()) -> VhdImage:
        """`parents`: folders, besides the image's own, that parents may lie in.

        ImageError: not there, unreadable, no VHD, damaged, or without its parents.
        """
        layers = open_chain(fs, path, VhdLayer, parents)
        try:
            memory = ChainMemory()
            for layer in layers:
                layer.load(memory)
            return cls(layers)
        except BaseException:
            close_all(layers)
            raise

    @property
    def subformat(self) -> str:
        """`fixed`, `dynamic` or `differencing`."""
        return self.layers[0].kind.name.lower()

    def allocated(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        return coalesce(self._overlay.allocated(max(start, 0), min(stop, self.size_bytes)))

    def read_into(self, offset: int, buffer: Buffer) -> None:
        target = writable_bytes(buffer)
        check_range(self.path, offset, len(target), self.size_bytes)
        self._overlay.read_into(offset, target)

    def facts(self) -> tuple[FileFacts, ...]:
        parents = (*self.layers[1:], None)
        return tuple(layer.facts(parent) for layer, parent in zip(self.layers, parents, strict=True))

    def close(self) -> None:
        close_all(self.layers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _located_names(source: Source, header: DynamicHeader) -> list[str]:
    """The parent's paths that the locators lead to, relative ones first: they survive a move of the whole chain."""
    names = []
    for locator in sorted(header.locators, key=lambda locator: locator.code != b"W2ru"):
        if locator.length > MAX_LOCATOR_BYTES or locator.offset + locator.length > source.size_bytes:
            where = f"{locator.length} bytes at {locator.offset}"
            raise damaged(source, f"a locator of its parent ({where}) is not inside the file, or too long")
        names.append(locator.decode(source.read(locator.offset, locator.length)))
    return names


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


def _checked_kind(source: Source, footer: Footer) -> DiskType:
    try:
        return DiskType(footer.disk_type)
    except ValueError:
        problem = f"its disk type is {footer.disk_type}: neither fixed (2), dynamic (3) nor differencing (4)"
        raise damaged(source, problem) from None


def _checked_size(source: Source, footer: Footer) -> int:
    """The disk's size, if such a size can be read."""
    size = footer.size_bytes
    if size > MAX_VHD_BYTES or size % SECTOR_BYTES:
        problem = f"its size is {size} bytes: not whole sectors of {SECTOR_BYTES}, or more than {MAX_VHD_BYTES}"
        raise damaged(source, problem)
    if size == 0 and footer.current_size_bytes:
        raise damaged(source, "its geometry, which gives the size in an image of its creator, is empty")
    return size


def _read_header(source: Source, footer: Footer) -> DynamicHeader:
    """The header of a dynamic disk; it and the table lie where they may."""
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
    return header


def _no_vhd(source: Source, problem: str) -> ImageError:
    hint = 'if it is a raw disk set format = "raw", else put back a whole copy of it'
    return ImageError(f"image {source.path} is no VHD that can be read: {problem}", hint=hint)
