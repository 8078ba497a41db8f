"""Converting: the whole disk under the new name, or nothing there; and what `probe` and `image_info` say."""

import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vhd_maker import Vhd, footer

from replica import images
from replica.durable import File, FileSystem
from replica.errors import ImageError, SourceBusyError, StorageError, TargetExistsError
from replica.images import ParentLink
from replica.images.copying import windows
from replica.images.vhd_write import VhdWriter

FS = FileSystem()
MiB = 1 << 20
CONTENT = os.urandom(5000) + bytes(9 * MiB) + os.urandom(MiB) + bytes(1000)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.raw"
    path.write_bytes(CONTENT)
    return path


def convert(source: Path, target: Path, fs: FileSystem = FS, *, force: bool = False, format: str = "raw") -> None:
    with images.open(source) as image:
        images.convert(image, target, format, force=force, fs=fs)


def test_the_copy_is_thin_and_whole(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    with images.open(source) as image:
        images.convert(image, tmp_path / "a.raw", "raw", progress=lambda *step: seen.append(step))
    assert (tmp_path / "a.raw").read_bytes() == CONTENT
    assert (tmp_path / "a.raw").stat().st_blocks * 512 < 2 * MiB
    assert seen == sorted(seen) and seen[-1] == (len(CONTENT), len(CONTENT))


def test_a_target_that_is_there(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.raw"
    target.write_bytes(b"precious")
    with pytest.raises(TargetExistsError, match="a.raw already exists; .* --force"):
        convert(source, target)
    assert target.read_bytes() == b"precious"
    convert(source, target, force=True)
    assert target.read_bytes() == CONTENT
    for name, make in {"folder": Path.mkdir, "pipe": os.mkfifo}.items():
        make(tmp_path / name)
        with pytest.raises(TargetExistsError, match="no plain file"):
            convert(source, tmp_path / name, force=True)


def test_a_file_of_the_source_is_never_replaced(tmp_path: Path) -> None:
    parent = None
    for name in ("base", "child"):
        with VhdWriter.create(FS, tmp_path / f"{name}.vhd", MiB, UUID(int=len(name)), parent=parent) as writer:
            writer.write(0, name.encode().ljust(512))
            writer.sync()
        parent = ParentLink(tmp_path / f"{name}.vhd", UUID(int=len(name)))
    (tmp_path / "link.vhd").hardlink_to(tmp_path / "base.vhd")
    for name in ("base.vhd", "child.vhd", "link.vhd"):
        with pytest.raises(TargetExistsError, match="is read for this conversion"):
            convert(tmp_path / "child.vhd", tmp_path / name, force=True, format="vhd")


class Failing(File):
    step = ""

    def write(self, offset: int, data: object) -> None:
        if Failing.step == "write" and offset:
            raise StorageError("no more")
        super().write(offset, data)  # type: ignore[arg-type]

    def sync(self) -> None:
        if Failing.step == "sync":
            raise StorageError("no more")
        super().sync()


class FailingFileSystem(FileSystem):
    def create(self, path: Path, *, private: bool = False) -> File:
        return Failing(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL), path)

    def publish(self, temporary: Path, final: Path) -> None:
        raise StorageError("no more")

    publish_new = publish


@pytest.mark.parametrize("step", ["write", "sync", "publish"])
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("format", ["raw", "vhd"])
def test_a_failure_leaves_what_was_there(source: Path, tmp_path: Path, step: str, force: bool, format: str) -> None:
    Failing.step = step
    if force:
        (tmp_path / "a.img").write_bytes(b"precious")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(StorageError):
        convert(source, tmp_path / "a.img", FailingFileSystem(), force=force, format=format)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert not force or (tmp_path / "a.img").read_bytes() == b"precious"


def test_a_source_that_moves(source: Path, tmp_path: Path) -> None:
    def write(_done: int, _total: int) -> None:
        with source.open("r+b") as file:
            file.write(b"new")

    with images.open(source) as image, pytest.raises(SourceBusyError, match="was written while it was converted"):
        images.convert(image, tmp_path / "a.raw", "raw", progress=write)
    assert not (tmp_path / "a.raw").exists()


@pytest.mark.parametrize(
    ("format", "subformat", "match"),
    [
        ("qcow9", None, "a.img: the format 'qcow9' is not known; choose raw or vhd or vhdx or nbd"),
        ("vmdk", None, "a.img: vmdk images are only read; choose raw or vhd or vhdx or nbd"),
        ("raw", "dynamic", "a.img: raw has no subformat 'dynamic'; choose fixed"),
        ("vhd", "differencing", "a.img: vhd has no subformat 'differencing'; choose dynamic or fixed"),
        ("vhd", None, "a.img: 2190433320961 bytes do not fit a VHD"),
    ],
)
def test_formats_that_cannot_be_made(tmp_path: Path, format: str, subformat: str | None, match: str) -> None:
    with (tmp_path / "big.raw").open("wb") as file:
        file.truncate((2040 << 30) + 1)
    with images.open(tmp_path / "big.raw") as image, pytest.raises(ImageError, match=match):
        images.convert(image, tmp_path / "a.img", format, subformat=subformat)
    assert [path.name for path in tmp_path.iterdir()] == ["big.raw"]


@given(st.lists(st.integers(0, 1 << 20), unique=True, max_size=40))
def test_windows_cover_every_range_once(edges: list[int]) -> None:
    edges.sort()
    ranges = list(zip(edges[::2], edges[1::2], strict=False))
    found = list(windows(ranges, 1 << 16))
    assert all(a[1] <= b[0] for a, b in pairwise(found))
    for start, stop in found:
        assert start < stop and start // (1 << 16) == (stop - 1) // (1 << 16) and start % 4096 == 0
        assert any(start <= last and first < stop for first, last in ranges)
    for start, stop in ranges:
        assert sum(max(0, min(stop, last) - max(start, first)) for first, last in found) == stop - start


DYNAMIC = Vhd(40960, blocks={1: b"x"}).build()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", None),
        (b"\x55\xaa" * 1000, None),
        (bytes(8192) + footer(8192), "vhd"),
        (bytes(8192) + footer(8192)[:511], "vhd"),
        (DYNAMIC[:-512], "vhd"),
        (b"vhdxfile" + bytes(70000), "vhdx"),
        (b"QFI\xfb" + bytes(100), "qcow2"),
        (b"KDMV" + bytes(100), "vmdk"),
        (bytes(64) + b"\x7f\x10\xda\xbe" + bytes(400), "vdi"),
        (b"vhdxfile" + bytes(70000) + footer(8192), "vhd"),
    ],
)
def test_probe(tmp_path: Path, content: bytes, expected: str | None) -> None:
    (tmp_path / "a").write_bytes(content)
    assert images.probe(tmp_path / "a") == expected
    with images.open(tmp_path / "a", "raw") as image:
        assert image.size_bytes == len(content)


@pytest.mark.parametrize("make", [lambda _: None, Path.mkdir, os.mkfifo])
def test_probe_of_what_is_no_image(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "a")
    assert images.probe(tmp_path / "a") is None


def test_what_is_told_of_an_image(tmp_path: Path) -> None:
    vhd = Vhd(40960, blocks={1: b"x", 3: b"y"}, creator=b"vpc ", chs=(1, 4, 17))
    (tmp_path / "a.vhd").write_bytes(vhd.build()[:-512])
    found = images.image_info(tmp_path / "a.vhd")
    assert (found.format, found.subformat, found.content_looks_like) == ("vhd", "dynamic", "vhd")
    assert (found.size_bytes, found.allocated_bytes, found.sector_bytes) == (34816, 16384, 512)
    (file,) = found.chain
    assert file.sizes == {"current": 40960, "geometry": 34816}
    assert (file.creator, file.block_bytes, file.allocated_bytes, file.log) == ("vpc", 8192, 16384, "none")
    assert file.id == "00010203-0405-0607-0809-0a0b0c0d0e0f"
    assert (found.health, len(file.remarks)) == ("remarks", 1)
    (tmp_path / "a.vhd").write_bytes(vhd.build())
    assert images.image_info(tmp_path / "a.vhd").health == "good"
    assert images.image_info(tmp_path / "a.vhd", "raw").content_looks_like == "vhd"


class Rotten(File):
    """Reads structures, and no whole block."""

    def read_into(self, offset: int, buffer: object) -> int:
        if memoryview(buffer).nbytes == 8192:  # type: ignore[arg-type]
            raise StorageError("input/output error")
        return super().read_into(offset, buffer)  # type: ignore[arg-type]


class RottenFileSystem(FileSystem):
    def open(self, path: Path, *, write: bool = False) -> File:
        return Rotten(os.open(path, os.O_RDONLY), path)


def test_reading_through_stops_at_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.vhd").write_bytes(DYNAMIC)
    with images.open(tmp_path / "a.vhd") as image:
        assert images.read_through(image) == 8192
    with (
        images.open(tmp_path / "a.vhd", fs=RottenFileSystem()) as image,
        pytest.raises(ImageError, match="cannot read"),
    ):
        images.read_through(image)


def test_what_a_killed_conversion_left_goes_with_the_next_one(source: Path, tmp_path: Path) -> None:
    """Only of the same target, and not while somebody writes in that directory."""
    left, other = tmp_path / ".a.raw.0123abcd.partial", tmp_path / ".b.raw.0123abcd.partial"
    for path in (left, other):
        path.write_bytes(b"half")
    with FS.lock_directory(tmp_path, shared=True):
        convert(source, tmp_path / "a.raw")
    assert left.exists()
    convert(source, tmp_path / "a.raw", force=True)
    assert not left.exists()
    assert other.exists()
