"""Raw files and block devices as sources."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from replica import images
from replica.errors import ImageError
from replica.images import RawImage


@pytest.mark.parametrize("size", [0, 1, 511, 512, 4097, 1_000_003])
def test_reads_every_byte_at_any_size(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    path = tmp_path / "disk.raw"
    path.write_bytes(content)
    with images.open(path) as image:
        assert (image.format, image.size_bytes, image.sector_bytes) == ("raw", size, 512)
        buffer = bytearray(size)
        image.read_into(0, buffer)
        assert buffer == content
        assert list(image.allocated(0, size)) == ([(0, size)] if size else [])
        piece = bytearray(min(size, 100))
        image.read_into(size - len(piece), piece)
        assert piece == content[size - len(piece) :]


def test_reading_past_the_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"x" * 1000)
    with images.open(path) as image:
        for offset, length in [(0, 1001), (999, 2), (1001, 0), (-1, 1)]:
            with pytest.raises(ImageError, match="has 1000 bytes"):
                image.read_into(offset, bytearray(length))


def test_holes_are_not_allocated(tmp_path: Path) -> None:
    path = tmp_path / "sparse.img"
    with path.open("wb") as file:
        file.truncate(100 << 20)
        file.seek(10 << 20)
        file.write(b"a" * 65536)
        file.seek(90 << 20)
        file.write(b"b" * 65536)
    with images.open(path) as image:
        runs = list(image.allocated(0, image.size_bytes))
        assert runs == [(10 << 20, (10 << 20) + 65536), (90 << 20, (90 << 20) + 65536)]
        inside = (10 << 20) + 100
        assert list(image.allocated(inside, inside + 50)) == [(inside, inside + 50)]
        assert list(image.allocated(20 << 20, 90 << 20)) == []
        assert list(image.allocated(50 << 20, (90 << 20) + 1)) == [(90 << 20, (90 << 20) + 1)]
        assert list(image.allocated(0, 1 << 62)) == runs


def test_what_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is not there; put it back") as missing:
        images.open(tmp_path / "gone.raw")
    assert str(tmp_path / "gone.raw") in str(missing.value)
    (tmp_path / "folder.raw").mkdir()
    with pytest.raises(ImageError, match="is a directory"):
        images.open(tmp_path / "folder.raw")
    os.mkfifo(tmp_path / "pipe.raw")
    with pytest.raises(ImageError, match="neither a file nor a block device"):
        images.open(tmp_path / "pipe.raw")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ImageError, match="cannot read image"):
        images.open(tmp_path / "file" / "disk.raw")


def test_a_file_cut_short_while_open_is_an_image_error(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"x" * 10000)
    with images.open(path) as image:
        os.truncate(path, 5000)
        with pytest.raises(ImageError, match="ends at byte 5000"):
            image.read_into(4000, bytearray(2000))


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"x")
    image = images.open(path)
    image.close()
    image.close()


@pytest.fixture(params=[512, 4096])
def loop_device(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Path, bytes, int]]:
    content = os.urandom(3 << 20)
    backing = tmp_path / "backing"
    backing.write_bytes(content)
    command = ["losetup", "--find", "--show", "--sector-size", str(request.param), str(backing)]
    try:
        made = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("losetup is not installed")
    if made.returncode:
        pytest.skip(f"no loop device can be made: {made.stderr.strip()}")
    device = Path(made.stdout.strip())
    yield device, content, request.param
    subprocess.run(["losetup", "--detach", str(device)], check=True)


def test_block_device(loop_device: tuple[Path, bytes, int], tmp_path: Path) -> None:
    device, content, sector_bytes = loop_device
    link = tmp_path / "named-like-a.vhd"
    link.symlink_to(device)
    assert images.format_of(link) == "raw"
    with images.open(device) as image:
        assert isinstance(image, RawImage)
        assert (image.size_bytes, image.sector_bytes) == (len(content), sector_bytes)
        buffer = bytearray(1_000_001)
        image.read_into(1_000_003, buffer)
        assert buffer == content[1_000_003:][:1_000_001]
        assert list(image.allocated(5, len(content))) == [(5, len(content))]
