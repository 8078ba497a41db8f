"""Dynamic and differencing VHDs as they are written, read back by a naive reader and by our own."""

from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vhd_maker import checksummed, naive_read

from replica import images
from replica.durable import FileSystem
from replica.errors import ImageError
from replica.images import ParentLink
from replica.images.vhd import VhdImage
from replica.images.vhd_format import DynamicHeader, Footer
from replica.images.vhd_write import VhdWriter

FS = FileSystem()
ID, PARENT_ID = UUID(int=0x1234), UUID(int=0x5678)
KiB, MiB = 1 << 10, 1 << 20


def whole(path: Path) -> bytes:
    with images.open(path) as image:
        buffer = bytearray(b"\xa5" * image.size_bytes)
        image.read_into(0, buffer)
        return bytes(buffer)


def padded(data: bytes) -> bytes:
    return data.ljust(-(-len(data) // 512) * 512, b"\0")


@st.composite
def changes(draw: st.DrawFn, unit: int, size: int) -> list[tuple[int, int, int | None]]:
    """(offset, length, byte or None for zeros) at multiples of `unit`, the last ones up to the disk's end."""
    found = []
    for _ in range(draw(st.integers(0, 8))):
        start = draw(st.integers(0, (size - 1) // unit)) * unit
        stop = min(start + draw(st.integers(1, 60)) * unit, size)
        found.append((start, stop - start, draw(st.one_of(st.none(), st.integers(1, 255)))))
    return found


def play(writer: VhdWriter, model: bytearray, steps: list[tuple[int, int, int | None]]) -> None:
    for offset, length, byte in steps:
        if byte is None:
            writer.zero(offset, length)
        else:
            writer.write(offset, bytes([byte]) * length)
        model[offset : offset + length] = bytes([byte or 0]) * length


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), block_bytes=st.sampled_from([512, 4096, 64 * KiB, 2 * MiB]), size=st.integers(1, 300_000))
def test_any_writes_to_a_dynamic_disk(tmp_path: Path, data: st.DataObject, block_bytes: int, size: int) -> None:
    path = tmp_path / "a.vhd"
    path.unlink(missing_ok=True)
    model = bytearray(size)
    with VhdWriter.create(FS, path, size, ID, block_bytes=block_bytes) as writer:
        for _ in range(2):  # a synced image may be written on
            play(writer, model, data.draw(changes(unit=data.draw(st.sampled_from([1, 512, 5000])), size=size)))
            writer.sync()
            assert naive_read(path.read_bytes()) == whole(path) == padded(model)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), size=st.integers(1, 200_000))
def test_any_chain_of_depth_five(tmp_path: Path, data: st.DataObject, size: int) -> None:
    model, parent, seen = bytearray(size), None, b""
    for depth in range(6):
        path = tmp_path / f"{depth}.vhd"
        path.unlink(missing_ok=True)
        block_bytes = data.draw(st.sampled_from([4096, 64 * KiB, 2 * MiB]))
        with VhdWriter.create(FS, path, size, UUID(int=depth), block_bytes=block_bytes, parent=parent) as writer:
            for _ in range(data.draw(st.integers(1, 2))):  # a synced image may be written on
                play(writer, model, data.draw(changes(unit=512, size=size)))
                writer.sync()
        seen = naive_read(path.read_bytes(), seen)
        assert seen == whole(path) == padded(model)
        with images.open(path) as image:  # files have holes, in blocks that are there
            covered = bytearray(len(seen))
            for start, stop in image.allocated(0, len(seen)):
                covered[start:stop] = seen[start:stop]
            assert covered == seen
        parent = ParentLink(path, UUID(int=depth))
    with VhdImage.open(FS, path) as image:
        assert [layer.subformat for layer in image.facts()] == ["differencing"] * 5 + ["dynamic"]


def test_every_structure_is_in_its_place(tmp_path: Path) -> None:
    parent = ParentLink(tmp_path / "bases" / "base disk.vhd", PARENT_ID, 946684800 + 77)
    path = tmp_path / "vm" / "child.vhd"
    path.parent.mkdir()
    with VhdWriter.create(FS, path, 5 * MiB, ID, parent=parent) as writer:
        writer.write(4 * MiB, b"x" * 512)
        writer.sync()
    data = path.read_bytes()
    assert len(data) % 512 == 0 and data[:512] == data[-512:]
    footer = Footer.decode(data[:512])
    assert (footer.disk_type, footer.current_size_bytes, footer.unique_id, footer.data_offset) == (4, 5 * MiB, ID, 512)
    header = data[512:1536]
    assert header == checksummed(header, 36)
    decoded = DynamicHeader.decode(header)
    assert (decoded.parent_id, decoded.parent_stamp, decoded.parent_name) == (PARENT_ID, 77, "base disk.vhd")
    names = {entry.code: entry.decode(data[entry.offset : entry.offset + entry.length]) for entry in decoded.locators}
    assert names == {
        b"MacX": "../bases/base disk.vhd",
        b"W2ku": str(parent.path).replace("/", "\\"),
        b"W2ru": "..\\bases\\base disk.vhd",
    }
    table = [int.from_bytes(data[1536 + 4 * n : 1540 + 4 * n], "big") for n in range(3)]
    assert table[:2] == [0xFFFFFFFF] * 2
    place = table[2] * 512
    assert (place + 512) % 4096 == 0
    assert data[place : place + 512] == b"\x80" + bytes(511)
    assert data[place + 512 : place + 1024] == b"x" * 512


def test_a_file_of_holes(tmp_path: Path) -> None:
    """What was not written takes no space, in a block that is there, too."""
    path = tmp_path / "a.vhd"
    with VhdWriter.create(FS, path, 64 * MiB, ID) as writer:
        for block in range(0, 32, 2):
            writer.write(block * 2 * MiB + 512 * KiB, b"y" * 4096)
        writer.sync()
    assert path.stat().st_size > 32 * MiB
    assert path.stat().st_blocks * 512 < 300 * KiB
    with images.open(path) as image:
        assert sum(stop - start for start, stop in image.allocated(0, image.size_bytes)) == 16 * 4096


def test_zeros_over_a_parent_are_holes(tmp_path: Path) -> None:
    with VhdWriter.create(FS, tmp_path / "base.vhd", 8 * MiB, PARENT_ID) as writer:
        writer.write(0, b"z" * 8 * MiB)
        writer.sync()
    parent = ParentLink(tmp_path / "base.vhd", PARENT_ID)
    with VhdWriter.create(FS, tmp_path / "child.vhd", 8 * MiB, ID, parent=parent) as writer:
        writer.zero(MiB, 6 * MiB)
        writer.sync()
    assert (tmp_path / "child.vhd").stat().st_blocks * 512 < 100 * KiB
    assert whole(tmp_path / "child.vhd") == b"z" * MiB + bytes(6 * MiB) + b"z" * MiB


@pytest.mark.parametrize("size", [-1, (2040 << 30) + 1, 1 << 63])
def test_sizes_that_no_vhd_has(tmp_path: Path, size: int) -> None:
    with pytest.raises(ImageError, match="do not fit a VHD"):
        VhdWriter.create(FS, tmp_path / "a.vhd", size, ID)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("block_bytes", [0, 256, 3 * MiB, 512 * MiB])
def test_block_sizes_that_no_vhd_has(tmp_path: Path, block_bytes: int) -> None:
    with pytest.raises(ImageError, match="a power of two from 512"):
        VhdWriter.create(FS, tmp_path / "a.vhd", MiB, ID, block_bytes=block_bytes)
    with pytest.raises(ImageError, match="are too many; larger blocks"):
        VhdWriter.create(FS, tmp_path / "a.vhd", 2040 << 30, ID, block_bytes=4096)


def test_writes_past_the_end_and_across_sectors(tmp_path: Path) -> None:
    parent = ParentLink(tmp_path / "base.vhd", PARENT_ID)
    with VhdWriter.create(FS, tmp_path / "a.vhd", 10_000, ID, parent=parent) as writer:
        with pytest.raises(ImageError, match="has 10000 bytes"):
            writer.write(9_728, bytes(512))
        for offset, length in [(1, 511), (512, 100), (100, 9_900)]:
            with pytest.raises(ValueError, match="no whole sectors"):
                writer.write(offset, bytes(length))
        writer.write(9_728, bytes(272))
