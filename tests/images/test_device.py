"""Block devices: claimed while they are converted from or to, and overwritten to the last sector."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from replica import images
from replica.durable import FileSystem
from replica.errors import ImageError, SourceBusyError, TargetExistsError
from replica.images.device import claim
from replica.tracking.still import StandStill

pytestmark = pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("losetup"), reason="needs loop devices")
FS = FileSystem()
MiB = 1 << 20


def attach(file: Path, *options: str) -> Path:
    done = subprocess.run(["losetup", "--find", "--show", *options, file], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no loop device: {done.stderr}")
    return Path(done.stdout.strip())


@pytest.fixture(params=[512, 4096])
def device(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """8 MiB of 0xAA."""
    backing = tmp_path / "backing"
    backing.write_bytes(b"\xaa" * 8 * MiB)
    path = attach(backing, "--sector-size", str(request.param))
    yield path
    subprocess.run(["losetup", "--detach", path], check=True)


def content(path: Path) -> bytes:
    with images.open(path) as image:
        data = bytearray(image.size_bytes)
        image.read_into(0, data)
        return bytes(data)


@pytest.mark.parametrize("size", [8 * MiB, 5 * MiB + 700, 1])
def test_convert_to_a_device(tmp_path: Path, device: Path, size: int) -> None:
    disk = tmp_path / "a.raw"
    disk.write_bytes((b"x" * 5000 + bytes(3 * MiB) + b"y" * 6 * MiB)[:size])
    with images.open(disk) as source:
        with pytest.raises(TargetExistsError, match="would be overwritten; .*--force"):
            images.convert(source, device, "raw")
        images.convert(source, device, "raw", force=True)
        with pytest.raises(TargetExistsError, match="no plain file"):
            images.convert(source, device, "vhd", force=True)
    assert content(device) == disk.read_bytes().ljust(8 * MiB, b"\0")


def test_a_device_that_is_too_small(tmp_path: Path, device: Path) -> None:
    disk = tmp_path / "a.raw"
    disk.write_bytes(bytes(8 * MiB + 1))
    with images.open(disk) as source, pytest.raises(ImageError, match="has 8388608 bytes, 8388609 are needed"):
        images.convert(source, device, "raw", force=True)
    assert content(device) == b"\xaa" * 8 * MiB


def test_convert_from_a_device(tmp_path: Path, device: Path) -> None:
    with images.open(device) as source:
        assert source.sector_bytes in (512, 4096)
        images.convert(source, tmp_path / "a.vhd", "vhd")
        with pytest.raises(TargetExistsError, match="is read for this conversion"):
            images.convert(source, device, "raw", force=True)
    assert content(tmp_path / "a.vhd") == b"\xaa" * 8 * MiB


def test_one_that_is_mounted(tmp_path: Path, device: Path) -> None:
    subprocess.run(["mkfs.ext4", "-q", device], check=True)
    (tmp_path / "mnt").mkdir()
    if subprocess.run(["mount", device, tmp_path / "mnt"], check=False).returncode:
        pytest.skip("may not mount")
    disk = tmp_path / "a.raw"
    disk.write_bytes(b"x" * MiB)
    try:
        with images.open(disk) as source, pytest.raises(SourceBusyError, match="is in use on this host; unmount"):
            images.convert(source, device, "raw", force=True)
        with images.open(device) as source, pytest.raises(SourceBusyError, match="is in use on this host"):
            images.convert(source, tmp_path / "b.raw", "raw")
        with pytest.raises(SourceBusyError, match="is in use on this host"):
            StandStill(FS, {"os": device}, offline={"os"})
    finally:
        subprocess.run(["umount", tmp_path / "mnt"], check=True)


def test_vouched_for_it_is_claimed_while_it_is_read(device: Path) -> None:
    with pytest.raises(SourceBusyError, match="cannot be shown; .*`freeze` and `thaw`.*`offline = true`"):
        StandStill(FS, {"os": device})
    proof = StandStill(FS, {"os": device}, offline={"os"})
    with images.open(device) as image:
        proof.opened("os", image.files)
        with pytest.raises(SourceBusyError, match="is in use on this host"):
            claim(FS, device)
        proof.check()
    proof.close()
    claim(FS, device).close()


def test_what_is_no_device(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    for name in ("a", "b"):
        with pytest.raises(ImageError, match="is no block device"):
            claim(FS, tmp_path / name)
