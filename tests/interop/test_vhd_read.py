"""Our VHD reader against qemu (writer and reader) and dissect.hypervisor (a second independent reader)."""

import hashlib
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from dissect.hypervisor.disk.vhd import VHD
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from replica import images
from replica.images.image import Image
from replica.images.vhd import VhdImage

pytestmark = pytest.mark.skipif(
    not (shutil.which("qemu-img") and shutil.which("qemu-io")), reason="qemu-utils is not installed"
)

WINDOW = 3 << 20


def run(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def create(path: Path, subformat: str, force_size: bool, size: int) -> Path:
    force = "on" if force_size else "off"
    run("qemu-img", "create", "-q", "-f", "vpc", "-o", f"subformat={subformat},force_size={force}", path, size)
    return path


def qemu_io(path: Path, *commands: str) -> None:
    arguments = [word for command in commands for word in ("-c", command)]
    assert "fail" not in run("qemu-io", "-f", "vpc", *arguments, path).lower()


def windows(image: Image) -> Iterator[bytes]:
    for offset in range(0, image.size_bytes, WINDOW):
        buffer = bytearray(b"\xa5" * min(WINDOW, image.size_bytes - offset))
        image.read_into(offset, buffer)
        yield bytes(buffer)


def digest_all(image: Image) -> str:
    digest = hashlib.sha256()
    for window in windows(image):
        digest.update(window)
    return digest.hexdigest()


def digest_allocated(image: Image) -> str:
    """Of the content, reading nothing that `allocated` does not name."""
    digest = hashlib.sha256()
    for offset in range(0, image.size_bytes, WINDOW):
        window = bytearray(min(WINDOW, image.size_bytes - offset))
        for start, stop in image.allocated(offset, offset + len(window)):
            image.read_into(start, memoryview(window)[start - offset : stop - offset])
        digest.update(window)
    return digest.hexdigest()


def digest_by_qemu(path: Path) -> tuple[int, str]:
    raw = path.with_suffix(".by-qemu")
    run("qemu-img", "convert", "-f", "vpc", "-O", "raw", path, raw)
    with raw.open("rb") as file:
        found = (raw.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
    raw.unlink()
    return found


def assert_read_alike(path: Path) -> VhdImage:
    with images.open(path) as image:
        assert isinstance(image, VhdImage)
        by_qemu = digest_by_qemu(path)
        assert (image.size_bytes, digest_all(image)) == by_qemu
        assert digest_allocated(image) == by_qemu[1]
        with path.open("rb") as file:
            other, digest = VHD(file), hashlib.sha256()
            for offset in range(0, image.size_bytes, WINDOW):
                other.seek(offset)
                digest.update(other.read(min(WINDOW, image.size_bytes - offset)))
        assert digest.hexdigest() == by_qemu[1]
    return image


SIZES = [512, 1_000_448, (2 << 20) - 512, (2 << 20) + 512, 10_000_384, 67_108_864 + 1536, 300 << 20]


@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
@pytest.mark.parametrize("force_size", [True, False], ids=["current-size", "geometry"])
@pytest.mark.parametrize("size", SIZES)
def test_images_that_qemu_made(tmp_path: Path, subformat: str, force_size: bool, size: int) -> None:
    path = create(tmp_path / "a.vhd", subformat, force_size, size)
    with images.open(path) as image:
        actual = image.size_bytes
    assert actual == size if force_size else actual >= size
    rng = random.Random(f"{subformat}{force_size}{size}")
    commands = []
    for _ in range(25):
        offset = rng.randrange(actual)
        length = min(rng.choice([1, 511, 512, 4096, 70_000, 3_000_000]), actual - offset)
        commands.append(f"write -q -P {rng.randrange(256)} {offset} {length}")
    qemu_io(path, *commands, f"write -q -P 77 {actual - 1} 1")
    image = assert_read_alike(path)
    assert image.subformat == subformat
    if subformat == "dynamic":
        with path.open("r+b") as file:
            file.seek(-512, 2)
            file.write(b"\0" * 512)
        with images.open(path) as damaged:
            assert digest_all(damaged) == digest_by_qemu(path)[1]


@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
def test_an_empty_image_has_nothing_to_read(tmp_path: Path, subformat: str) -> None:
    path = create(tmp_path / "a.vhd", subformat, True, 64 << 30)
    with images.open(path) as image:
        assert image.size_bytes == 64 << 30
        assert sum(stop - start for start, stop in image.allocated(0, image.size_bytes)) <= 65536


def test_the_largest_image(tmp_path: Path) -> None:
    size = 2040 << 30
    path = create(tmp_path / "a.vhd", "dynamic", True, size)
    qemu_io(path, f"write -q -P 1 {size - 1000} 1000", "write -q -P 2 5000 1", f"write -q -P 3 {size // 2 - 1} 2")
    with images.open(path) as image:
        assert image.size_bytes == size
        found = [(start, stop) for start, stop in image.allocated(0, size)]
        assert 1 <= len(found) <= 16
        for offset, length, byte in [(size - 1000, 1000, 1), (5000, 1, 2), (size // 2 - 1, 2, 3)]:
            buffer = bytearray(length)
            image.read_into(offset, buffer)
            assert buffer == bytes([byte]) * length
            assert any(start <= offset and offset + length <= stop for start, stop in found)


def test_one_written_sector_is_all_there_is_to_read(tmp_path: Path) -> None:
    """qemu extends the file by a whole block, of which the rest is a hole: it is not read."""
    path = create(tmp_path / "a.vhd", "dynamic", True, 64 << 20)
    qemu_io(path, f"write -q -P 9 {33 << 20} 4096")
    with images.open(path) as image:
        runs = list(image.allocated(0, image.size_bytes))
        assert sum(stop - start for start, stop in runs) <= 65536
        assert any(start <= 33 << 20 and stop >= (33 << 20) + 4096 for start, stop in runs)


WRITES = st.lists(
    st.tuples(st.integers(0, 20_000_256 - 1), st.integers(1, 400_000), st.integers(0, 255)), min_size=1, max_size=12
)


@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(writes=WRITES)
def test_random_writes_through_qemu(tmp_path: Path, subformat: str, writes: list[tuple[int, int, int]]) -> None:
    size = 20_000_256
    path = tmp_path / "a.vhd"
    path.unlink(missing_ok=True)
    create(path, subformat, True, size)
    model = bytearray(size)
    commands = []
    for offset, length, byte in writes:
        length = min(length, size - offset)
        commands.append(f"write -q -P {byte} {offset} {length}")
        model[offset : offset + length] = bytes([byte]) * length
    qemu_io(path, *commands)
    with images.open(path) as image:
        assert b"".join(windows(image)) == model
        assert digest_allocated(image) == hashlib.sha256(model).hexdigest()


def test_a_file_system_with_files(tmp_path: Path) -> None:
    if not shutil.which("mkfs.ext4"):
        pytest.skip("mkfs.ext4 is not installed")
    files = tmp_path / "files"
    files.mkdir()
    for n in range(40):
        (files / f"file-{n}").write_bytes(random.Random(n).randbytes(n * 5000))
    raw = tmp_path / "fs.img"
    with raw.open("wb") as file:
        file.truncate(96 << 20)
    run("mkfs.ext4", "-q", "-F", "-d", files, raw)
    for subformat in ("dynamic", "fixed"):
        path = tmp_path / f"{subformat}.vhd"
        run("qemu-img", "convert", "-O", "vpc", "-o", f"subformat={subformat},force_size=on", "-f", "raw", raw, path)
        assert_read_alike(path)
        with images.open(path) as image, images.open(raw) as source:
            assert digest_all(image) == digest_all(source)
