"""What × where × how of a VHD that cannot be believed: a clear ImageError, in bounded memory and time."""

import struct
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vhd_maker import Vhd, footer

from replica.durable import FileSystem
from replica.errors import ImageError
from replica.images.vhd import VhdImage

GOOD = Vhd(10 * 8192, blocks={1: b"a" * 8192, 4: b"b" * 8192})


def refused(tmp_path: Path, data: bytes, match: str) -> None:
    path = tmp_path / "bad.vhd"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=match) as caught:
        VhdImage.open(FileSystem(), path)
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_the_undamaged_one_opens(tmp_path: Path) -> None:
    path = tmp_path / "good.vhd"
    path.write_bytes(GOOD.build())
    VhdImage.open(FileSystem(), path).close()


@pytest.mark.parametrize("size", [0, 1, 100, 510])
def test_too_short(tmp_path: Path, size: int) -> None:
    refused(tmp_path, b"c" * size, "fewer than a VHD footer")


@pytest.mark.parametrize("data", [b"\0" * 511, b"\0" * 512, b"text" * 4096, b"conectix" * 64])
def test_no_vhd(tmp_path: Path, data: bytes) -> None:
    refused(tmp_path, data, "is no VHD that can be read")


def test_missing_and_directory(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is not there"):
        VhdImage.open(FileSystem(), tmp_path / "gone.vhd")
    with pytest.raises(ImageError, match="is a directory"):
        VhdImage.open(FileSystem(), tmp_path)


def test_fixed_with_a_damaged_footer(tmp_path: Path) -> None:
    refused(tmp_path, bytes(8192) + footer(8192, error=1), "its checksum does not fit")
    refused(tmp_path, bytes(8192) + footer(8192, version=0x20000), r"version is 2\.0")
    refused(tmp_path, bytes(8192) + footer(8192)[:-2], "no VHD")
    refused(tmp_path, bytes(8192) + footer(8192) + b"more", "no VHD")


def test_fixed_shorter_than_it_says(tmp_path: Path) -> None:
    refused(tmp_path, bytes(8192) + footer(8704), "says 8704 bytes, but only 8192 stand before its footer")
    refused(tmp_path, bytes(8192) + footer(1024, creator=b"vpc ", chs=(2, 4, 17)), "says 69632 bytes")


def test_a_copy_at_the_start_that_says_fixed_does_not_stand_in(tmp_path: Path) -> None:
    refused(tmp_path, footer(8192) + bytes(8192), "nor a copy at its start")


def test_both_footers_damaged(tmp_path: Path) -> None:
    bad = footer(GOOD.size, 3, data_offset=512, error=1)
    refused(tmp_path, replace(GOOD, head=bad, tail=bad).build(), "its checksum does not fit")
    refused(tmp_path, replace(GOOD, head=bad).build()[:-512], "no footer at its end")


@pytest.mark.parametrize(
    "other",
    [
        footer(GOOD.size + 8192, 3, data_offset=512),
        footer(GOOD.size, 3, data_offset=1024),
        footer(GOOD.size, 3, data_offset=512, unique_id=b"y" * 16),
        footer(GOOD.size, 3, data_offset=512, creator=b"vpc "),
        footer(GOOD.size, 4, data_offset=512),
    ],
)
def test_footers_that_disagree(tmp_path: Path, other: bytes) -> None:
    refused(tmp_path, replace(GOOD, head=other).build(), "tell of different disks")


@pytest.mark.parametrize("kind", [0, 1, 5, 6, 0xFFFFFFFF])
def test_unknown_disk_types(tmp_path: Path, kind: int) -> None:
    refused(tmp_path, bytes(8192) + footer(8192, kind), f"its disk type is {kind}")


@pytest.mark.parametrize("size", [1, 513, (2040 << 30) + 512, 1 << 63, 2**64 - 512, 2**64 - 1])
def test_impossible_sizes(tmp_path: Path, size: int) -> None:
    refused(tmp_path, bytes(8192) + footer(size), f"its size is {size} bytes")
    end = footer(size, 3, data_offset=512)
    refused(tmp_path, replace(GOOD, head=end, tail=end).build(), f"its size is {size} bytes")


def test_an_empty_geometry(tmp_path: Path) -> None:
    refused(tmp_path, bytes(8192) + footer(8192, creator=b"vpc ", chs=(0, 4, 17)), "its geometry")


def test_the_dynamic_header(tmp_path: Path) -> None:
    refused(tmp_path, replace(GOOD, header_error=1).build(), "header at 512 cannot be used: its checksum")
    refused(tmp_path, replace(GOOD, header_cookie=b"cxsparsE").build(), "does not start with 'cxsparse'")
    refused(tmp_path, replace(GOOD, header_version=0x20000).build(), "cannot be used: its version")


@pytest.mark.parametrize("offset", [0, 511, 1 << 20, 1 << 62, 2**64 - 1])
def test_the_dynamic_header_elsewhere(tmp_path: Path, offset: int) -> None:
    refused(tmp_path, replace(GOOD, header_offset=offset).build(), "not inside the file, behind the footer's copy")


@pytest.mark.parametrize("size", [0, 1, 256, 511, 513, 3 << 20, 512 << 20, 1 << 31, 2**32 - 1])
def test_absurd_block_sizes(tmp_path: Path, size: int) -> None:
    refused(tmp_path, replace(GOOD, block_bytes=size, blocks={}).build(), f"its blocks have {size} bytes")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"entries": 9}, "its table has 9 entries, the size 81920 needs 10"),
        ({"entries": 0}, "its table has 0 entries"),
        ({"entries": 1 << 30}, "is not inside the file"),
        ({"entries": 2**32 - 1}, "is not inside the file"),
        ({"table_offset": 1 << 20}, "is not inside the file"),
        ({"table_offset": 2**64 - 1}, "is not inside the file"),
        ({"table_offset": 0}, "lies on the headers"),
        ({"table_offset": 512}, "lies on the headers"),
        ({"table_offset": 1535}, "lies on the headers"),
    ],
)
def test_the_table(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    refused(tmp_path, replace(GOOD, **changes).build(), match)


FIRST = 2048 // 512
"""The sector of the first block of GOOD; the second lies 17 sectors behind."""


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        (0, "lies on the headers or the table"),
        (1, "lies on the headers or the table"),
        (2, "lies on the headers or the table"),
        (3, "lies on the headers or the table"),
        (FIRST, "overlap"),
        (FIRST + 1, "overlap"),
        (FIRST + 17 + 16, "reaches beyond|overlap"),
        (FIRST + 34, "reaches beyond the end"),
        (FIRST + 33 + 17, "reaches beyond the end"),
        (1 << 31, "reaches beyond the end"),
        (0xFFFFFFFE, "reaches beyond the end"),
    ],
)
def test_table_entries(tmp_path: Path, entry: int, match: str) -> None:
    refused(tmp_path, replace(GOOD, table={7: entry}).build(), match)


def test_a_file_cut_in_a_block(tmp_path: Path) -> None:
    for cut in (513, 1000, 8192):
        refused(tmp_path, GOOD.build()[:-cut], "reaches beyond the end")


def test_every_cut_of_the_structures_is_refused_or_reads(tmp_path: Path) -> None:
    data = GOOD.build()
    for stop in (*range(0, 2100, 7), *range(2100, len(data) - 512, 997)):
        refused(tmp_path, data[:stop], "VHD")


def test_a_hostile_table_is_bounded_in_memory_and_time(tmp_path: Path) -> None:
    """A sparse file that claims the biggest table there may be, all of it allocated, and then one entry more."""
    block_bytes, count = 512, 1 << 22
    size, table_stop = count * block_bytes, 1536 + 4 * count
    vhd = Vhd(size, block_bytes, entries=count)
    path = tmp_path / "hostile.vhd"
    with path.open("wb") as file:
        file.write(vhd.footer() + vhd.header())
        first = -(-table_stop // 512)
        for part in range(0, count, 1 << 16):
            entries = range(first + 2 * part, first + 2 * (part + (1 << 16)), 2)
            file.write(struct.pack(f">{1 << 16}I", *entries))
        file.seek((first + 2 * count) * 512)
        file.write(vhd.footer())
    started = time.monotonic()
    tracemalloc.start()
    try:
        with VhdImage.open(FileSystem(), path) as image:
            assert image.size_bytes == size
            buffer = bytearray(b"\xa5" * (1 << 20))
            image.read_into(size - (1 << 20), buffer)
            assert buffer == bytes(1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()
    assert time.monotonic() - started < 60
    bigger = replace(vhd, size=size + 512, entries=count + 1)
    with path.open("r+b") as file:
        file.write(bigger.footer() + bigger.header())
        file.seek(-512, 2)
        file.write(bigger.footer())
    with pytest.raises(ImageError, match="more than 4194304 blocks"):
        VhdImage.open(FileSystem(), path)


def test_many_partial_bitmaps_stay_bounded(tmp_path: Path) -> None:
    """256 blocks with bitmaps of 64 KiB, all partial: 16 MiB of bitmaps, of which 8 are kept."""
    block_bytes, count = 256 << 20, 256
    vhd = Vhd(count * block_bytes, block_bytes)
    table = [4 + n * (128 + (block_bytes >> 9)) + 1 for n in range(count)]
    path = tmp_path / "hostile.vhd"
    with path.open("wb") as file:
        file.write((vhd.footer() + vhd.header() + struct.pack(f">{count}I", *table)).ljust(2560, b"\0"))
        for entry in table:
            file.seek(entry * 512)
            file.write(b"\x80" + bytes(65535) + b"first sector".ljust(512, b"."))
        file.seek((table[-1] + 128 + (block_bytes >> 9)) * 512)
        file.write(vhd.footer())
    with VhdImage.open(FileSystem(), path) as image:
        tracemalloc.start()
        try:
            for n in range(count):
                buffer = bytearray(b"\xa5" * 1024)
                image.read_into(n * block_bytes, buffer)
                assert buffer == b"first sector".ljust(512, b".") + bytes(512)
            assert tracemalloc.get_traced_memory()[0] < 10 << 20
        finally:
            tracemalloc.stop()
