"""The VHD structures as bytes: hard disk footer, dynamic disk header, geometry.

Source: Microsoft, "Virtual Hard Disk Image Format Specification", version 1.0,
October 11, 2006. All integers are big-endian.

Hard disk footer (section "Hard Disk Footer Format"), 512 bytes at the end of
every VHD, with a copy at offset 0 of dynamic and differencing ones:

    offset size field                offset size field
    0      8    cookie "conectix"    48     8    current size in bytes
    8      4    features             56     4    geometry: cylinders 2, heads 1, sectors 1
    12     4    file format version  60     4    disk type: 2 fixed, 3 dynamic, 4 differencing
    16     8    data offset          64     4    checksum
    24     4    time stamp           68     16   unique id
    28     4    creator application  84     1    saved state
    32     4    creator version      85     427  reserved, zeros
    36     4    creator host OS
    40     8    original size

Dynamic disk header (section "Dynamic Disk Header Format"), 1024 bytes at the
footer's data offset:

    0      8    cookie "cxsparse"    36     4    checksum
    8      8    data offset, unused  40     16   parent's unique id
    16     8    table offset         56     4    parent's time stamp
    24     4    header version       60     4    reserved
    28     4    max table entries    64     512  parent's name, UTF-16 (big-endian)
    32     4    block size in bytes  576    192  8 parent locator entries; reserved to 1024

A parent locator entry (same section) says where in the file a name of the parent
lies: platform code 4, space 4, length in bytes 4, reserved 4, offset 8. `W2ku` is
an absolute and `W2ru` a relative path of Windows in UTF-16LE, `MacX` a file URL.
Some programs count the space in sectors, some in bytes; nothing here needs it.

Time stamps are seconds since January 1, 2000, 0:00 UTC.

Both checksums are the one's complement of the sum of all bytes of the structure
without the checksum field itself.

Which size counts? Virtual PC shows a guest the geometry's size, everybody else
the current size; the geometry algorithm rounds down, so the two differ. Which
program made the image is told by the creator: `vpc ` and `qemu` (what qemu-img
writes without force_size) mean the geometry, all others the current size. A
geometry at its maximum cannot express the size and always means the current one.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, NamedTuple
from urllib.parse import unquote
from uuid import UUID

from replica.model import SECTOR_BYTES

FOOTER_BYTES: Final = 512
OLD_FOOTER_BYTES: Final = 511
"""Before Virtual PC 2004 the footer was a byte shorter (section "Hard Disk Footer Format")."""
HEADER_BYTES: Final = 1024
MAX_VHD_BYTES: Final = 2040 << 30
"""2040 GiB: the most that Hyper-V and qemu take in this format."""
NO_BLOCK: Final = 0xFFFFFFFF
"""The block allocation table's entry of a block that is not allocated."""

_FOOTER: Final = struct.Struct(">8sIIQI4sI4sQQHBBII16sB427x")
_HEADER: Final = struct.Struct(">8sQQIIII16sI4x512s192s256x")
_LOCATOR: Final = struct.Struct(">4sIIIQ")
_FOOTER_CHECKSUM: Final = 64
_HEADER_CHECKSUM: Final = 36
_NO_OFFSET: Final = 0xFFFFFFFFFFFFFFFF
_NAME_BYTES: Final = 512
_WINDOWS_PATHS: Final = (b"W2ru", b"W2ku")
_EPOCH: Final = 946684800
NO_ID: Final = UUID(int=0)
_GEOMETRY_CREATORS: Final = (b"vpc ", b"qemu")


class DiskType(IntEnum):
    FIXED = 2
    DYNAMIC = 3
    DIFFERENCING = 4


@dataclass(frozen=True, slots=True)
class Geometry:
    """Cylinders, heads and sectors per track, as an ATA disk reports them."""

    cylinders: int
    heads: int
    sectors: int

    @property
    def size_bytes(self) -> int:
        return self.cylinders * self.heads * self.sectors * SECTOR_BYTES

    @classmethod
    def of(cls, size_bytes: int) -> Geometry:
        """The geometry of a size: the appendix "CHS Calculation" of the specification.

        A track gets 17 or 31 sectors while that keeps the cylinders under 1024,
        else 63, and 255 where 63 would take more than 65535 cylinders. What
        does not fill a cylinder is cut off; sizes over the maximum give it.
        """
        total = min(size_bytes // SECTOR_BYTES, MAX_GEOMETRY.size_bytes // SECTOR_BYTES)
        if total >= 65535 * 16 * 63:
            return cls(total // 255 // 16, 16, 255)
        tracks = total // 17
        heads = max(4, -(-tracks // 1024))
        if heads <= 16 and tracks < heads * 1024:
            return cls(tracks // heads, heads, 17)
        sectors = 31 if total // 31 < 16 * 1024 else 63
        return cls(total // sectors // 16, 16, sectors)


MAX_GEOMETRY: Final = Geometry(65535, 16, 255)


def stamp_of(seconds: float) -> int:
    """A Unix time as a VHD's time stamp."""
    return max(0, min(int(seconds) - _EPOCH, 0xFFFFFFFF))


@dataclass(frozen=True, slots=True)
class Footer:
    """A hard disk footer whose cookie, version and checksum fit."""

    disk_type: int
    current_size_bytes: int
    geometry: Geometry
    creator: bytes
    unique_id: UUID
    data_offset: int
    time_stamp: int = field(default=0, compare=False)
    saved_state: bool = field(default=False, compare=False)

    @property
    def size_bytes(self) -> int:
        """The size the guest sees; see the module's docstring."""
        if self.creator in _GEOMETRY_CREATORS and self.geometry != MAX_GEOMETRY:
            return self.geometry.size_bytes
        return self.current_size_bytes

    @classmethod
    def new(cls, disk_type: DiskType, size_bytes: int, unique_id: UUID) -> Footer:
        """The footer this project writes: a pure function of kind, size and id.

        Creator `win ` (Hyper-V's) makes every reader take the current size.
        The id is the disk's and stays, whatever the size; the time stamp is
        zero, so a footer written again after a crash is the same bytes.
        """
        offset = _NO_OFFSET if disk_type == DiskType.FIXED else FOOTER_BYTES
        return cls(disk_type, size_bytes, Geometry.of(size_bytes), b"win ", unique_id, offset)

    def encode(self) -> bytes:
        """512 bytes with a valid checksum."""
        g = self.geometry
        size = self.current_size_bytes
        data = bytearray(
            _FOOTER.pack(b"conectix", 2, 0x00010000, self.data_offset, self.time_stamp, self.creator, 0x000A0000,
                         b"Wi2k", size, size, g.cylinders, g.heads, g.sectors, self.disk_type, 0,
                         self.unique_id.bytes, self.saved_state)
        )  # fmt: skip
        struct.pack_into(">I", data, _FOOTER_CHECKSUM, checksum(data, _FOOTER_CHECKSUM))
        return bytes(data)

    @classmethod
    def decode(cls, data: bytes) -> Footer:
        """The footer in 512 (or 511) bytes. ValueError says why they are none."""
        data = data.ljust(FOOTER_BYTES, b"\0")
        (cookie, _features, version, data_offset, stamp, creator, _creator_version, _host, _original, current,
         cylinders, heads, sectors, disk_type, check, unique_id, saved) = _FOOTER.unpack(data)  # fmt: skip
        if cookie != b"conectix":
            raise ValueError("it does not start with 'conectix'")
        if check != checksum(data, _FOOTER_CHECKSUM):
            raise ValueError("its checksum does not fit")
        if version >> 16 != 1:
            raise ValueError(f"its format version is {version >> 16}.{version & 0xFFFF}, only 1.x is known")
        geometry = Geometry(cylinders, heads, sectors)
        return cls(disk_type, current, geometry, creator, UUID(bytes=unique_id), data_offset, stamp, bool(saved))


class Locator(NamedTuple):
    """Where a name of the parent lies in the file; not yet believed."""

    code: bytes
    length: int
    offset: int

    def decode(self, data: bytes) -> str:
        """The path in what the file has there; empty where the platform's paths are not known."""
        if self.code in _WINDOWS_PATHS:
            return _text(data, "utf-16-le")
        if self.code == b"MacX":
            return unquote(_text(data, "utf-8").removeprefix("file://"))
        return ""


@dataclass(frozen=True, slots=True)
class DynamicHeader:
    """A dynamic disk header whose cookie, version and checksum fit; its numbers are not yet believed."""

    table_offset: int
    max_table_entries: int
    block_bytes: int
    parent_id: UUID = NO_ID
    parent_stamp: int = 0
    parent_name: str = ""
    locators: tuple[Locator, ...] = ()

    def encode(self) -> bytes:
        """1024 bytes with a valid checksum."""
        name = self.parent_name.encode("utf-16-be", "surrogatepass")[:_NAME_BYTES]
        entries = b"".join(
            _LOCATOR.pack(entry.code, -(-entry.length // SECTOR_BYTES) * SECTOR_BYTES, entry.length, 0, entry.offset)
            for entry in self.locators
        )
        data = bytearray(
            _HEADER.pack(b"cxsparse", _NO_OFFSET, self.table_offset, 0x00010000, self.max_table_entries,
                         self.block_bytes, 0, self.parent_id.bytes, self.parent_stamp, name, entries)
        )  # fmt: skip
        struct.pack_into(">I", data, _HEADER_CHECKSUM, checksum(data, _HEADER_CHECKSUM))
        return bytes(data)

    @classmethod
    def decode(cls, data: bytes) -> DynamicHeader:
        """The header in 1024 bytes. ValueError says why they are none."""
        (cookie, _next, table_offset, version, entries, block_bytes, check,
         parent_id, parent_stamp, name, locators) = _HEADER.unpack(data)  # fmt: skip
        if cookie != b"cxsparse":
            raise ValueError("it does not start with 'cxsparse'")
        if check != checksum(data, _HEADER_CHECKSUM):
            raise ValueError("its checksum does not fit")
        if version >> 16 != 1:
            raise ValueError(f"its version is {version >> 16}.{version & 0xFFFF}, only 1.x is known")
        found = (Locator(code, length, offset) for code, _, length, _, offset in _LOCATOR.iter_unpack(locators))
        return cls(
            table_offset,
            entries,
            block_bytes,
            UUID(bytes=parent_id),
            parent_stamp,
            _text(name, "utf-16-be"),
            tuple(locator for locator in found if locator.code != bytes(4)),
        )


def _text(data: bytes, encoding: str) -> str:
    return data.decode(encoding, "replace").partition("\0")[0]


def checksum(data: bytes | bytearray, field: int) -> int:
    """One's complement of the sum of all bytes but the four of the checksum at `field`."""
    return ~(sum(data) - sum(data[field : field + 4])) & 0xFFFFFFFF
