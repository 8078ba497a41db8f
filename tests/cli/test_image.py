"""`replica image`: what a person and a program are told of an image, and conversions from the shell."""

from __future__ import annotations

import json
import os
from pathlib import Path
from uuid import UUID

import pytest

from replica.cli.app import run
from replica.durable import FileSystem
from replica.images import ParentLink
from replica.images.vhd_write import VhdWriter

MiB = 1 << 20


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """child.avhd over bases/base.vhd, in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bases").mkdir()
    parent = None
    for number, path in enumerate([tmp_path / "bases" / "base.vhd", tmp_path / "vm" / "child.avhd"]):
        path.parent.mkdir(exist_ok=True)
        with VhdWriter.create(FileSystem(), path, 8 * MiB, UUID(int=number), parent=parent) as writer:
            writer.write(number * MiB, os.urandom(MiB))
            writer.sync()
        parent = ParentLink(path, UUID(int=number))
    return tmp_path


def test_info(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["image", "info", "vm/child.avhd", "--parents", "bases"]
    assert run([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["format"], told["subformat"], told["size_bytes"]) == ("vhd", "differencing", 8 * MiB)
    assert told["allocated_bytes"] == 2 * MiB
    assert [file["subformat"] for file in told["chain"]] == ["differencing", "dynamic"]
    assert told["chain"][1]["path"] == str(chain / "bases/base.vhd")
    assert run(arguments) == 0
    out = capsys.readouterr().out
    for words in ("vhd (differencing)", "geometry size:", "2.0 MiB", "base.vhd", "health:"):
        assert words in out


def test_info_of_a_raw_disk_that_looks_like_another_format(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("guest.raw").write_bytes(b"vhdxfile" + bytes(70000))
    assert run(["image", "info", "guest.raw"]) == 0
    out = capsys.readouterr().out
    assert "raw (fixed)" in out and "vhdx by its content; a guest can imitate that" in out


def test_a_missing_parent(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["image", "info", "vm/child.avhd", "--json"]) == 4
    told = capsys.readouterr()
    assert json.loads(told.out)["error"]["code"] == "image"
    assert "is not in" in told.err and "`parents`" in told.err


def test_check(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = chain / "bases/base.vhd"
    assert run(["image", "check", str(base), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(base), "read_bytes": MiB, "health": "good"}
    assert run(["image", "check", str(base)]) == 0
    assert "is sound: 1.0 MiB of 8.0 MiB" in capsys.readouterr().out
    os.truncate(base, base.stat().st_size - 512)
    assert run(["image", "check", str(base)]) == 4
    assert "can be read, but: the footer at the end of" in capsys.readouterr().err
    assert run(["image", "check", "vm/child.avhd", "--parents", "bases"]) == 4


def test_convert(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["image", "convert", "vm/child.avhd", "--parents", "bases"]
    assert run([*arguments, "out.raw", "--format", "raw", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == "out.raw"
    assert run([*arguments, "out.vhd", "--format", "vhd", "--subformat", "fixed"]) == 0
    assert "out.vhd: 8.0 MiB as vhd (fixed), 2.0 MiB on its file system" in capsys.readouterr().out
    assert Path("out.vhd").read_bytes()[:-512] == Path("out.raw").read_bytes()
    assert run([*arguments, "out.vhd", "--format", "vhd"]) == 13
    assert run([*arguments, "out.vhd", "--format", "vhd", "--force"]) == 0
    assert run(["image", "convert", "out.vhd", "copy.raw", "--format", "raw", "--source-format", "raw"]) == 0
    assert Path("copy.raw").read_bytes() == Path("out.vhd").read_bytes()
    capsys.readouterr()
    assert run([*arguments, "a.qcow2", "--format", "qcow2"]) == 4
    assert "a.qcow2: qcow2 images are only read" in capsys.readouterr().err
    assert sorted(path.name for path in chain.iterdir()) == ["bases", "copy.raw", "out.raw", "out.vhd", "vm"]
