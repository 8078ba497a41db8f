"""Reading VHDX: fixed, dynamic and differencing, with a log that was not played back.

Source: [MS-VHDX]; the structures are in `vhdx_format` and `vhdx_metadata`, the log
in `vhdx_log` and `vhdx_replay`, the blocks in `vhdx_blocks`.

In what order the file is believed:

1. The signature at its start, or it is no VHDX.
2. The current header: the only valid one, or the one of the higher sequence number
   (§2.2.2). Two of equal numbers must be the same bytes, as Disk2vhd writes them.
3. The log, unless the header says that there is none. It is replayed in memory
   (§2.3.3), and all that follows is read as the replay leaves it; a log that cannot
   be replayed refuses the file.
4. The region table. If both copies are valid they must name the same places.
5. Metadata, and the block allocation table, checked as a whole.

A reader that passed over the log would see structures of another time: valid to
look at, and wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self
from uuid import UUID

from replica.durable import FileSystem
from replica.errors import ImageError
from replica.images.chain import Parent, close_all, open_chain
from replica.images.facts import FileFacts
from replica.images.image import ImageFile, check_range, coalesce, writable_bytes
from replica.images.overlay import Overlay
from replica.images.source import Source
from replica.images.vhd_blocks import ChainMemory
from replica.images.vhdx_blocks import BlockMap
from replica.images.vhdx_format import (
    BAT_REGION,
    CREATOR_BYTES,
    HEADER_BYTES,
    HEADER_OFFSETS,
    HEADER_SECTION_BYTES,
    METADATA_REGION,
    NO_ID,
    REGION_TABLE_BYTES,
    REGION_TABLE_OFFSETS,
    SIGNATURE,
    Header,
    Region,
    decode_regions,
)
from replica.images.vhdx_log import Log, damaged
from replica.images.vhdx_metadata import METADATA_TABLE_BYTES, Metadata, item_places
from replica.images.vhdx_replay import ReplayedSource

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from replica.images.overlay import Extents

_PATHS = ("relative_path", "volume_path", "absolute_win32_path")
"""Of the parent, in the order in which they are tried."""


class VhdxLayer:
    """One VHDX file: its structures and its own blocks, without its parents. Thread-safe once `load` is done."""

    def __init__(self, source: Source, memory: ChainMemory) -> None:
        """Read the headers, replay the log, read the metadata. ImageError; the file is not closed then."""
        self.header, self.damaged_headers = _current_header(source)
        self.replayed_entries = 0
        """Entries of the log that need not be in place yet."""
        self.source = self._replayed(source, memory)
        self._regions, self.damaged_tables = _regions(self.source)
        self.metadata = _metadata(self.source, self._regions[METADATA_REGION])
        self.size_bytes, self.block_bytes = self.metadata.size_bytes, self.metadata.block_bytes
        self.parent = self._parent() if self.metadata.has_parent else None

    def load(self, memory: ChainMemory) -> None:
        """Read and check the allocation table. ImageError."""
        reserved = [region for region in self._regions.values() if region.length]
        if self.header.log_bytes:
            reserved.append(Region(self.header.log_offset, self.header.log_bytes))
        self.blocks = BlockMap(self.source, self._regions[BAT_REGION], self.metadata, reserved, memory)

    def extents(self, start: int, stop: int) -> Extents:
        return self.blocks.extents(start, stop)

    def outline(self, start: int, stop: int) -> Extents:
        return self.blocks.outline(start, stop)

    @property
    def subformat(self) -> str:
        """`fixed`, `dynamic` or `differencing`."""
        if self.metadata.has_parent:
            return "differencing"
        return "fixed" if self.metadata.keeps_blocks else "dynamic"

    def facts(self) -> FileFacts:
        """What can be said of this file."""
        path, remarks = self.source.path, []
        if self.damaged_headers:
            remarks.append(f"one of the two headers of {path} is damaged; the other was used")
        if self.damaged_tables:
            remarks.append(f"one of the two region tables of {path} is damaged; the other was used")
        if self.replayed_entries:
            remarks.append(f"{path} was not closed: {self.replayed_entries} entries of its log are replayed in memory")
        creator = self.source.read(len(SIGNATURE), CREATOR_BYTES).decode("utf-16-le", "replace").partition("\0")[0]
        return FileFacts(
            path=str(path),
            subformat=self.subformat,
            size_bytes=self.size_bytes,
            id=str(self.header.data_write_id),
            creator="".join(letter for letter in creator if letter.isprintable()),
            block_bytes=self.block_bytes,
            allocated_bytes=self.blocks.count_allocated * self.block_bytes,
            log="dirty" if self.replayed_entries else "clean",
            remarks=tuple(remarks),
        )

    def _replayed(self, source: Source, memory: ChainMemory) -> Source:
        """The file as its log leaves it (§2.3.3)."""
        header = self.header
        if header.log_id == NO_ID:
            return source
        if header.log_version != 0:
            raise damaged(source, f"its log is of version {header.log_version}, only 0 is known")
        updates = Log(source, Region(header.log_offset, header.log_bytes), header.log_id).updates()
        if not memory.take(len(updates.offset)):
            raise damaged(source, "the logs of it and its parents hold too many updates")
        self.replayed_entries = updates.count_entries
        return ReplayedSource(source, updates)

    def _parent(self) -> Parent[VhdxLayer]:
        """Where the parent is and which one it is (§2.6.2.6.3)."""
        pairs = self.metadata.parent
        linkages = []
        for key in ("parent_linkage", "parent_linkage2"):
            if text := pairs.get(key, ""):
                try:
                    linkages.append(UUID(text))
                except ValueError as error:
                    raise damaged(self.source, f"its parent's {key} is no GUID: {text[:64]!r}") from error
        if not linkages:
            raise damaged(self.source, "it does not say which one its parent is")

        def misfit(layer: VhdxLayer) -> str:
            if layer.header.data_write_id not in linkages:
                wanted = " or ".join(map(str, linkages))
                return f"has the id {layer.header.data_write_id} and not {wanted}: it was changed, or is another image"
            if layer.metadata.sector_bytes != self.metadata.sector_bytes:
                return f"has sectors of {layer.metadata.sector_bytes} bytes and not {self.metadata.sector_bytes}"
            return ""

        return Parent([pairs[key] for key in _PATHS if key in pairs], misfit)


class VhdxImage:
    """A VHDX with all its parents, read-only. Thread-safe. Opening costs one pass over each allocation table."""

    format = "vhdx"

    def __init__(self, layers: Sequence[VhdxLayer]) -> None:
        """Of a chain as `open_chain` returns it, its tables loaded. Takes the files over."""
        self.layers = tuple(layers)
        """The image's own file first, then its parents."""
        top = self.layers[0]
        self.path: Path = top.source.path
        self.size_bytes, self.sector_bytes = top.size_bytes, top.metadata.sector_bytes
        self.subformat = top.subformat
        self.files: tuple[ImageFile, ...] = tuple(layer.source.file for layer in self.layers)
        self._overlay = Overlay(self.layers)

    @classmethod
    def open(cls, fs: FileSystem, path: Path, parents: Sequence[Path] = ()) -> VhdxImage:
        """`parents`: folders, besides the image's own, that parents may lie in.

        ImageError: not there, unreadable, no VHDX, damaged, or without its parents.
        """
        memory = ChainMemory()
        layers = open_chain(fs, path, lambda source: VhdxLayer(source, memory), parents)
        try:
            for layer in layers:
                layer.load(memory)
            return cls(layers)
        except BaseException:
            close_all(layers)
            raise

    @property
    def data_write_id(self) -> UUID:
        """The identity of the content, by which a child knows its parent (§2.6.2.6.3)."""
        return self.layers[0].header.data_write_id

    def allocated(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        return coalesce(self._overlay.allocated(max(start, 0), min(stop, self.size_bytes)))

    def read_into(self, offset: int, buffer: Buffer) -> None:
        target = writable_bytes(buffer)
        check_range(self.path, offset, len(target), self.size_bytes)
        self._overlay.read_into(offset, target)

    def facts(self) -> tuple[FileFacts, ...]:
        return tuple(layer.facts() for layer in self.layers)

    def close(self) -> None:
        close_all(self.layers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _current_header(source: Source) -> tuple[Header, int]:
    """The header that counts (§2.2.2), and how many are damaged."""
    if source.size_bytes < HEADER_SECTION_BYTES or source.read(0, len(SIGNATURE)) != SIGNATURE:
        hint = 'if it is a raw disk set format = "raw", else put back a whole copy of it'
        raise ImageError(f"image {source.path} is no VHDX: it does not start as one", hint=hint)
    raw, headers, problem = [], [], ""
    for offset in HEADER_OFFSETS:
        data = source.read(offset, HEADER_BYTES)
        try:
            headers.append(Header.decode(data))
            raw.append(data)
        except ValueError as error:
            problem = str(error)
    if not headers:
        raise damaged(source, f"neither of its headers can be used: {problem}")
    if len(headers) == 2 and headers[0].sequence == headers[1].sequence and raw[0] != raw[1]:
        raise damaged(source, f"its headers differ, and both have the sequence number {headers[0].sequence}")
    header = max(headers, key=lambda header: header.sequence)
    if header.version != 1:
        raise damaged(source, f"its format version is {header.version}, only 1 is known")
    return header, len(HEADER_OFFSETS) - len(headers)


def _regions(source: Source) -> tuple[dict[UUID, Region], int]:
    """Every region of the file by its GUID, on whole MiB and inside the file, and how many tables are damaged."""
    tables, problem = [], ""
    for offset in REGION_TABLE_OFFSETS:
        try:
            tables.append(decode_regions(source.read(offset, REGION_TABLE_BYTES)))
        except ValueError as error:
            problem = str(error)
    if not tables:
        raise damaged(source, f"neither of its region tables can be used: {problem}")
    regions = tables[0]
    if any(table != regions for table in tables):
        raise damaged(source, "its two region tables name different places")
    for name, what in ((BAT_REGION, "block allocation table"), (METADATA_REGION, "metadata")):
        if name not in regions:
            raise damaged(source, f"its region tables name no {what}")
    for region in regions.values():
        impossible = region.problem()
        if impossible is None and region.stop > source.size_bytes:
            impossible = f"{region.length} bytes at {region.offset} are not inside the file"
        if impossible is not None:
            raise damaged(source, f"it cannot have a region there: {impossible}")
    return regions, len(REGION_TABLE_OFFSETS) - len(tables)


def _metadata(source: Source, region: Region) -> Metadata:
    if region.length < METADATA_TABLE_BYTES:
        raise damaged(source, "its metadata region is empty")
    try:
        places = item_places(source.read(region.offset, METADATA_TABLE_BYTES), region.length)
        items = {name: source.read(region.offset + offset, length) for name, (offset, length) in places.items()}
        return Metadata.decode(items)
    except ValueError as error:
        raise damaged(source, str(error)) from error
