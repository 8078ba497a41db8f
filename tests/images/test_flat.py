"""The flat image against a plain bytearray: any sequence of operations, and what a crash may leave."""

import os
from pathlib import Path
from uuid import UUID

import pytest
import vhd_maker
from hypothesis import given, settings
from hypothesis import strategies as st

from replica import images
from replica.durable import FileSystem
from replica.errors import ImageError, StorageError
from replica.images.flat import EXTENSIONS, FlatFormat, FlatImage
from replica.images.vhd_format import DiskType, Footer

FS = FileSystem()
ID = UUID(int=0xABCDEF)
FORMATS: list[FlatFormat] = ["raw", "vhd"]


def whole(image: FlatImage) -> bytes:
    buffer = bytearray(b"\xa5" * image.size_bytes)
    image.read_into(0, buffer)
    return bytes(buffer)


def expected_file(content: bytes, format: FlatFormat) -> bytes:
    if format == "raw":
        return content
    padded = content.ljust(-(-len(content) // 512) * 512, b"\0")
    return padded + Footer.new(DiskType.FIXED, len(padded), ID).encode()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 12345, 1_000_003])
def test_create_write_open(tmp_path: Path, format: FlatFormat, size: int) -> None:
    path = tmp_path / f"disk{EXTENSIONS[format]}"
    content = os.urandom(size)
    with FlatImage.create(FS, path, format, size, ID) as image:
        assert (image.size_bytes, image.format, image.path) == (size, format, path)
        assert whole(image) == bytes(size)
        assert path.read_bytes() == expected_file(bytes(size), format)
        image.write(0, content)
        image.sync()
    assert path.read_bytes() == expected_file(content, format)
    with FlatImage.open(FS, path, format, size_bytes=size, unique_id=ID) as image:
        assert whole(image) == content
        assert image.layout_problem() is None
    with FlatImage.open(FS, path, format) as image:
        assert image.size_bytes == (size if format == "raw" else -(-size // 512) * 512)
    with images.open(path) as source:
        assert source.size_bytes >= size
    with pytest.raises(StorageError, match="cannot create"):
        FlatImage.create(FS, path, format, size, ID)


Operation = tuple[str, int, int]
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["write", "zero", "resize", "sync", "reopen"]), st.integers(0, 9000), st.integers(0, 3000)
    ),
    max_size=12,
)


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=100, deadline=None)
@given(size=st.integers(0, 6000), operations=OPERATIONS)
def test_any_operations_act_as_on_plain_bytes(
    tmp_path_factory: pytest.TempPathFactory, format: FlatFormat, size: int, operations: list[Operation]
) -> None:
    path = tmp_path_factory.mktemp("flat") / "disk"
    model = bytearray(size)
    image = FlatImage.create(FS, path, format, size, ID)
    for number, (kind, offset, length) in enumerate(operations):
        offset = min(offset, len(model))
        length = min(length, len(model) - offset)
        if kind == "write":
            data = bytes([number + 1]) * length
            image.write(offset, data)
            model[offset : offset + length] = data
        elif kind == "zero":
            image.zero(offset, length)
            model[offset : offset + length] = bytes(length)
        elif kind == "resize":
            size = (offset * 7 + length) % 9000
            image.resize(size)
            del model[size:]
            model.extend(bytes(size - len(model)))
        elif kind == "sync":
            image.sync()
        else:
            image.close()
            image = FlatImage.open(FS, path, format, size_bytes=len(model), write=True)
            assert image.unique_id == ID or format == "raw"
        assert image.size_bytes == len(model)
        assert whole(image) == model
        assert path.read_bytes() == expected_file(bytes(model), format)
    image.close()


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_reaches_past_the_disks_end(tmp_path: Path, format: FlatFormat) -> None:
    with FlatImage.create(FS, tmp_path / "disk", format, 1000, ID) as image:
        with pytest.raises(ImageError, match="has 1000 bytes"):
            image.write(999, b"ab")
        with pytest.raises(ImageError, match="has 1000 bytes"):
            image.zero(500, 501)
        with pytest.raises(ImageError, match="has 1000 bytes"):
            image.read_into(1000, bytearray(1))
        with pytest.raises(ImageError, match="has 1000 bytes"):
            image.write(-1, b"a")
        assert (tmp_path / "disk").read_bytes() == expected_file(bytes(1000), format)


@pytest.mark.parametrize("format", FORMATS)
def test_holes_stay_holes(tmp_path: Path, format: FlatFormat) -> None:
    path = tmp_path / "disk"
    with FlatImage.create(FS, path, format, 256 << 20, ID) as image:
        image.write(64 << 20, b"x" * 65536)
        image.write(128 << 20, b"y" * 65536)
        image.zero(128 << 20, 65536)
        image.sync()
        assert list(image.data_runs(0, 1 << 40)) == [(64 << 20, 65536)]
        assert list(image.allocated(0, 1 << 40)) == [(64 << 20, (64 << 20) + 65536)]
        image.resize(512 << 20)
        image.resize((512 << 20) + 1000)
        image.sync()
        assert list(image.data_runs(0, 512 << 20)) == [(64 << 20, 65536)]
        assert path.stat().st_blocks * 512 < 200_000


def test_the_id_stays_when_the_size_changes(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhd"
    FlatImage.create(FS, path, "vhd", 4096, ID).close()
    with FlatImage.open(FS, path, "vhd", size_bytes=4096, write=True) as image:
        image.resize(1 << 20)
        image.sync()
    assert Footer.decode(path.read_bytes()[-512:]).unique_id == ID


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("new", [0, 700, 4096, 5000, 20000])
def test_a_resize_cut_anywhere_is_repeated_to_the_same_file(tmp_path: Path, format: FlatFormat, new: int) -> None:
    """Whatever of the two cuts and the footer had happened: open with the old size, resize again."""
    old = 5000
    content = os.urandom(old)
    goal = content[:new].ljust(new, b"\0")
    before, after = expected_file(content, format), expected_file(goal, format)
    kept = before[: min(old, new)]
    left = [before, kept, kept.ljust(len(after), b"\0"), after, before + os.urandom(9000)]
    if format == "vhd":
        left.append(after[:-1] + b"?")
    for number, state in enumerate(left):
        path = tmp_path / f"disk{number}"
        path.write_bytes(state)
        with FlatImage.open(FS, path, format, size_bytes=old, unique_id=ID, write=True) as image:
            assert whole(image)[: min(old, new)] == content[:new]
            image.resize(new)
            assert whole(image) == goal
            image.sync()
        assert path.read_bytes() == after


def test_sync_gives_back_a_lost_footer_and_no_byte_of_the_disk_changes(tmp_path: Path) -> None:
    content = os.urandom(5000)
    good = expected_file(content, "vhd")
    for number, state in enumerate([good[:-512], good[:-1], good[:-300] + b"!" * 300, good + b"more", content]):
        path = tmp_path / f"disk{number}.vhd"
        path.write_bytes(state)
        with FlatImage.open(FS, path, "vhd", size_bytes=5000, unique_id=ID, write=True) as image:
            assert path.read_bytes() == state
            assert image.layout_problem() is not None
            assert whole(image) == content
            image.sync()
            assert image.layout_problem() is None
        assert path.read_bytes() == good


def test_a_short_file_reads_as_zeros_where_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 100)
    with FlatImage.open(FS, path, "raw", size_bytes=1000) as image:
        assert whole(image) == b"x" * 100 + bytes(900)
        assert image.layout_problem() == "the file has 100 bytes instead of 1000"
        assert list(image.allocated(0, 1000)) == [(0, 100)]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(512),
        bytes(1024),
        bytes(512) + vhd_maker.footer(1024),
        bytes(1024) + vhd_maker.footer(512),
        bytes(512) + vhd_maker.footer(512, error=1),
        bytes(512) + vhd_maker.footer(512, 3),
        vhd_maker.Vhd(8192, blocks={0: b"x"}).build(),
    ],
)
def test_without_a_size_the_vhd_must_be_whole(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "disk.vhd"
    path.write_bytes(data)
    with pytest.raises(ImageError, match="no whole fixed VHD"):
        FlatImage.open(FS, path, "vhd")


def test_sizes_that_no_image_can_have(tmp_path: Path) -> None:
    limit = 2040 << 30
    with pytest.raises(ImageError, match=r'at most 2190433320960; use the raw format for it \(head = "raw"\)'):
        FlatImage.create(FS, tmp_path / "a.vhd", "vhd", limit + 1, ID)
    with pytest.raises(ImageError, match="do not fit a raw image"):
        FlatImage.create(FS, tmp_path / "a.raw", "raw", (64 << 40) + 1, ID)
    assert list(tmp_path.iterdir()) == []
    with FlatImage.create(FS, tmp_path / "b.vhd", "vhd", 600, ID) as image:
        with pytest.raises(ImageError, match="do not fit"):
            image.resize(limit + 1)
        assert image.size_bytes == 600
        image.sync()
    assert (tmp_path / "b.vhd").read_bytes() == expected_file(bytes(600), "vhd")


def test_a_failed_resize_can_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "disk.vhd"
    content = os.urandom(1000)
    with FlatImage.create(FS, path, "vhd", 1000, ID) as image:
        image.write(0, content)
        with monkeypatch.context() as patch:
            patch.setattr(os, "ftruncate", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(StorageError, match="cannot resize"):
                image.resize(9000)
        assert image.size_bytes == 1000
        image.resize(9000)
        image.sync()
    assert path.read_bytes() == expected_file(content.ljust(9000, b"\0"), "vhd")
