"""The VHDX structures as bytes: file identifier, headers, region table.

Source: Microsoft, [MS-VHDX] "Virtual Hard Disk v2 (VHDX) File Format", revision
8.0; sections are given as §. All integers are little-endian, GUIDs are in their
mixed-endian binary form (`UUID.bytes_le`), checksums are CRC-32C over the whole
structure with the checksum field as zeros.

    offset   what                                   §
    0        file type identifier "vhdxfile"        2.2.1
    64 KiB   header, 4 KiB                          2.2.2
    128 KiB  header, the other copy
    192 KiB  region table, 64 KiB                   2.2.3
    256 KiB  region table, the other copy
    1 MiB …  log, BAT region, metadata region, blocks: anywhere, each on whole MiB, nothing on another

Header: signature "head", checksum 4, sequence number 8, file write GUID 16, data
write GUID 16, log GUID 16, log version 2, version 2, log length 4, log offset 8.

Region table: "regi", checksum 4, count 4, reserved 4; then GUID 16, file offset
8, length 4, required 4 for each region.

Nothing here is believed beyond its own bytes: whether numbers fit the file is
the reader's to check.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from replica._native import crc32c

MIB: Final = 1 << 20
SIGNATURE: Final = b"vhdxfile"
CREATOR_BYTES: Final = 512
HEADER_OFFSETS: Final = (64 << 10, 128 << 10)
HEADER_BYTES: Final = 4096
REGION_TABLE_OFFSETS: Final = (192 << 10, 256 << 10)
REGION_TABLE_BYTES: Final = 64 << 10
HEADER_SECTION_BYTES: Final = MIB
MAX_ENTRIES: Final = 2047
"""Most entries of a region table and of a metadata table (§2.2.3.1, §2.6.1.1)."""
BITMAP_BLOCK_BYTES: Final = MIB
"""A sector bitmap block (§2.4)."""
NO_ID: Final = UUID(int=0)

BAT_REGION: Final = UUID("2dc27766-f623-4200-9d64-115e9bfd4a08")
METADATA_REGION: Final = UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")

# Payload block states (§2.5.1.1) and the one of a sector bitmap block that is there (§2.5.1.2).
NOT_PRESENT: Final = 0
UNDEFINED: Final = 1
ZERO: Final = 2
UNMAPPED: Final = 3
FULLY_PRESENT: Final = 6
PARTIALLY_PRESENT: Final = 7
BITMAP_PRESENT: Final = 6

_HEADER: Final = struct.Struct("<4sIQ16s16s16sHHIQ")
_REGIONS: Final = struct.Struct("<4sIII")
_REGION: Final = struct.Struct("<16sQII")
_CHECKSUM: Final = slice(4, 8)


def encode_identifier(creator: str) -> bytes:
    """The file type identifier (§2.2.1) in 64 KiB; the creator has at most 256 UTF-16 units."""
    return (SIGNATURE + creator.encode("utf-16-le").ljust(CREATOR_BYTES, b"\0")).ljust(HEADER_OFFSETS[0], b"\0")


@dataclass(frozen=True, slots=True)
class Header:
    """A header whose signature and checksum fit (§2.2.2)."""

    sequence: int
    file_write_id: UUID
    data_write_id: UUID
    log_id: UUID
    log_offset: int
    log_bytes: int
    log_version: int = 0
    version: int = 1

    def encode(self) -> bytes:
        """4096 bytes with a valid checksum."""
        ids = (self.file_write_id.bytes_le, self.data_write_id.bytes_le, self.log_id.bytes_le)
        data = _HEADER.pack(
            b"head", 0, self.sequence, *ids, self.log_version, self.version, self.log_bytes, self.log_offset
        )
        return with_checksum(data.ljust(HEADER_BYTES, b"\0"))

    @classmethod
    def decode(cls, data: bytes) -> Header:
        """The header in 4096 bytes. ValueError says why they are none."""
        signature, _, sequence, file_id, data_id, log_id, log_version, version, length, offset = _HEADER.unpack_from(
            data
        )
        if signature != b"head":
            raise ValueError("it does not start with 'head'")
        if not checksum_fits(data):
            raise ValueError("its checksum does not fit")
        file_write, data_write, log = (UUID(bytes_le=raw) for raw in (file_id, data_id, log_id))
        return cls(sequence, file_write, data_write, log, offset, length, log_version, version)


@dataclass(frozen=True, slots=True)
class Region:
    """A place in the file, as a region table or a header says (§2.2.3.2)."""

    offset: int
    length: int

    @property
    def stop(self) -> int:
        return self.offset + self.length

    def problem(self) -> str | None:
        """Why no object of a VHDX can lie there (§2.1), or None."""
        if self.offset % MIB or self.length % MIB:
            return f"{self.length} bytes at {self.offset} are not on whole MiB"
        if self.offset < HEADER_SECTION_BYTES:
            return f"{self.length} bytes at {self.offset} lie on the headers"
        return None


def encode_regions(regions: Mapping[UUID, Region]) -> bytes:
    """A region table of 64 KiB, every region marked as required."""
    rows = [_REGION.pack(name.bytes_le, region.offset, region.length, 1) for name, region in regions.items()]
    data = _REGIONS.pack(b"regi", 0, len(rows), 0) + b"".join(rows)
    return with_checksum(data.ljust(REGION_TABLE_BYTES, b"\0"))


def decode_regions(data: bytes) -> dict[UUID, Region]:
    """Every region by its GUID. ValueError says why the 64 KiB are no region table, or one that cannot be used.

    An unknown region that is required is refused. The known ones are known
    whatever their flag says: writers differ in it.
    """
    signature, _, count, _ = _REGIONS.unpack_from(data)
    if signature != b"regi":
        raise ValueError("it does not start with 'regi'")
    if not checksum_fits(data):
        raise ValueError("its checksum does not fit")
    if count > MAX_ENTRIES:
        raise ValueError(f"it has {count} entries, more than {MAX_ENTRIES}")
    regions: dict[UUID, Region] = {}
    for place in range(count):
        raw, offset, length, required = _REGION.unpack_from(data, _REGIONS.size + place * _REGION.size)
        name = UUID(bytes_le=raw)
        if name in regions:
            raise ValueError(f"it has the region {name} twice")
        if required & 1 and name not in (BAT_REGION, METADATA_REGION):
            raise ValueError(f"it has a required region that is not known: {name}")
        regions[name] = Region(offset, length)
    return regions


def checksum_fits(data: bytes) -> bool:
    """Whether the CRC-32C at offset 4 is that of the whole structure."""
    return crc32c(data[8:], crc32c(data[:4] + bytes(4))) == int.from_bytes(data[_CHECKSUM], "little")


def with_checksum(data: bytes) -> bytes:
    """The structure with the CRC-32C at offset 4 set."""
    crc = crc32c(data[8:], crc32c(data[:4] + bytes(4)))
    return data[:4] + crc.to_bytes(4, "little") + data[8:]
