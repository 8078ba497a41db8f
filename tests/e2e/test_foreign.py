"""Disks that others read for us, replicated end to end: qcow2 chains, NBD exports, block devices."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from guest import command
from lab import Lab

sys.path.insert(0, str(Path(__file__).parents[1] / "images"))
from nbd_servers import serving

pytestmark = pytest.mark.skipif(
    not (shutil.which("qemu-nbd") and shutil.which("nbdkit")), reason="qemu-utils or nbdkit is not installed"
)


def write(image: Path, *commands: str) -> None:
    command("qemu-io", "-f", "qcow2", *(word for text in commands for word in ("-c", text)), image)


@pytest.fixture
def qcow2(tmp_path: Path) -> Path:
    """vm/web-1.qcow2 over vm/base.qcow2"""
    folder = tmp_path / "vm"
    folder.mkdir()
    command("qemu-img", "create", "-q", "-f", "qcow2", folder / "base.qcow2", "32M")
    write(folder / "base.qcow2", "write -P 1 0 3M", "write -P 2 20M 65k")
    command("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", folder / "web-1.qcow2")
    write(folder / "web-1.qcow2", "write -P 3 1M 700k")
    return folder / "web-1.qcow2"


def test_a_qcow2_simply_works(lab: Lab, tmp_path: Path, qcow2: Path) -> None:
    lab.machine("web-1", {"os": qcow2})
    lab.serve()
    kept = {}
    for cycle, change in enumerate(["write -P 4 30M 1M", "write -P 5 1500k 64k", "write -z 0 2M"], 1):
        write(qcow2, change)
        entry = lab.sync()
        assert entry["point"] == cycle
        assert cycle == 1 or entry["bytes_changed"] <= 2 << 20
        kept[cycle] = tmp_path / f"kept-{cycle}.raw"
        command("qemu-img", "convert", "-f", "qcow2", "-O", "raw", qcow2, kept[cycle])
    for cycle, copy in kept.items():
        files = lab.restore(tmp_path / f"out-{cycle}", "web-1", cycle)
        command("qemu-img", "compare", "-f", "raw", "-F", "raw", copy, files["os"])
    assert subprocess.run(["pgrep", "-f", str(qcow2)], capture_output=True, check=False).stdout == b""


def test_an_export_needs_a_freeze_or_a_word(lab: Lab, tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20) + b"x" * (1 << 20))
    lab.serve()
    with serving(tmp_path, "nbdkit", "-f", "-U", "{}", "-r", "file", disk) as (uri, _):
        lab.machine("web-1", {"os": Path(uri)})
        text = lab.sender.read_text().replace(str(Path(uri)), uri)
        (tmp_path / "nbd.toml").write_text(text)
        done = lab.run("sync", "web-1", "-c", tmp_path / "nbd.toml", code=5)
        assert "is an NBD export: whether it stands still cannot be shown" in done.stderr
        assert "`offline = true`" in done.stderr
        (tmp_path / "nbd.toml").write_text(text + "offline = true\n")
        lab.run("sync", "web-1", "-c", tmp_path / "nbd.toml")
        lab.machine("web-1", {"os": tmp_path / "unused.raw"}, freeze=f"echo 'os={uri}'", thaw="true")
        (tmp_path / "unused.raw").write_bytes(bytes(2 << 20))
        assert lab.sync()["point"] == 2
    assert lab.restore(tmp_path / "out")["os"].read_bytes() == disk.read_bytes()
