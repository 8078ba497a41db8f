"""The metadata of a VHDX: disk size, block size, sectors, identity, parent.

Source: [MS-VHDX] §2.6. The metadata region starts with a table of 64 KiB:
"metadata", reserved 2, count 2, reserved 20; then for each item its GUID 16,
offset in the region 4, length 4, flags 4 (1 user, 2 virtual disk, 4 required),
reserved 4. The items follow in any order. There is no checksum.

The parent locator (§2.6.2.6) is one of the items: type GUID 16, reserved 2,
count 2; then offset of key 4, offset of value 4, length of key 2, length of
value 2 for each pair, in bytes of UTF-16LE, from the start of the item.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

from replica.images.vhdx_format import MAX_ENTRIES, MIB
from replica.model import MAX_DISK_BYTES

METADATA_TABLE_BYTES: Final = 64 << 10
MAX_ITEM_BYTES: Final = MIB
MIN_BLOCK_BYTES: Final = MIB
MAX_BLOCK_BYTES: Final = 256 * MIB

FILE_PARAMETERS: Final = UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
DISK_SIZE: Final = UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
DISK_ID: Final = UUID("beca12ab-b2e6-4523-93ef-c309e000c746")
LOGICAL_SECTOR: Final = UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f")
PHYSICAL_SECTOR: Final = UUID("cda348c7-445d-4471-9cc9-e9885251c556")
PARENT_LOCATOR: Final = UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")
VHDX_LOCATOR: Final = UUID("b04aefb7-d19e-4a81-b789-25b8e9445913")
"""The only type of parent locator there is (§2.6.2.6.3)."""

_METADATA: Final = struct.Struct("<8sHH20s")
_ITEM: Final = struct.Struct("<16sIIII")
_LOCATOR: Final = struct.Struct("<16sHH")
_PAIR: Final = struct.Struct("<IIHH")
_IS_USER, _IS_DISK, _IS_REQUIRED = 1, 2, 4
_LEAVE_ALLOCATED, _HAS_PARENT = 1, 2
_ITEM_BYTES: Final = {FILE_PARAMETERS: 8, DISK_SIZE: 8, DISK_ID: 16, LOGICAL_SECTOR: 4, PHYSICAL_SECTOR: 4}
_NAMES: Final = {
    FILE_PARAMETERS: "file parameters",
    DISK_SIZE: "virtual disk size",
    DISK_ID: "virtual disk id",
    LOGICAL_SECTOR: "logical sector size",
    PHYSICAL_SECTOR: "physical sector size",
}


@dataclass(frozen=True, slots=True)
class Metadata:
    """What the known metadata items say (§2.6.2); block size, sectors and disk size are checked."""

    block_bytes: int
    size_bytes: int
    disk_id: UUID
    sector_bytes: int = 512
    physical_sector_bytes: int = 4096
    keeps_blocks: bool = False
    """LeaveBlockAllocated: the sign of a fixed disk."""
    has_parent: bool = False
    parent: Mapping[str, str] = field(default_factory=dict)
    """The key-value pairs of the parent locator; empty without a parent."""

    @property
    def chunk_blocks(self) -> int:
        """The chunk ratio: payload blocks per sector bitmap block (§2.4)."""
        return (self.sector_bytes << 23) // self.block_bytes

    @property
    def count_blocks(self) -> int:
        """Payload blocks of the disk."""
        return -(-self.size_bytes // self.block_bytes)

    @property
    def count_entries(self) -> int:
        """Entries that the BAT needs (§2.5): a sector bitmap's behind each chunk, of the last only with a parent."""
        if self.has_parent:
            return -(-self.count_blocks // self.chunk_blocks) * (self.chunk_blocks + 1)
        return self.count_blocks + max(0, self.count_blocks - 1) // self.chunk_blocks

    def encode(self) -> bytes:
        """A metadata region of 1 MiB."""
        flags = (_LEAVE_ALLOCATED if self.keeps_blocks else 0) | (_HAS_PARENT if self.has_parent else 0)
        items = [
            (FILE_PARAMETERS, _IS_REQUIRED, struct.pack("<II", self.block_bytes, flags)),
            (DISK_SIZE, _IS_REQUIRED | _IS_DISK, struct.pack("<Q", self.size_bytes)),
            (DISK_ID, _IS_REQUIRED | _IS_DISK, self.disk_id.bytes_le),
            (LOGICAL_SECTOR, _IS_REQUIRED | _IS_DISK, struct.pack("<I", self.sector_bytes)),
            (PHYSICAL_SECTOR, _IS_REQUIRED | _IS_DISK, struct.pack("<I", self.physical_sector_bytes)),
        ]
        if self.has_parent:
            items.append((PARENT_LOCATOR, _IS_REQUIRED, encode_locator(self.parent)))
        table, body = _METADATA.pack(b"metadata", 0, len(items), bytes(20)), b""
        for name, kind, data in items:
            table += _ITEM.pack(name.bytes_le, METADATA_TABLE_BYTES + len(body), len(data), kind, 0)
            body += data
        return (table.ljust(METADATA_TABLE_BYTES, b"\0") + body).ljust(MIB, b"\0")

    @classmethod
    def decode(cls, items: Mapping[UUID, bytes]) -> Metadata:
        """The items by their GUIDs, as `item_places` found them. ValueError says what cannot be."""
        for name, length in _ITEM_BYTES.items():
            if len(items.get(name, b"")) != length:
                raise ValueError(f"its metadata has no {_NAMES[name]} of {length} bytes")
        block_bytes, flags = struct.unpack("<II", items[FILE_PARAMETERS])
        (size_bytes,) = struct.unpack("<Q", items[DISK_SIZE])
        (sector,) = struct.unpack("<I", items[LOGICAL_SECTOR])
        (physical,) = struct.unpack("<I", items[PHYSICAL_SECTOR])
        if not MIN_BLOCK_BYTES <= block_bytes <= MAX_BLOCK_BYTES or block_bytes & (block_bytes - 1):
            limits = f"a power of two from {MIN_BLOCK_BYTES} to {MAX_BLOCK_BYTES}"
            raise ValueError(f"its blocks have {block_bytes} bytes, which is not {limits}")
        if sector not in (512, 4096):
            raise ValueError(f"its logical sectors have {sector} bytes: neither 512 nor 4096")
        if size_bytes > MAX_DISK_BYTES or size_bytes % sector:
            problem = f"not whole sectors of {sector}, or more than {MAX_DISK_BYTES}"
            raise ValueError(f"its size is {size_bytes} bytes: {problem}")
        has_parent = bool(flags & _HAS_PARENT)
        if has_parent and PARENT_LOCATOR not in items:
            raise ValueError("it has a parent, but nothing in its metadata says which")
        parent = decode_locator(items[PARENT_LOCATOR]) if has_parent else {}
        keeps_blocks = bool(flags & _LEAVE_ALLOCATED) and not has_parent
        disk_id = UUID(bytes_le=items[DISK_ID])
        return cls(block_bytes, size_bytes, disk_id, sector, physical, keeps_blocks, has_parent, parent)


def item_places(table: bytes, region_bytes: int) -> dict[UUID, tuple[int, int]]:
    """(offset, length) in the metadata region of every known item in the table of 64 KiB (§2.6.1).

    ValueError says why the table cannot be used. Items that are not known are
    passed over, unless the file is not to be read without them.
    """
    signature, _, count, _ = _METADATA.unpack_from(table)
    if signature != b"metadata":
        raise ValueError("its metadata does not start with 'metadata'")
    if count > MAX_ENTRIES:
        raise ValueError(f"its metadata table has {count} entries, more than {MAX_ENTRIES}")
    seen: set[tuple[bytes, int]] = set()
    places: dict[UUID, tuple[int, int]] = {}
    spans = []
    for row in range(count):
        raw, offset, length, flags, _ = _ITEM.unpack_from(table, _METADATA.size + row * _ITEM.size)
        name, user = UUID(bytes_le=raw), flags & _IS_USER
        if (raw, user) in seen:
            raise ValueError(f"its metadata has the item {name} twice")
        seen.add((raw, user))
        known = not user and (name in _ITEM_BYTES or name == PARENT_LOCATOR)
        if flags & _IS_REQUIRED and not known:
            raise ValueError(f"its metadata has a required item that is not known: {name}")
        if length and (offset < METADATA_TABLE_BYTES or length > MAX_ITEM_BYTES or offset + length > region_bytes):
            raise ValueError(f"its metadata item {name} ({length} bytes at {offset}) is not inside its region")
        spans.append((offset, offset + length))
        if known:
            places[name] = (offset, length)
    spans = sorted(span for span in spans if span[0] < span[1])
    if any(before[1] > after[0] for before, after in itertools.pairwise(spans)):
        raise ValueError("its metadata items overlap")
    return places


def encode_locator(pairs: Mapping[str, str]) -> bytes:
    """A parent locator of the VHDX type (§2.6.2.6)."""
    place = _LOCATOR.size + len(pairs) * _PAIR.size
    table, texts = _LOCATOR.pack(VHDX_LOCATOR.bytes_le, 0, len(pairs)), b""
    for key, value in pairs.items():
        first, second = key.encode("utf-16-le"), value.encode("utf-16-le")
        start = place + len(texts)
        table += _PAIR.pack(start, start + len(first), len(first), len(second))
        texts += first + second
    return table + texts


def decode_locator(data: bytes) -> dict[str, str]:
    """The pairs of a parent locator. ValueError for another type, or what is no locator."""
    if len(data) < _LOCATOR.size:
        raise ValueError("its parent locator is cut short")
    kind, _, count = _LOCATOR.unpack_from(data)
    if UUID(bytes_le=kind) != VHDX_LOCATOR:
        raise ValueError(f"its parent is of a type that is not known: {UUID(bytes_le=kind)}")
    if _LOCATOR.size + count * _PAIR.size > len(data):
        raise ValueError("its parent locator is cut short")
    pairs: dict[str, str] = {}
    left = len(data)
    for row in range(count):
        key_at, value_at, key_bytes, value_bytes = _PAIR.unpack_from(data, _LOCATOR.size + row * _PAIR.size)
        if key_at + key_bytes > len(data) or value_at + value_bytes > len(data):
            raise ValueError("its parent locator points beyond its own end")
        left -= key_bytes + value_bytes
        if left < 0:
            raise ValueError("its parent locator has more text than room for it")
        try:
            key = data[key_at : key_at + key_bytes].decode("utf-16-le")
            value = data[value_at : value_at + value_bytes].decode("utf-16-le")
        except UnicodeDecodeError as error:
            raise ValueError("its parent locator is not in UTF-16") from error
        if key in pairs:
            raise ValueError(f"its parent locator has {key!r} twice")
        pairs[key] = value
    return pairs
