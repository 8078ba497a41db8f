"""Makes VHD files byte by byte, from the specification and not from the code under test.

A `Vhd` is a recipe: change a field, `build()`, and the file has exactly that
fault and valid checksums, unless `*_checksum` says otherwise.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

FIXED, DYNAMIC, DIFFERENCING = 2, 3, 4
NONE = 0xFFFFFFFF


def checksummed(data: bytes, at: int, error: int = 0) -> bytes:
    cleared = data[:at] + bytes(4) + data[at + 4 :]
    return data[:at] + struct.pack(">I", (0xFFFFFFFF - sum(cleared) + error) & 0xFFFFFFFF) + data[at + 4 :]


def footer(
    size: int,
    kind: int = FIXED,
    *,
    creator: bytes = b"win ",
    chs: tuple[int, int, int] = (1, 4, 17),
    data_offset: int = 0xFFFFFFFFFFFFFFFF,
    unique_id: bytes = bytes(range(16)),
    version: int = 0x10000,
    cookie: bytes = b"conectix",
    error: int = 0,
) -> bytes:
    data = cookie + struct.pack(">IIQI", 2, version, data_offset, 1234) + creator + struct.pack(">I", 0x60001) + b"Wi2k"
    data += struct.pack(">QQHBBII", size, size, *chs, kind, 0) + unique_id
    return checksummed(data.ljust(512, b"\0"), 64, error)


@dataclass
class Vhd:
    """A dynamic VHD. `blocks` lie in the file in the order of the dict; `bitmaps` default to all ones."""

    size: int
    block_bytes: int = 8192
    blocks: dict[int, bytes] = field(default_factory=dict)
    bitmaps: dict[int, bytes] = field(default_factory=dict)
    table: dict[int, int] = field(default_factory=dict)
    entries: int | None = None
    kind: int = DYNAMIC
    creator: bytes = b"win "
    chs: tuple[int, int, int] = (1, 4, 17)
    header_offset: int = 512
    table_offset: int = 1536
    header_version: int = 0x10000
    header_cookie: bytes = b"cxsparse"
    header_error: int = 0
    gap: int = 0
    head: bytes | None = None
    tail: bytes | None = None
    unique_id: bytes = bytes(range(16))
    parent_id: bytes = bytes(16)
    parent_stamp: int = 0
    parent_name: bytes = b""
    locators: tuple[tuple[bytes, bytes], ...] = ()
    locator_place: tuple[int, int] | None = None

    @property
    def bitmap_bytes(self) -> int:
        return -(-self.block_bytes // 512 // 8 // 512) * 512 or 512

    @property
    def count(self) -> int:
        return -(-self.size // self.block_bytes) if self.block_bytes else 0

    @property
    def locators_start(self) -> int:
        return -(-(1536 + 4 * self.count) // 512) * 512

    def footer(self) -> bytes:
        return footer(
            self.size,
            self.kind,
            creator=self.creator,
            chs=self.chs,
            data_offset=self.header_offset,
            unique_id=self.unique_id,
        )

    def header(self) -> bytes:
        entries = self.count if self.entries is None else self.entries
        data = self.header_cookie + struct.pack(
            ">QQIII", 2**64 - 1, self.table_offset, self.header_version, entries, self.block_bytes
        )
        data += (
            bytes(4) + self.parent_id + struct.pack(">II", self.parent_stamp, 0) + self.parent_name.ljust(512, b"\0")
        )
        place = self.locators_start
        for code, path in self.locators:
            where, length = self.locator_place or (place, len(path))
            data += code + struct.pack(">IIIQ", 512, length, 0, where)
            place += 512
        return checksummed(data.ljust(1024, b"\0"), 36, self.header_error)

    def build(self) -> bytes:
        table = [NONE] * self.count
        start = self.locators_start
        body = b"".join(path.ljust(512, b"\0") for _, path in self.locators)
        for number, data in self.blocks.items():
            body += bytes(self.gap * 512)
            table[number] = (start + len(body)) // 512
            bitmap = self.bitmaps.get(number, b"\xff" * self.bitmap_bytes)
            body += bitmap.ljust(self.bitmap_bytes, b"\0") + data.ljust(self.block_bytes, b"\xee")
        for number, entry in self.table.items():
            table[number] = entry
        head = self.footer() if self.head is None else self.head
        tail = self.footer() if self.tail is None else self.tail
        return (head + self.header() + struct.pack(f">{len(table)}I", *table)).ljust(start, b"\0") + body + tail

    def content(self, parent: bytes = b"") -> bytes:
        """What the disk reads as, over its parent's content, sector by sector, straight from the specification."""
        disk = bytearray(parent[: self.size].ljust(self.size, b"\0"))
        for number, data in self.blocks.items():
            bitmap = self.bitmaps.get(number, b"\xff" * self.bitmap_bytes)
            stored = data.ljust(self.block_bytes, b"\xee")
            for sector in range(self.block_bytes // 512):
                at = number * self.block_bytes + sector * 512
                if at < self.size and bitmap[sector // 8] >> (7 - sector % 8) & 1:
                    disk[at : at + 512] = stored[sector * 512 : sector * 512 + 512]
        return bytes(disk)


def naive_read(data: bytes, parent: bytes = b"") -> bytes:
    """The disk in the bytes of a dynamic or differencing file, over its parent's content; nothing is checked."""
    (size,) = struct.unpack_from(">Q", data, 48)
    (header,) = struct.unpack_from(">Q", data, 16)
    (table,) = struct.unpack_from(">Q", data, header + 16)
    entries, block_bytes = struct.unpack_from(">II", data, header + 28)
    bitmap_bytes = Vhd(0, block_bytes).bitmap_bytes
    disk = bytearray(parent[:size].ljust(size, b"\0"))
    for number, entry in enumerate(struct.unpack_from(f">{entries}I", data, table)):
        for sector in range(block_bytes // 512 if entry != NONE else 0):
            at = number * block_bytes + sector * 512
            if at < size and data[entry * 512 + sector // 8] >> (7 - sector % 8) & 1:
                place = entry * 512 + bitmap_bytes + sector * 512
                disk[at : at + 512] = data[place : place + 512]
    return bytes(disk)
