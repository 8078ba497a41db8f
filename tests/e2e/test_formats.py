"""The whole path for every format: a source in it, two cycles, and the points as images of every format."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from lab import Lab

MIB = 1 << 20
SIZE = 12 * MIB
QEMU = {"vhd": "vpc"}

pytestmark = pytest.mark.skipif(
    not (shutil.which("qemu-img") and shutil.which("qemu-io")), reason="qemu-utils is not installed"
)


def tool(*command: object) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def create(form: str, *options: str) -> Callable[[Path], Path]:
    """An empty image by qemu-img."""

    def make(folder: Path) -> Path:
        path = folder / f"web-1.{form}"
        tool(
            "qemu-img",
            "create",
            "-f",
            QEMU.get(form, form),
            *(("-o", ",".join(options)) if options else ()),
            path,
            SIZE,
        )
        return path

    return make


SOURCES = {
    "raw": create("raw"),
    "vhd-dynamic": create("vhd", "force_size=on", "subformat=dynamic"),
    "vhd-fixed": create("vhd", "force_size=on", "subformat=fixed"),
    "vhdx-dynamic": create("vhdx", "subformat=dynamic", "block_size=1M"),
    "vhdx-fixed": create("vhdx", "subformat=fixed"),
}


def scribble(image: Path, seed: int) -> None:
    """Writes and zeros at places that no block of any format cares for."""
    some = random.Random(seed)
    commands = [f"write -P {some.randrange(1, 256)} {some.randrange(SIZE // 512 - 80) * 512} 40k" for _ in range(12)]
    commands.append(f"write -z {some.randrange(SIZE // MIB)}M 300k")
    words = [word for command in commands for word in ("-c", command)]
    form = image.suffix[1:]
    tool("qemu-io", "-f", QEMU.get(form, form), *words, image)


def same(one: Path, other: Path) -> None:
    forms = [QEMU.get(path.suffix[1:], path.suffix[1:]) for path in (one, other)]
    tool("qemu-img", "compare", "-q", "-f", forms[0], "-F", forms[1], one, other)


@pytest.mark.parametrize("source", SOURCES)
def test_every_format_in_and_out(lab: Lab, tmp_path: Path, source: str) -> None:
    image = SOURCES[source](tmp_path)
    lab.machine("web-1", {"os": image})
    lab.serve()
    copies = []
    for cycle in range(2):
        scribble(image, cycle)
        copies.append(Path(shutil.copy(image, tmp_path / f"copy-{cycle}{image.suffix}")))
        assert lab.sync()["point"] == cycle + 1
    for form, kind in (
        ("raw", "fixed"),
        ("vhd", "dynamic"),
        ("vhd", "fixed"),
        ("vhdx", "dynamic"),
        ("qcow2", "dynamic"),
    ):
        for point in (1, 2):
            out = tmp_path / f"{form}-{kind}-{point}"
            files = lab.restore(out, "web-1", point, "--format", form, "--subformat", kind)
            same(files["os"], copies[point - 1])
    done = lab.json("restore", "web-1", "--chain", "--format", "qcow2", "--to", tmp_path / "chain", "-c", lab.receiver)
    for entry, copy in zip(done["points"], copies, strict=True):
        same(Path(entry["files"]["os"]), copy)
    done = lab.json("restore", "web-1", "--chain", "--format", "vhdx", "--to", tmp_path / "chain", "-c", lab.receiver)
    for entry, copy in zip(done["points"], copies, strict=True):
        raw = tmp_path / f"{entry['point']}.raw"
        lab.run("image", "convert", entry["files"]["os"], raw, "--format", "raw")
        same(raw, copy)


def test_what_cannot_be_asked_for(lab: Lab, tmp_path: Path) -> None:
    image = SOURCES["raw"](tmp_path)
    lab.machine("web-1", {"os": image})
    lab.serve()
    lab.sync()
    for words, code, said in (
        (["--format", "raw", "--chain"], 4, "no chain"),
        (["--format", "qcow2", "--subformat", "fixed"], 4, "no subformat 'fixed'"),
        (["--since", "1"], 2, "--since is of a --chain"),
        (["--chain", "--allow-lost"], 2, "only points that are whole"),
    ):
        done = lab.run("restore", "web-1", "--to", tmp_path / "out", *words, "-c", lab.receiver, code=code)
        assert said in done.stderr
        assert not (tmp_path / "out").exists()
