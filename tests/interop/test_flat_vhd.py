"""The flat images we write, as qemu and dissect.hypervisor see them."""

import json
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from dissect.hypervisor.disk.vhd import VHD

from replica.durable import FileSystem
from replica.images import FlatImage

pytestmark = pytest.mark.skipif(
    not (shutil.which("qemu-img") and shutil.which("qemu-io")), reason="qemu-utils is not installed"
)

FS = FileSystem()
ID = UUID(int=0x1234)


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)


def info(path: Path, format: str) -> dict[str, Any]:
    done = run("qemu-img", "info", "--output=json", "-f", format, path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def assert_accepted(path: Path, content: bytes) -> None:
    """qemu and dissect see exactly this content, padded to whole sectors, and complain of nothing."""
    padded = content.ljust(-(-len(content) // 512) * 512, b"\0")
    plain = path.with_suffix(".plain")
    plain.write_bytes(padded)
    assert info(path, "vpc")["virtual-size"] == len(padded)
    compared = run("qemu-img", "compare", "-f", "vpc", "-F", "raw", path, plain)
    assert compared.returncode == 0, compared.stdout + compared.stderr
    checked = run("qemu-img", "check", "-f", "vpc", path)
    assert checked.returncode in (0, 63), checked.stderr
    with path.open("rb") as file:
        other = VHD(file)
        assert other.size == len(padded)
        assert other.read(len(padded)) == padded


@pytest.mark.parametrize("size", [1, 511, 512, 34816, 1_000_003, (8 << 20) + 512, (64 << 20) + 1])
def test_fixed_vhd_of_any_size(tmp_path: Path, size: int) -> None:
    path = tmp_path / "disk.vhd"
    content = random.Random(size).randbytes(size)
    with FlatImage.create(FS, path, "vhd", size, ID) as image:
        image.write(0, content)
        image.sync()
    assert_accepted(path, content)


@pytest.mark.parametrize("size", [3 << 30, 127 << 30, 65535 * 16 * 255 * 512, 200 << 30, 2040 << 30])
def test_large_sizes_are_exact(tmp_path: Path, size: int) -> None:
    path = tmp_path / "disk.vhd"
    with FlatImage.create(FS, path, "vhd", size, ID) as image:
        image.write(size - 5, b"abcde")
        image.sync()
    assert info(path, "vpc")["virtual-size"] == size
    assert path.stat().st_blocks * 512 < 100_000
    read = run("qemu-io", "-r", "-f", "vpc", "-c", f"read -P 0x65 {size - 1} 1", path)
    assert "Pattern verification failed" not in read.stdout, read.stdout


def test_after_growing_and_shrinking(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhd"
    content = bytearray(os.urandom(1_000_001))
    with FlatImage.create(FS, path, "vhd", len(content), ID) as image:
        image.write(0, content)
        for size in (1_000_002, 3_000_000, 777, 778, 5_000_000, 512):
            image.resize(size)
            del content[size:]
            content.extend(bytes(size - len(content)))
            image.sync()
            assert_accepted(path, bytes(content))


def test_what_qemu_writes_into_the_head_format_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhd"
    size = 10 << 20
    FlatImage.create(FS, path, "vhd", size, ID).close()
    model = bytearray(size)
    rng = random.Random(5)
    commands: list[str] = []
    for _ in range(30):
        offset, byte = rng.randrange(size), rng.randrange(256)
        length = min(rng.randrange(1, 200_000), size - offset)
        commands += ["-c", f"write -q -P {byte} {offset} {length}"]
        model[offset : offset + length] = bytes([byte]) * length
    assert run("qemu-io", "-f", "vpc", *commands, path).returncode == 0
    with FlatImage.open(FS, path, "vhd") as image:
        assert (image.size_bytes, image.unique_id) == (size, ID)
        buffer = bytearray(size)
        image.read_into(0, buffer)
        assert buffer == model


def test_raw_of_any_size(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    content = os.urandom(1_000_003)
    with FlatImage.create(FS, path, "raw", len(content), ID) as image:
        image.write(0, content)
        image.sync()
    assert path.read_bytes() == content
    assert info(path, "raw")["virtual-size"] == -(-len(content) // 512) * 512
