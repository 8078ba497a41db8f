"""VHDX against files made byte by byte from the specification: blocks, sectors, chains, what is allocated."""

import os
from dataclasses import replace
from pathlib import Path
from typing import ClassVar
from uuid import UUID

import pytest
import vhdx_maker
from hypothesis import given, settings
from hypothesis import strategies as st
from vhdx_maker import MIB, Vhdx, header, linked, region_table

from replica.durable import File, FileSystem
from replica.errors import ImageError
from replica.images.image import Image
from replica.images.vhdx import VhdxImage

RANDOM = os.urandom(MIB)


def whole(image: Image) -> bytes:
    buffer = bytearray(b"\xa5" * image.size_bytes)
    image.read_into(0, buffer)
    return bytes(buffer)


def covered(image: Image, expected: bytes) -> bool:
    """Whether `allocated` is in order and leaves out nothing but zeros."""
    seen, end = bytearray(len(expected)), -1
    for start, stop in image.allocated(0, 1 << 62):
        assert end < start < stop <= len(expected)
        seen[start:stop] = expected[start:stop]
        end = stop
    return bytes(seen) == expected


def open_bytes(path: Path, data: bytes) -> VhdxImage:
    path.write_bytes(data)
    return VhdxImage.open(FileSystem(), path)


@pytest.mark.parametrize("sector", [512, 4096])
@pytest.mark.parametrize("block_mib", [1, 2])
def test_every_state_without_a_parent(tmp_path: Path, sector: int, block_mib: int) -> None:
    size = 9 * block_mib * MIB - 8192
    vhdx = Vhdx(size, block_mib * MIB, sector, blocks={8: RANDOM, 2: b"b", 0: b"c", 3: b"d"})
    vhdx.states = {1: 0, 4: 1, 5: 2, 6: 3}
    vhdx.entries = {4: 1 | vhdx_maker.BLOCKS_AT, 7: 99 << 20}
    with open_bytes(tmp_path / "a.vhdx", vhdx.build()) as image:
        assert (image.format, image.subformat, image.sector_bytes) == ("vhdx", "dynamic", sector)
        assert whole(image) == vhdx.content()
        assert covered(image, vhdx.content())


def test_bitmap_entries_mean_nothing_without_a_parent(tmp_path: Path) -> None:
    """Some versions of qemu left anything in them."""
    vhdx = Vhdx(3 * 256 * MIB * 16, 256 * MIB, entries={16: 0xFFFF_FFFF_FFFF_FFFD, 33: 5})
    with open_bytes(tmp_path / "a.vhdx", vhdx.build()) as image:
        assert list(image.allocated(0, image.size_bytes)) == []


def test_blocks_behind_the_first_chunk(tmp_path: Path) -> None:
    """A bitmap's entry stands between the chunks: block 4096 of 1 MiB is entry 4097."""
    for sector, block, entry in ((512, 4096, 4097), (4096, 32768, 32769), (512, 8192, 8194)):
        vhdx = Vhdx((block + 1) * MIB, sector=sector, entries={entry: vhdx_maker.BLOCKS_AT | 6})
        with open_bytes(tmp_path / "a.vhdx", vhdx.build() + RANDOM) as image:
            assert list(image.allocated(0, 1 << 60)) == [(block * MIB, (block + 1) * MIB)]
            buffer = bytearray(1000)
            image.read_into(block * MIB + 77, buffer)
            assert buffer == RANDOM[77:1077]


def test_the_last_block_may_end_with_the_disk(tmp_path: Path) -> None:
    """As qemu writes fixed images: the file ends where the disk does."""
    vhdx = Vhdx(MIB + 512, flags=1, blocks={0: b"a", 1: RANDOM})
    for data in (vhdx.build(), vhdx.build()[: -MIB + 512]):
        with open_bytes(tmp_path / "a.vhdx", data) as image:
            assert image.subformat == "fixed"
            assert whole(image) == vhdx.content()
    (tmp_path / "short.vhdx").write_bytes(vhdx.build()[: -MIB + 511])
    with pytest.raises(ImageError, match="beyond the file's end"):
        VhdxImage.open(FileSystem(), tmp_path / "short.vhdx")


@pytest.mark.parametrize("size", [0, 512, MIB - 512, 64 << 40])
def test_sizes(tmp_path: Path, size: int) -> None:
    vhdx = Vhdx(size, 256 * MIB if size > MIB else MIB)
    vhdx.regions = ((vhdx_maker.BAT, 3 * MIB, 3 * MIB, 1), (vhdx_maker.METADATA, 2 * MIB, MIB, 1))
    with open_bytes(tmp_path / "a.vhdx", vhdx.build() + bytes(2 * MIB)) as image:
        assert image.size_bytes == size
        assert list(image.allocated(0, size)) == []
        with pytest.raises(ImageError, match=f"has {size} bytes"):
            image.read_into(size, bytearray(1))


@pytest.mark.parametrize(
    ("headers", "data_write"),
    [
        ((header(0, data_write=UUID(int=1)), header(1, data_write=UUID(int=2))), 2),
        ((header(1, data_write=UUID(int=1)), header(0, data_write=UUID(int=2))), 1),
        ((header(2**64 - 1, data_write=UUID(int=1)), header(7, data_write=UUID(int=2))), 1),
        ((header(9, data_write=UUID(int=1), error=1), header(0, data_write=UUID(int=2))), 2),
        ((header(1, data_write=UUID(int=1)), header(9, signature=b"hEad")), 1),
        ((header(0, data_write=UUID(int=0)), header(0, data_write=UUID(int=0))), 0),
        ((header(log_bytes=0, log_at=0), header(log_bytes=0, log_at=0)), vhdx_maker.DATA_WRITE.int),
    ],
)
def test_the_current_header(tmp_path: Path, headers: tuple[bytes, bytes], data_write: int) -> None:
    """The higher sequence number counts; two of the same are fine if they are the same (Disk2vhd)."""
    with open_bytes(tmp_path / "a.vhdx", Vhdx(MIB, headers=headers).build()) as image:
        assert image.layers[0].header.data_write_id.int == data_write


def test_a_log_of_another_version_is_no_matter_while_there_is_none(tmp_path: Path) -> None:
    headers = (header(6), header(7, log_version=9))
    open_bytes(tmp_path / "a.vhdx", Vhdx(MIB, headers=headers).build()).close()


def test_region_tables_stand_in_for_each_other(tmp_path: Path) -> None:
    vhdx = Vhdx(3 * MIB, blocks={1: RANDOM})
    good, other = region_table(vhdx.regions), region_table(tuple(reversed(vhdx.regions)))
    optional = region_table([(*row[:3], 0) for row in vhdx.regions])
    unknown = region_table([*vhdx.regions, (UUID(int=77), BLOCKS_END, MIB, 0)])
    for tables in ((good, b""), (b"", good), (good, other), (other, optional), (unknown, unknown)):
        vhdx.tables = tables
        with open_bytes(tmp_path / "a.vhdx", vhdx.build() + bytes(MIB)) as image:
            assert whole(image) == vhdx.content()
            assert image.layers[0].damaged_tables == tables.count(b"")


BLOCKS_END = vhdx_maker.BLOCKS_AT + MIB


def test_metadata_beside_what_is_known(tmp_path: Path) -> None:
    """Items of users, and items that are not required, are passed over; a known GUID of a user is not the item."""
    vhdx = Vhdx(2 * MIB)
    at = 65536
    rows = [
        (vhdx_maker.SIZE, 0, 0, 1),
        (vhdx_maker.LOGICAL, at + 32, 4, 6),
        (UUID(int=9), at + 40, 100, 0),
        (vhdx_maker.PARAMETERS, at, 8, 0),
        (vhdx_maker.SIZE, at + 8, 8, 6),
        (vhdx_maker.DISK, at + 16, 16, 2),
        (vhdx_maker.PHYSICAL, at + 36, 4, 6),
    ]
    with open_bytes(tmp_path / "a.vhdx", replace(vhdx, rows=tuple(rows)).build()) as image:
        assert image.size_bytes == 2 * MIB


def chain(folder: Path, *, sector: int = 512, depth: int = 5, seed: st.DataObject | None = None) -> tuple[Path, bytes]:
    """Images on top of each other, and what the topmost reads as."""
    path, content = folder / "0.vhdx", b""
    for level in range(depth):
        blocks, present, states = {}, {}, {}
        size = 5 * MIB - 3 * 4096 * (level % 2)
        for block in range(5):
            state = seed.draw(st.integers(0, 7)) if seed else (block + level * 3) % 8
            if state in (6, 7) or (state in (4, 5) and level == 0):
                blocks[block] = bytes([level * 16 + block + 1]) * MIB
            if state == 7 and level:
                edge = seed.draw(st.integers(0, MIB // sector)) if seed else 100 + level
                present[block] = set(range(edge, MIB // sector, 1 if edge % 2 else 3)) | {0}
            if state in (1, 2, 3):
                states[block] = state
        vhdx = Vhdx(size, MIB, sector, blocks, states, present)
        vhdx.headers = (header(1, data_write=UUID(int=level + 50)),) * 2
        if level:
            vhdx.parent = linked(f"{level - 1}.vhdx", UUID(int=level + 49))
        path = folder / f"{level}.vhdx"
        path.write_bytes(vhdx.build())
        content = vhdx.content(content)
    return path, content


@pytest.mark.parametrize("sector", [512, 4096])
def test_a_chain_of_five(tmp_path: Path, sector: int) -> None:
    path, content = chain(tmp_path, sector=sector)
    with VhdxImage.open(FileSystem(), path) as image:
        assert image.subformat == "differencing"
        assert [file.path.name for file in image.files] == [f"{n}.vhdx" for n in (4, 3, 2, 1, 0)]
        assert whole(image) == content
        assert covered(image, content)


@settings(max_examples=25)
@given(seed=st.data())
def test_any_chain_reads_as_the_specification_says(
    tmp_path_factory: pytest.TempPathFactory, seed: st.DataObject
) -> None:
    path, content = chain(tmp_path_factory.mktemp("chain"), seed=seed, depth=3)
    with VhdxImage.open(FileSystem(), path) as image:
        assert covered(image, content)
        assert whole(image) == content
        for _ in range(4):
            start = seed.draw(st.integers(0, len(content) - 1))
            stop = seed.draw(st.integers(start, min(len(content), start + 2 * MIB)))
            buffer = bytearray(b"\xa5" * (stop - start))
            image.read_into(start, buffer)
            assert buffer == content[start:stop]


def test_bitmaps_of_later_chunks(tmp_path: Path) -> None:
    """Sector bitmaps count from the least significant bit, and go on block by block within their chunk."""
    (tmp_path / "base.vhdx").write_bytes(Vhdx(64 << 30).build())
    child = Vhdx(5000 * MIB, blocks={4097: RANDOM, 4098: b"x", 3: b"y"}, parent=linked("base.vhdx"))
    child.present = {4097: {0, 3, 9}, 4098: {2047}, 3: {5}}
    with open_bytes(tmp_path / "a.vhdx", child.build()) as image:
        buffer = bytearray(2 * MIB)
        image.read_into(4097 * MIB, buffer)
        expected = bytearray(2 * MIB)
        for sector in (0, 3, 9):
            expected[sector * 512 : sector * 512 + 512] = RANDOM[sector * 512 : sector * 512 + 512]
        expected[-512:] = b"\xee" * 512
        assert buffer == expected


@pytest.mark.parametrize("keys", [("parent_linkage", "parent_linkage2"), ("parent_linkage2", "parent_linkage")])
def test_either_linkage_names_the_parent(tmp_path: Path, keys: tuple[str, str]) -> None:
    (tmp_path / "base.vhdx").write_bytes(Vhdx(MIB, blocks={0: RANDOM}).build())
    pairs = {keys[0]: f"{{{vhdx_maker.DATA_WRITE}}}".upper(), keys[1]: f"{{{UUID(int=3)}}}"}
    pairs["absolute_win32_path"] = "\\\\?\\c:\\machines\\base.vhdx"
    with open_bytes(tmp_path / "a.vhdx", Vhdx(MIB, parent=pairs).build()) as image:
        assert whole(image) == RANDOM


@pytest.mark.parametrize(
    ("pairs", "match"),
    [
        (linked("base.vhdx", UUID(int=4)), "was changed, or is another image"),
        (linked("gone.vhdx"), "is not in"),
        (linked("..\\..\\etc\\passwd"), "is not in"),
        ({"relative_path": "base.vhdx"}, "does not say which one its parent is"),
        ({"parent_linkage": "{base}"}, "is no GUID"),
        ({"parent_linkage": str(vhdx_maker.DATA_WRITE)}, "without a name"),
        (linked("a.vhdx"), "is part of the chain already"),
    ],
)
def test_parents_that_are_none(tmp_path: Path, pairs: dict[str, str], match: str) -> None:
    (tmp_path / "base.vhdx").write_bytes(Vhdx(MIB).build())
    with pytest.raises(ImageError, match=match):
        open_bytes(tmp_path / "a.vhdx", Vhdx(MIB, parent=pairs).build())


def test_a_parent_of_other_sectors(tmp_path: Path) -> None:
    (tmp_path / "base.vhdx").write_bytes(Vhdx(MIB, sector=4096).build())
    with pytest.raises(ImageError, match="has sectors of 4096 bytes and not 512"):
        open_bytes(tmp_path / "a.vhdx", Vhdx(MIB, parent=linked("base.vhdx")).build())


def test_holes_inside_blocks_are_not_allocated(tmp_path: Path) -> None:
    path = tmp_path / "a.vhdx"
    data = Vhdx(3 * MIB, blocks={2: b"", 0: b""}).build()
    with path.open("wb") as file:
        file.write(data[: vhdx_maker.BLOCKS_AT])
        file.truncate(len(data))
        file.seek(vhdx_maker.BLOCKS_AT + (1 << 19))
        file.write(b"k" * 4096)
    with VhdxImage.open(FileSystem(), path) as image:
        assert list(image.allocated(0, 3 * MIB)) == [(2 * MIB + (1 << 19), 2 * MIB + (1 << 19) + 4096)]


class CountingFile(File):
    reads: ClassVar[list[int]] = []

    def read_into(self, offset: int, buffer: object) -> int:
        CountingFile.reads.append(memoryview(buffer).nbytes)  # type: ignore[arg-type]
        return super().read_into(offset, buffer)  # type: ignore[arg-type]


class CountingFileSystem(FileSystem):
    def open(self, path: Path, *, write: bool = False) -> File:
        return CountingFile(os.open(path, os.O_RDONLY), path)


def test_blocks_in_a_row_are_one_read(tmp_path: Path) -> None:
    (tmp_path / "a.vhdx").write_bytes(Vhdx(8 * MIB, blocks=dict.fromkeys((1, 2, 3, 0, 4, 7), RANDOM)).build())
    with VhdxImage.open(CountingFileSystem(), tmp_path / "a.vhdx") as image:
        CountingFile.reads.clear()
        whole(image)
        assert CountingFile.reads == [MIB, 3 * MIB, MIB, MIB]
