"""Where the numbers of a VHD or VHDX stand, and its checksums made to fit again: what a mutator must know of a format.

Written from the specifications, tolerant of any content. A `Site` is a number in a file.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from replica._native import crc32c
from tests.fuzz.sparse import Sparse

MIB, LOG_SECTOR = 1 << 20, 4096
TABLE_ROWS = 40
"""Entries of a table that are mutated one by one."""


class Site(NamedTuple):
    offset: int
    width: int
    order: str
    """As `struct` has it: `<` or `>`."""

    def get(self, file: Sparse) -> int:
        return int.from_bytes(file.read(self.offset, self.width), "little" if self.order == "<" else "big")

    def put(self, file: Sparse, value: int) -> None:
        value &= (1 << 8 * self.width) - 1
        file.write(self.offset, value.to_bytes(self.width, "little" if self.order == "<" else "big"))


class Structure(NamedTuple):
    """What the fuzzer knows of one format."""

    sites: Callable[[Sparse], list[Site]]
    fix: Callable[[Sparse], None]
    """Every checksum fits afterwards."""
    twins: Callable[[Sparse], list[tuple[int, int, int]]]
    """Structures that a file has twice: their offsets, and their length."""


def _row(base: int, order: str, *widths: int) -> list[Site]:
    """Numbers one behind the other."""
    sites = []
    for width in widths:
        sites.append(Site(base, width, order))
        base += width
    return sites


# VHD: hard disk footer, dynamic disk header, block allocation table


def _footers(file: Sparse) -> list[int]:
    places = dict.fromkeys((0, file.size - 512, file.size - 511))
    return [at for at in places if at >= 0 and file.read(at, 8) == b"conectix"]


def _headers(file: Sparse) -> list[int]:
    places = dict.fromkeys([struct.unpack(">Q", file.read(at + 16, 8))[0] for at in _footers(file)] + [512])
    return [at for at in places if file.read(at, 8) == b"cxsparse"]


def _vhd_sites(file: Sparse) -> list[Site]:
    sites: list[Site] = []
    for at in _footers(file):
        sites += _row(at + 8, ">", 4, 4, 8, 4, 4, 4, 4, 8, 8, 2, 1, 1, 4, 4, 8, 8, 1)
    for at in _headers(file):
        sites += _row(at + 8, ">", 8, 8, 4, 4, 4, 4, 8, 8, 4, 4, 2, 2)
        for locator in range(8):
            sites += _row(at + 576 + 24 * locator, ">", 4, 4, 4, 4, 8)
        (table,) = struct.unpack(">Q", file.read(at + 16, 8))
        sites += _row(table, ">", *[4] * TABLE_ROWS)
    return sites


def _vhd_sum(file: Sparse, at: int, length: int, field: int) -> None:
    data = file.read(at, length)
    total = sum(data) - sum(data[field : field + 4])
    file.write(at + field, struct.pack(">I", ~total & 0xFFFFFFFF))


def _vhd_fix(file: Sparse) -> None:
    for at in _headers(file):
        _vhd_sum(file, at, 1024, 36)
    for at in _footers(file):
        _vhd_sum(file, at, min(512, file.size - at), 64)


def _vhd_twins(file: Sparse) -> list[tuple[int, int, int]]:
    return [(0, file.size - 512, 512), (0, file.size - 511, 511)]


# VHDX: headers, region tables, metadata, block allocation table, log


def _regions(file: Sparse) -> Iterator[tuple[bytes, int]]:
    """The first part of a region's GUID, and where the region is."""
    for table in (3 << 16, 4 << 16):
        count = struct.unpack("<I", file.read(table + 8, 4))[0]
        for row in range(min(count, TABLE_ROWS)):
            name, offset = struct.unpack("<16sQ", file.read(table + 16 + 32 * row, 24))
            yield name[:4], offset


def _entries(file: Sparse) -> list[int]:
    """Log entries, wherever there is one: the log may be moved by a mutation."""
    places = {at // LOG_SECTOR * LOG_SECTOR for at in file.pieces}
    return [at for at in sorted(places) if file.read(at, 4) == b"loge"]


def _vhdx_sites(file: Sparse) -> list[Site]:
    sites: list[Site] = []
    for at in (1 << 16, 2 << 16):
        sites += _row(at + 8, "<", 8, 8, 8, 8, 8, 8, 8, 2, 2, 4, 8)
    for at in (3 << 16, 4 << 16):
        count = min(struct.unpack("<I", file.read(at + 8, 4))[0], TABLE_ROWS)
        sites += _row(at + 8, "<", 4, 4)
        for row in range(count):
            sites += _row(at + 16 + 32 * row, "<", 4, 4, 4, 4, 8, 4, 4)
    for name, at in set(_regions(file)):
        if name == b"\x06\xa2\x7c\x8b":  # metadata
            sites += _metadata_sites(file, at)
        elif name == b"\x66\x77\xc2\x2d":  # block allocation table
            sites += _row(at, "<", *[8] * TABLE_ROWS)
            sites += [Site(piece, 8, "<") for piece in file.pieces if at < piece < at + MIB]
    for at in _entries(file):
        sites += _row(at + 8, "<", 4, 4, 8, 4, 4, 8, 8, 8, 8)
        count = min(struct.unpack("<I", file.read(at + 24, 4))[0], TABLE_ROWS)
        for row in range(count):
            sites += _row(at + 64 + 32 * row, "<", 4, 4, 8, 8, 8)
    return sites


def _metadata_sites(file: Sparse, at: int) -> list[Site]:
    sites = _row(at + 8, "<", 2, 2)
    count = min(struct.unpack("<H", file.read(at + 10, 2))[0], TABLE_ROWS)
    for row in range(count):
        sites += _row(at + 32 + 32 * row, "<", 4, 4, 4, 4, 4, 4, 4)
        offset, length = struct.unpack("<II", file.read(at + 48 + 32 * row, 8))
        if 0 < length <= 16:
            sites += _row(at + offset, "<", *[4] * (length // 4))
            sites += _row(at + offset, "<", *[8] * (length // 8))
        elif length:
            sites += _row(at + offset + 18, "<", 2, 4, 4, 2, 2, 4, 4, 2, 2, 4, 4, 2, 2)
    return sites


def _vhdx_fix(file: Sparse) -> None:
    for at, length in ((1 << 16, 4096), (2 << 16, 4096), (3 << 16, 1 << 16), (4 << 16, 1 << 16)):
        if file.read(at, 4) in (b"head", b"regi"):
            _vhdx_sum(file, at, length)
    for at in _entries(file):
        length = struct.unpack("<I", file.read(at + 8, 4))[0]
        if 64 <= length <= MIB:
            _vhdx_sum(file, at, length)


def _vhdx_sum(file: Sparse, at: int, length: int) -> None:
    data = file.read(at, length)
    file.write(at + 4, struct.pack("<I", crc32c(data[8:], crc32c(data[:4] + bytes(4)))))


def _vhdx_twins(file: Sparse) -> list[tuple[int, int, int]]:
    return [(1 << 16, 2 << 16, 4096), (3 << 16, 4 << 16, 1 << 16)]


STRUCTURES = {
    "vhd": Structure(_vhd_sites, _vhd_fix, _vhd_twins),
    "vhdx": Structure(_vhdx_sites, _vhdx_fix, _vhdx_twins),
}
