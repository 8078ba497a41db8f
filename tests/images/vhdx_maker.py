"""Makes VHDX files byte by byte, from [MS-VHDX] and not from the code under test.

A `Vhdx` is a recipe: change a field, `build()`, and the file has exactly that
fault and valid checksums, unless an `..._error` says otherwise. The file starts
with 1 MiB of headers; log, metadata and block allocation table follow, then the
blocks in the order of the dict.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from uuid import UUID

MIB = 1 << 20
BAT = UUID("2DC27766-F623-4200-9D64-115E9BFD4A08")
METADATA = UUID("8B7CA206-4790-4B9A-B8FE-575F050F886E")
PARAMETERS = UUID("CAA16737-FA36-4D43-B3B6-33F0AA44E76B")
SIZE = UUID("2FA54224-CD1B-4876-B211-5DBED83BF4B8")
DISK = UUID("BECA12AB-B2E6-4523-93EF-C309E000C746")
LOGICAL = UUID("8141BF1D-A96F-4709-BA47-F233A8FAAB5F")
PHYSICAL = UUID("CDA348C7-445D-4471-9CC9-E9885251C556")
LOCATOR = UUID("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C")
LOCATOR_TYPE = UUID("B04AEFB7-D19E-4A81-B789-25B8E9445913")
NONE = UUID(int=0)
DATA_WRITE = UUID(int=0xDA7A)
LOG_AT, METADATA_AT, BAT_AT, BLOCKS_AT = MIB, 2 * MIB, 3 * MIB, 4 * MIB
FULL, PARTIAL = 6, 7


@cache
def _table() -> list[int]:
    rows = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        rows.append(byte)
    return rows


@cache
def crc32c(data: bytes) -> int:
    table, crc = _table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def checksummed(data: bytes, error: int = 0) -> bytes:
    crc = crc32c(data[:4] + bytes(4) + data[8:]) ^ error
    return data[:4] + struct.pack("<I", crc) + data[8:]


def header(
    sequence: int = 7,
    *,
    signature: bytes = b"head",
    data_write: UUID = DATA_WRITE,
    log: UUID = NONE,
    log_version: int = 0,
    version: int = 1,
    log_at: int = LOG_AT,
    log_bytes: int = MIB,
    error: int = 0,
) -> bytes:
    data = signature + struct.pack("<IQ", 0, sequence) + UUID(int=1).bytes_le + data_write.bytes_le + log.bytes_le
    data += struct.pack("<HHIQ", log_version, version, log_bytes, log_at)
    return checksummed(data.ljust(4096, b"\0"), error)


def region_table(
    rows: Sequence[tuple[UUID, int, int, int]], *, signature: bytes = b"regi", count: int | None = None, error: int = 0
) -> bytes:
    data = signature + struct.pack("<III", 0, len(rows) if count is None else count, 0)
    for name, offset, length, required in rows:
        data += name.bytes_le + struct.pack("<QII", offset, length, required)
    return checksummed(data.ljust(65536, b"\0"), error)


def locator(pairs: Mapping[str, str], kind: UUID = LOCATOR_TYPE) -> bytes:
    texts = [(key.encode("utf-16-le"), value.encode("utf-16-le")) for key, value in pairs.items()]
    at, table = 20 + 12 * len(texts), kind.bytes_le + struct.pack("<HH", 0, len(texts))
    for key, value in texts:
        table += struct.pack("<IIHH", at, at + len(key), len(key), len(value))
        at += len(key) + len(value)
    return table + b"".join(key + value for key, value in texts)


def linked(name: str, linkage: UUID = DATA_WRITE) -> dict[str, str]:
    """What a child says of its parent."""
    return {"parent_linkage": f"{{{linkage}}}", "relative_path": f".\\{name}"}


@dataclass
class Vhdx:
    """`blocks` lie in the file in the order of the dict, `present` lists the sectors of a partial one."""

    size: int
    block_bytes: int = MIB
    sector: int = 512
    blocks: dict[int, bytes] = field(default_factory=dict)
    states: dict[int, int] = field(default_factory=dict)
    present: dict[int, set[int]] = field(default_factory=dict)
    parent: dict[str, str] | None = None
    entries: dict[int, int] = field(default_factory=dict)
    """Raw entries of the table, in place of what belongs there."""
    flags: int = 0
    headers: tuple[bytes, bytes] = field(default_factory=lambda: (header(6), header(7)))
    regions: tuple[tuple[UUID, int, int, int], ...] = ((BAT, BAT_AT, MIB, 1), (METADATA, METADATA_AT, MIB, 1))
    tables: tuple[bytes, bytes] | None = None
    items: dict[UUID, bytes] = field(default_factory=dict)
    """Metadata items in place of, or beside, those that belong there; empty: without it."""
    rows: tuple[tuple[UUID, int, int, int], ...] | None = None
    """The rows of the metadata table, in place of those that belong there: name, offset, length, flags."""
    metadata_signature: bytes = b"metadata"
    cookie: bytes = b"vhdxfile"

    @property
    def ratio(self) -> int:
        return 2**23 * self.sector // self.block_bytes

    @property
    def count(self) -> int:
        return -(-self.size // self.block_bytes)

    def index(self, block: int) -> int:
        return block + block // self.ratio

    def metadata(self) -> bytes:
        items = {
            PARAMETERS: struct.pack("<II", self.block_bytes, self.flags | (2 if self.parent is not None else 0)),
            SIZE: struct.pack("<Q", self.size),
            DISK: UUID(int=5).bytes_le,
            LOGICAL: struct.pack("<I", self.sector),
            PHYSICAL: struct.pack("<I", 4096),
        }
        if self.parent is not None:
            items[LOCATOR] = locator(self.parent)
        items |= self.items
        rows, body = [], b""
        for name, data in items.items():
            if data:
                rows.append((name, 65536 + len(body), len(data), 4))
                body += data
        rows = list(self.rows) if self.rows is not None else rows
        table = self.metadata_signature + struct.pack("<HH20x", 0, len(rows))
        for name, offset, length, flags in rows:
            table += name.bytes_le + struct.pack("<IIII", offset, length, flags, 0)
        return table.ljust(65536, b"\0") + body

    def table(self) -> dict[int, int]:
        """The block allocation table: raw entries by their number."""
        entries = {self.index(block): state for block, state in self.states.items()}
        at = BLOCKS_AT
        for block in self.blocks:
            entries[self.index(block)] = at | (PARTIAL if block in self.present else FULL)
            at += self.block_bytes
        for chunk in sorted({block // self.ratio for block in self.present}):
            entries[(chunk + 1) * self.ratio + chunk] = at | 6
            at += MIB
        return entries | self.entries

    def build(self) -> bytes:
        tables = self.tables or (region_table(self.regions), region_table(self.regions))
        file = bytearray(BLOCKS_AT)
        file[:8] = self.cookie
        for at, part in (
            (1 << 16, self.headers[0]),
            (2 << 16, self.headers[1]),
            (3 << 16, tables[0]),
            (4 << 16, tables[1]),
            (METADATA_AT, self.metadata()),
        ):
            file[at : at + len(part)] = part
        for number, entry in self.table().items():
            struct.pack_into("<Q", file, BAT_AT + 8 * number, entry)
        for data in self.blocks.values():
            file += data.ljust(self.block_bytes, b"\xee")
        for chunk in sorted({block // self.ratio for block in self.present}):
            file += self.bitmap(chunk)
        return bytes(file)

    def bitmap(self, chunk: int) -> bytes:
        bits = bytearray(MIB)
        for block, sectors in self.present.items():
            if block // self.ratio == chunk:
                for sector in sectors:
                    bit = block % self.ratio * (self.block_bytes // self.sector) + sector
                    bits[bit // 8] |= 1 << bit % 8
        return bytes(bits)

    def content(self, below: bytes = b"") -> bytes:
        """What the disk reads as, straight from the specification; `below`: what its parent reads as."""
        disk = (
            bytearray(below[: self.size].ljust(self.size, b"\0")) if self.parent is not None else bytearray(self.size)
        )
        for block in range(self.count):
            start, stop = block * self.block_bytes, min((block + 1) * self.block_bytes, self.size)
            if block in self.blocks:
                data = self.blocks[block].ljust(self.block_bytes, b"\xee")[: stop - start]
                if block not in self.present:
                    disk[start:stop] = data
                for sector in self.present.get(block, ()):
                    low, high = sector * self.sector, min((sector + 1) * self.sector, stop - start)
                    disk[start + low : start + high] = data[low:high]
            elif self.states.get(block, 0):
                disk[start:stop] = bytes(stop - start)
        return bytes(disk)
