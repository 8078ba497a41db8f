"""The VHDs we write, as qemu and dissect.hypervisor see them, and conversions in every direction."""

import hashlib
import json
import random
import shutil
import struct
import subprocess
from pathlib import Path
from uuid import UUID

import pytest
from dissect.hypervisor.disk.vhd import VHD
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from replica import images
from replica.durable import FileSystem
from replica.images.vhd import VhdImage
from replica.images.vhd_write import VhdWriter

pytestmark = pytest.mark.skipif(
    not (shutil.which("qemu-img") and shutil.which("qemu-io")), reason="qemu-utils is not installed"
)

FS = FileSystem()
ID = UUID(int=0x1234)
MiB = 1 << 20


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)


def assert_accepted(path: Path, content: bytes) -> None:
    """qemu and dissect see exactly this content, padded to whole sectors, and complain of nothing."""
    padded = content.ljust(-(-len(content) // 512) * 512, b"\0")
    plain = path.with_suffix(".plain")
    plain.write_bytes(padded)
    told = run("qemu-img", "info", "--output=json", "-f", "vpc", path)
    assert (told.returncode, told.stderr) == (0, "")
    assert json.loads(told.stdout)["virtual-size"] == len(padded)
    compared = run("qemu-img", "compare", "-f", "vpc", "-F", "raw", path, plain)
    assert compared.returncode == 0, compared.stdout + compared.stderr
    checked = run("qemu-img", "check", "-f", "vpc", path)
    assert checked.returncode in (0, 63), checked.stderr
    with path.open("rb") as file:
        other = VHD(file)
        assert other.size == len(padded)
        assert other.read(len(padded)) == padded


@pytest.mark.parametrize("block_bytes", [512 << 10, 2 * MiB, 16 * MiB])
@pytest.mark.parametrize("size", [1, 512, 34816, 1_000_003, 2 * MiB, 4 * MiB - 1, 40 * MiB + 512])
def test_dynamic_vhd_of_any_size(tmp_path: Path, size: int, block_bytes: int) -> None:
    path, content = tmp_path / "a.vhd", bytearray(size)
    rng = random.Random(size + block_bytes)
    with VhdWriter.create(FS, path, size, ID, block_bytes=block_bytes) as writer:
        for offset in (size - 1, *(rng.randrange(size) for _ in range(12))):
            data = rng.randbytes(min(rng.randrange(1, 700_000), size - offset))
            writer.write(offset, data)
            content[offset : offset + len(data)] = data
        writer.sync()
    assert_accepted(path, bytes(content))


@pytest.mark.parametrize("size", [3 << 30, 127 << 30, 65535 * 16 * 255 * 512, 200 << 30, 2040 << 30])
def test_large_sizes_are_exact(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.vhd"
    with VhdWriter.create(FS, path, size, ID) as writer:
        writer.write(size - 5, b"abcde")
        writer.write(5, b"x")
        writer.sync()
    assert json.loads(run("qemu-img", "info", "--output=json", "-f", "vpc", path).stdout)["virtual-size"] == size
    assert path.stat().st_blocks * 512 < 5 * MiB
    read = run("qemu-io", "-r", "-f", "vpc", "-c", f"read -P 0x65 {size - 1} 1", "-c", "read -P 0x78 5 1", path)
    assert read.returncode == 0 and "failed" not in read.stdout, read.stdout


STEPS = st.lists(st.tuples(st.integers(0, 9_999_999), st.integers(1, 300_000), st.integers(1, 255)), max_size=10)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, more=STEPS)
def test_random_writes_of_ours_and_then_of_qemu(
    tmp_path: Path, steps: list[tuple[int, int, int]], more: list[tuple[int, int, int]]
) -> None:
    path, size = tmp_path / "a.vhd", 10_000_384
    path.unlink(missing_ok=True)
    model = bytearray(size)
    with VhdWriter.create(FS, path, size, ID) as writer:
        for offset, length, byte in steps:
            data = bytes([byte]) * min(length, size - offset)
            writer.write(offset, data)
            model[offset : offset + len(data)] = data
        writer.sync()
    assert_accepted(path, bytes(model))
    commands = []
    for offset, length, byte in more:
        length = min(length, size - offset)
        commands += ["-c", f"write -q -P {byte} {offset} {length}"]
        model[offset : offset + length] = bytes([byte]) * length
    assert run("qemu-io", "-f", "vpc", *commands, path).returncode == 0
    with images.open(path) as image:
        buffer = bytearray(size)
        image.read_into(0, buffer)
        assert buffer == model


@pytest.mark.parametrize("creator", [b"vpc ", b"qemu", b"qem2", b"win ", b"tap\0", b"CTXS"])
@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
@pytest.mark.parametrize("size", [10_000_384, 3 << 30, 200 << 30])
def test_sizes_by_creator_as_qemu_sees_them(tmp_path: Path, creator: bytes, subformat: str, size: int) -> None:
    """The creator is patched into the footers, so that current size and geometry differ under each name."""
    path = tmp_path / "a.vhd"
    with images.create(path, "vhd", size, subformat=subformat) as writer:
        writer.sync()
    with path.open("r+b") as file:
        for place in [0, -512] if subformat == "dynamic" else [-512]:
            file.seek(place, 2 if place else 0)
            footer = bytearray(file.read(512))
            footer[28:32], footer[64:68] = creator, bytes(4)
            footer[64:68] = struct.pack(">I", 0xFFFFFFFF - sum(footer))
            file.seek(place, 2 if place else 0)
            file.write(footer)
    told = json.loads(run("qemu-img", "info", "--output=json", "-f", "vpc", path).stdout)
    with images.open(path) as image:
        assert image.size_bytes == told["virtual-size"]
        assert (image.size_bytes == size) == (creator not in (b"vpc ", b"qemu") or size == 200 << 30)


TARGETS = [("raw", "fixed"), ("vhd", "dynamic"), ("vhd", "fixed")]


@pytest.mark.parametrize("source", ["raw", "dynamic", "fixed", "unaligned"])
@pytest.mark.parametrize(("format", "subformat"), TARGETS)
def test_conversions(tmp_path: Path, source: str, format: str, subformat: str) -> None:
    """Digest of the whole content by `qemu-img convert`, before and after; what is zero takes no space."""
    raw, size = tmp_path / "source.raw", 60 * MiB + 512
    rng = random.Random(source + format + subformat)
    with raw.open("wb") as file:
        file.truncate(size)
        for _ in range(40):
            file.seek(rng.randrange(size - 200_000))
            file.write(rng.randbytes(rng.choice([1, 512, 5000, 150_000])))
        file.seek(8 * MiB)
        file.write(bytes(4 * MiB))
    path = raw
    if source != "raw":
        path = tmp_path / "source.vhd"
        kind = "fixed" if source == "fixed" else "dynamic"
        force = "off" if source == "unaligned" else "on"
        options = f"subformat={kind},force_size={force}"
        assert run("qemu-img", "convert", "-f", "raw", "-O", "vpc", "-o", options, raw, path).returncode == 0
    target = tmp_path / f"target.{format}"
    with images.open(path) as image:
        images.convert(image, target, format, subformat=subformat)
    digests = []
    for image_path in (path, target):
        plain = tmp_path / "plain"
        name = "raw" if image_path.suffix == ".raw" else "vpc"
        assert run("qemu-img", "convert", "-f", name, "-O", "raw", image_path, plain).returncode == 0
        digests.append((plain.stat().st_size, hashlib.sha256(plain.read_bytes()).digest()))
    assert digests[0] == digests[1]
    assert target.stat().st_blocks <= raw.stat().st_blocks - 4 * MiB // 512 + 2000
    assert images.image_info(target).subformat == subformat


def test_a_chain_becomes_one_image(tmp_path: Path) -> None:
    content, parent = bytearray(20 * MiB), None
    rng = random.Random(9)
    for depth in range(6):
        path = tmp_path / f"{depth}.vhd"
        with VhdWriter.create(FS, path, len(content), UUID(int=depth), parent=parent) as writer:
            for _ in range(10):
                offset = rng.randrange(len(content) // 512 - 1000) * 512
                data = rng.randbytes(rng.randrange(1, 1000) * 512)
                writer.write(offset, data)
                content[offset : offset + len(data)] = data
            writer.sync()
        parent = images.ParentLink(path, UUID(int=depth))
    with VhdImage.open(FS, path) as image:
        images.convert(image, tmp_path / "whole.vhd", "vhd")
    assert_accepted(tmp_path / "whole.vhd", bytes(content))
