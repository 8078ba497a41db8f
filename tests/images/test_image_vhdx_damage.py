"""What × where × how of a VHDX that cannot be believed: a clear ImageError, in bounded memory and time."""

import struct
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import vhdx_maker
from hypothesis import given, settings
from hypothesis import strategies as st
from test_image_vhdx import whole
from vhdx_interrupted import entry, with_log
from vhdx_maker import BAT, BAT_AT, BLOCKS_AT, LOG_AT, METADATA, METADATA_AT, MIB, Vhdx, header, linked, region_table

from replica.durable import FileSystem
from replica.errors import ImageError
from replica.images.vhdx import VhdxImage

GOOD = Vhdx(6 * MIB, blocks={1: b"a", 4: b"b"})


def refused(tmp_path: Path, data: bytes, match: str) -> None:
    path = tmp_path / "bad.vhdx"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=match) as caught:
        VhdxImage.open(FileSystem(), path)
    assert str(tmp_path) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("data", [b"", b"vhdxfile", b"vhdxfilE".ljust(5 * MIB), bytes(5 * MIB)])
def test_no_vhdx(tmp_path: Path, data: bytes) -> None:
    refused(tmp_path, data, 'is no VHDX: .*set format = "raw"')


@pytest.mark.parametrize(
    ("headers", "match"),
    [
        ((header(1, error=1), header(2, error=1)), "neither of its headers can be used: its checksum"),
        ((header(1, signature=b"HEAD"), bytes(4096)), "neither of its headers can be used: it does not start"),
        ((header(5), header(5, data_write=UUID(int=1))), "differ, and both have the sequence number 5"),
        ((header(5, version=2), header(4)), "format version is 2"),
        ((header(5, version=0), header(4)), "format version is 0"),
    ],
)
def test_headers(tmp_path: Path, headers: tuple[bytes, bytes], match: str) -> None:
    refused(tmp_path, replace(GOOD, headers=headers).build(), match)


META_ROW, BAT_ROW = (METADATA, METADATA_AT, MIB, 1), (BAT, BAT_AT, MIB, 1)


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([META_ROW], "name no block allocation table"),
        ([BAT_ROW], "name no metadata"),
        ([META_ROW, BAT_ROW, (UUID(int=9), BLOCKS_AT, MIB, 1)], "required region that is not known"),
        ([META_ROW, BAT_ROW, META_ROW], "has the region .* twice"),
        ([META_ROW, (BAT, BAT_AT, 4096, 1)], "not on whole MiB"),
        ([META_ROW, (BAT, BAT_AT + 4096, MIB, 1)], "not on whole MiB"),
        ([META_ROW, (BAT, 0, MIB, 1)], "lie on the headers"),
        ([META_ROW, (BAT, 9 * MIB, MIB, 1)], "are not inside the file"),
        ([META_ROW, (BAT, 2**64 - MIB, MIB, 1)], "are not inside the file"),
        ([META_ROW, (BAT, 2**63, MIB, 1)], "are not inside the file"),
        ([META_ROW, (BAT, BAT_AT, 0, 1)], "has 0 entries, its size needs 6"),
        ([(METADATA, METADATA_AT, 0, 1), BAT_ROW], "metadata region is empty"),
        ([META_ROW, (BAT, METADATA_AT, MIB, 1)], "overlap"),
        ([META_ROW, (BAT, LOG_AT, MIB, 1)], "overlap"),
        ([META_ROW, BAT_ROW, (UUID(int=9), BLOCKS_AT, MIB, 0)], "lie on what is at byte 4194304"),
    ],
)
def test_regions(tmp_path: Path, rows: list[tuple[UUID, int, int, int]], match: str) -> None:
    refused(tmp_path, replace(GOOD, regions=tuple(rows)).build(), match)


@pytest.mark.parametrize(
    ("tables", "match"),
    [
        ((region_table(GOOD.regions, error=1), bytes(65536)), "neither of its region tables can be used"),
        ((region_table(GOOD.regions, count=2048),) * 2, "has 2048 entries, more than 2047"),
        ((region_table(GOOD.regions), region_table([META_ROW, (BAT, BLOCKS_AT, MIB, 1)])), "name different places"),
    ],
)
def test_region_tables(tmp_path: Path, tables: tuple[bytes, bytes], match: str) -> None:
    refused(tmp_path, replace(GOOD, tables=tables).build(), match)


def item(name: UUID, pattern: str, *values: int) -> dict[str, Any]:
    return {"items": {name: struct.pack(pattern, *values)}}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (item(vhdx_maker.PARAMETERS, "<II", 0, 0), "its blocks have 0 bytes"),
        (item(vhdx_maker.PARAMETERS, "<II", 3 * MIB, 0), "which is not a power of two"),
        (item(vhdx_maker.PARAMETERS, "<II", MIB // 2, 0), "which is not a power of two from 1048576"),
        (item(vhdx_maker.PARAMETERS, "<II", 512 * MIB, 0), "to 268435456"),
        (item(vhdx_maker.PARAMETERS, "<II", 2**31, 0), "its blocks have 2147483648 bytes"),
        (item(vhdx_maker.PARAMETERS, "<I", MIB), "no file parameters of 8 bytes"),
        (item(vhdx_maker.PARAMETERS, "<II", MIB, 2), "nothing in its metadata says which"),
        (item(vhdx_maker.SIZE, "<Q", 2**63), "its size is 9223372036854775808 bytes"),
        (item(vhdx_maker.SIZE, "<Q", 2**64 - 512), "its size is 18446744073709551104 bytes"),
        (item(vhdx_maker.SIZE, "<Q", (64 << 40) + 512), "or more than 70368744177664"),
        (item(vhdx_maker.SIZE, "<Q", 1000), "not whole sectors of 512"),
        (item(vhdx_maker.SIZE, "<Q", 64 << 40), "its table has 131072 entries, its size needs 67125247"),
        (item(vhdx_maker.LOGICAL, "<I", 1024), "logical sectors have 1024 bytes"),
        (item(vhdx_maker.LOGICAL, "<I", 0), "logical sectors have 0 bytes"),
        ({"items": {vhdx_maker.DISK: b""}}, "no virtual disk id of 16 bytes"),
        ({"items": {vhdx_maker.PHYSICAL: b"x"}}, "no physical sector size of 4 bytes"),
        ({"items": {UUID(int=7): b"what"}}, "a required item that is not known"),
        ({"metadata_signature": b"METADATA"}, "does not start with 'metadata'"),
        ({"rows": ((vhdx_maker.SIZE, 65536, 8, 4),) * 2}, "has the item .* twice"),
        ({"rows": ((vhdx_maker.SIZE, 65535, 8, 4),)}, "is not inside its region"),
        ({"rows": ((vhdx_maker.SIZE, MIB - 7, 8, 4),)}, "is not inside its region"),
        ({"rows": ((vhdx_maker.SIZE, 2**32 - 4, 8, 4),)}, "is not inside its region"),
        ({"rows": ((vhdx_maker.SIZE, 65536, 2**32 - 1, 4),)}, "is not inside its region"),
        ({"rows": ((vhdx_maker.SIZE, 65536, 8, 4), (vhdx_maker.DISK, 65540, 16, 4))}, "items overlap"),
        ({"rows": ((vhdx_maker.SIZE, 65536, 8, 5),)}, "a required item that is not known"),
        ({"rows": tuple((UUID(int=n), 0, 0, 0) for n in range(2047))}, "no file parameters"),
    ],
)
def test_metadata(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    refused(tmp_path, replace(GOOD, **change).build(), match)


def test_more_metadata_than_a_table_has_room_for(tmp_path: Path) -> None:
    file = bytearray(GOOD.build())
    struct.pack_into("<H", file, METADATA_AT + 10, 2048)
    refused(tmp_path, bytes(file), "has 2048 entries")


LOCATOR = vhdx_maker.locator({"parent_linkage": "x", "relative_path": "y"})


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (LOCATOR[:19], "cut short"),
        (LOCATOR[:30], "cut short"),
        (LOCATOR[:-1], "points beyond its own end"),
        (LOCATOR[:18] + b"\xff\xff" + LOCATOR[20:], "cut short"),
        (LOCATOR[:28] + b"\xff\xff" + LOCATOR[30:], "points beyond its own end"),
        (vhdx_maker.locator({}, UUID(int=4)), "of a type that is not known"),
        (LOCATOR[:-2] + b"\x00\xd8", "not in UTF-16"),
        (LOCATOR[:18] + b"\x02\x00" + LOCATOR[20:32] * 2 + LOCATOR[44:], "twice|more text"),
        (LOCATOR[:18] + b"\x14\x00" + b"".join([LOCATOR[20:32]] * 20), "twice|more text|beyond"),
    ],
)
def test_parent_locators(tmp_path: Path, data: bytes, match: str) -> None:
    refused(tmp_path, replace(GOOD, parent={}, items={vhdx_maker.LOCATOR: data}).build(), match)


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({0: 6}, "block 0 at MiB 0 is not inside the file"),
        ({0: 6 | 99 << 20}, "block 0 at MiB 99 is not inside the file"),
        ({0: 0xFFFF_FFFF_FFF0_0006}, "block 0 at MiB 17592186044415 is not inside the file"),
        ({0: 6 | BLOCKS_AT}, "the blocks at bytes 4194304 and 4194304 overlap"),
        ({3: 6 | LOG_AT}, "lie on what is at byte 1048576"),
        ({3: 6 | METADATA_AT}, "lie on what is at byte 2097152"),
        ({3: 6 | BAT_AT}, "lie on what is at byte 3145728"),
        ({2: 4}, "block 2 is in state 4"),
        ({2: 5}, "block 2 is in state 5"),
        ({2: 7 | BLOCKS_AT}, "block 2 is in state 7"),
    ],
)
def test_the_table(tmp_path: Path, entries: dict[int, int], match: str) -> None:
    refused(tmp_path, replace(GOOD, entries=entries).build(), match)


def test_blocks_of_several_mib(tmp_path: Path) -> None:
    """They may lie on any MiB, but not into each other, the structures, or beyond the end."""
    wide = Vhdx(8 * MIB, 2 * MIB, blocks={0: b"a", 1: b"b"})
    refused(tmp_path, replace(wide, entries={3: 6 | 5 * MIB}).build(), "overlap")
    refused(tmp_path, replace(wide, entries={3: 6 | 3 * MIB}).build(), "overlap|lie on")
    refused(tmp_path, replace(wide, entries={2: 6 | 7 * MIB, 1: 0}).build(), "beyond the file's end")
    apart = replace(wide, entries={1: 6 | 7 * MIB, 0: 6 | 5 * MIB})
    (tmp_path / "a.vhdx").write_bytes(apart.build() + bytes(MIB))
    VhdxImage.open(FileSystem(), tmp_path / "a.vhdx").close()


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({4096: 0}, "blocks of chunk 0 are partially present, but it has no sector bitmap"),
        ({4096: 3 | 5 * MIB}, "the sector bitmap of chunk 0 is in state 3"),
        ({4096: 6}, "the sector bitmap of chunk 0 at MiB 0 is not inside the file"),
        ({4096: 6 | 99 << 20}, "the sector bitmap of chunk 0 at MiB 99 is not inside the file"),
        ({4096: 6 | BLOCKS_AT}, "lie on what is at byte 4194304"),
        ({4096: 6 | METADATA_AT}, "the structures at bytes 2097152 and 2097152 overlap"),
        ({2: 4}, "block 2 is in state 4"),
    ],
)
def test_sector_bitmaps(tmp_path: Path, entries: dict[int, int], match: str) -> None:
    (tmp_path / "base.vhdx").write_bytes(Vhdx(6 * MIB).build())
    child = replace(GOOD, parent=linked("base.vhdx"), present={1: {0}}, entries=entries)
    refused(tmp_path, child.build(), match)


def test_cut_short(tmp_path: Path) -> None:
    """At any length: an error when it is opened, never one while it is read."""
    whole_file = GOOD.build()
    for length in (*range(0, len(whole_file), MIB // 2), len(whole_file) - 1):
        refused(tmp_path, whole_file[:length], "bad.vhdx")


def sparse(path: Path, data: bytes, size: int) -> VhdxImage:
    with path.open("wb") as file:
        file.write(data)
        file.truncate(size)
    return VhdxImage.open(FileSystem(), path)


def test_the_largest_disk_costs_little(tmp_path: Path) -> None:
    """64 TiB in blocks of 1 MiB: a table of 513 MiB, most of it a hole, and one of fixed blocks in a row."""
    disk = Vhdx(64 << 40, regions=((METADATA, METADATA_AT, MIB, 1), (BAT, BLOCKS_AT, 513 * MIB, 1)))
    tracemalloc.start()
    started = time.monotonic()
    with sparse(tmp_path / "a.vhdx", disk.build(), 600 * MIB) as image:
        assert list(image.allocated(0, 64 << 40)) == []
        buffer = bytearray(MIB)
        image.read_into((64 << 40) - MIB, buffer)
    assert tracemalloc.get_traced_memory()[1] < 40 * MIB
    tracemalloc.stop()
    assert time.monotonic() - started < 20


def test_a_table_in_pieces_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second block: as many extents as blocks. The chain shares one limit."""
    monkeypatch.setattr("replica.images.vhd_blocks.MAX_CHAIN_BLOCKS", 100)
    base = Vhdx(120 * MIB, states=dict.fromkeys(range(0, 120, 2), 2))
    (tmp_path / "base.vhdx").write_bytes(base.build())
    VhdxImage.open(FileSystem(), tmp_path / "base.vhdx").close()
    refused(tmp_path, replace(base, parent=linked("base.vhdx")).build(), "lie in too many pieces")


def test_logs_of_a_chain_share_one_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replica.images.vhd_blocks.MAX_CHAIN_BLOCKS", 9)
    updates = [(4 * MIB + n * 8192, 4096) for n in range(10)]
    refused(tmp_path, with_log(Vhdx(MIB), {0: entry(1, 0, updates)}), "too many updates")


@settings(max_examples=150)
@given(data=st.data())
def test_any_flipped_byte_of_the_structures(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """An ImageError, or an image that can be read through; never another error, never a crash."""
    folder = tmp_path_factory.mktemp("flip")
    (folder / "base.vhdx").write_bytes(Vhdx(3 * MIB, blocks={0: b"z"}).build())
    child = Vhdx(3 * MIB, blocks={1: b"a", 2: b"b"}, parent=linked("base.vhdx"), present={2: {1, 2}})
    file = bytearray(
        with_log(child, {0: entry(1, 0, [(BAT_AT, 4096), (BAT_AT, child.build()[BAT_AT : BAT_AT + 4096])])})
    )
    spots = st.one_of(
        st.sampled_from([(1 << 16) + n for n in range(80)] + [(2 << 16) + n for n in range(80)]),
        st.integers(LOG_AT, LOG_AT + 3 * 4096),
        st.integers(METADATA_AT, METADATA_AT + 300),
        st.integers(METADATA_AT + 65536, METADATA_AT + 65536 + 300),
        st.integers(BAT_AT, BAT_AT + 32),
        st.integers(BAT_AT + 32768, BAT_AT + 32776),
    )
    for spot in data.draw(st.lists(spots, min_size=1, max_size=3)):
        file[spot] ^= data.draw(st.integers(1, 255))
    if data.draw(st.booleans()):
        for at, length in ((1 << 16, 4096), (2 << 16, 4096), (3 << 16, 65536), (4 << 16, 65536)):
            file[at : at + length] = vhdx_maker.checksummed(bytes(file[at : at + length]))
    (folder / "a.vhdx").write_bytes(file)
    try:
        with VhdxImage.open(FileSystem(), folder / "a.vhdx") as image:
            if image.size_bytes < 64 * MIB:
                whole(image)
    except ImageError:
        pass
