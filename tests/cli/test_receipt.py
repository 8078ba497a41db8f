"""`replica receipt`: shown, exported, and checked by somebody who has nothing but files and a public key."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from replica.cli.app import run
from replica.durable import FileSystem
from tests.store.small_primary import SmallPrimary

CONFIG = """
listen = "127.0.0.1:0"
[tls]
ca = "ca"
cert = "cert"
key = "key"
[[storage]]
name = "tier1"
path = "replicas"
"""


@dataclass
class Audit:
    root: Path
    primary: SmallPrimary
    files: list[Path]

    def verify(self, *arguments: str) -> int:
        return run(["receipt", "verify", *arguments, "--key", str(self.root / "replicas/receipt.pub")])


@pytest.fixture
def audit(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Audit:
    """Points 1 to 5 of two disks, the receipts of 2 and 3 gone with their points, the others exported."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "receiver.toml").write_text(CONFIG)
    primary = SmallPrimary({"os": 300_001, "data": 200_000})
    store = primary.enrol(FileSystem(), tmp_path / "replicas")
    for _ in range(5):
        primary.scribble()
        primary.sync(store)
    store.receipts.forget([made.delta_id for made in primary.made[1:3]])
    store.close()
    assert run(["receipt", "export", "web-1", "--to", "audit", "-c", "receiver.toml", "--json"]) == 0
    written = json.loads(capsys.readouterr().out)["files"]
    assert list(written) == ["1", "4", "5"]
    return Audit(tmp_path, primary, [Path(path) for path in written.values()])


def test_points_and_status_show_what_there_is(audit: Audit, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["points", "web-1", "-c", "receiver.toml", "--json"]) == 0
    words = [p["receipt"] for p in json.loads(capsys.readouterr().out)]
    assert words == ["signed", "missing", "missing", "signed", "signed"]
    assert run(["status", "-c", "receiver.toml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["receipt"] == "signed"
    assert run(["receipt", "show", "web-1", "-c", "receiver.toml", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["point"], shown["serial"], shown["proven"]) == (5, 5, False)
    assert {name: disk["root"] for name, disk in shown["disks"].items()} == audit.primary.state.roots
    assert run(["receipt", "show", "web-1", "--point", "2", "-c", "receiver.toml"]) == 12
    assert run(["receipt", "show", "web-1", "--point", "4", "-c", "receiver.toml"]) == 0
    assert "not proven" in capsys.readouterr().out


def test_an_auditor_needs_nothing_but_the_files(audit: Audit, capsys: pytest.CaptureFixture[str]) -> None:
    (audit.root / "receiver.toml").unlink()
    names = [str(path) for path in reversed(audit.files)]
    assert audit.verify(*names, "--json") == 0
    assert [r["point"] for r in json.loads(capsys.readouterr().out)["receipts"]] == [1, 4, 5]
    links = Path(f"{audit.files[1]}.links")
    os.rename(links, "elsewhere")  # noqa: PTH104
    assert audit.verify(*names) == 11
    assert "2 receipts between them are not here" in capsys.readouterr().err
    assert audit.verify(names[2]) == 0
    capsys.readouterr()
    data = audit.files[0].read_bytes()
    audit.files[0].write_bytes(data.replace(b"web-1", b"web-2"))
    assert audit.verify(names[2], "--json") == 11
    out, err = capsys.readouterr()
    assert "signature" in json.loads(out)["error"]["message"] and "does not fit" in err
    assert audit.verify("nothing.receipt") == 3
    assert run(["receipt", "verify", names[0], "--key", names[0]]) == 3


def test_a_restored_image_is_proven_to_be_the_point(audit: Audit, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["restore", "web-1", "--point", "4", "--format", "raw", "--to", "out", "-c", "receiver.toml"]) == 0
    of_4 = str(audit.files[1])
    images = ["--image", "os=out/os.raw", "--image", "data=out/data.raw"]
    assert audit.verify(str(audit.files[0]), of_4, *images) == 0
    assert "os: is disk os at point 4, bit for bit" in capsys.readouterr().out
    assert audit.verify(str(audit.files[2]), *images) == 11
    assert audit.verify(of_4, "--image", "os=out/data.raw") == 11
    assert audit.verify(of_4, "--image", "swap=out/data.raw") == 3
    capsys.readouterr()
    assert run(["restore", "web-1", "--point", "4", "--format", "vhd", "--to", "vhd", "-c", "receiver.toml"]) == 0
    assert audit.verify(of_4, "--image", "os=vhd/os.vhd") == 11
    assert "`replica restore --format raw`" in capsys.readouterr().err
    with Path("out/os.raw").open("r+b") as file:
        file.seek(123_456)
        byte = file.read(1)[0]
        file.seek(123_456)
        file.write(bytes([byte ^ 1]))
    capsys.readouterr()
    assert audit.verify(of_4, *images) == 11
    assert "out/os.raw is not disk 'os' at point 4" in capsys.readouterr().err


def test_an_interrupted_restore_leaves_nothing_and_says_that_it_begins_anew(
    audit: Audit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("replica.store.restore._DiskCopy", interrupted)
    for there in (False, True):
        if there:
            Path("out").mkdir()
        assert run(["restore", "web-1", "--to", "out", "-c", "receiver.toml"]) == 130
        assert "begins anew" in capsys.readouterr().err
        assert Path("out").exists() is there and not list(Path().glob("out/*"))
    assert run(["restore", "web-1", "--to", "out", "-c", "receiver.toml", "--json"]) == 130
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "interrupted"


def test_verify_names_what_damage_costs_and_points_remembers_it(
    audit: Audit, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["verify", "web-1", "--points", "--rate", "1GiB/s", "-c", "receiver.toml"]
    assert run(command) == 0
    (directory,) = (path for path in (audit.root / "replicas").iterdir() if path.is_dir())
    victim = directory / "points" / str(audit.primary.made[2].delta_id)
    data = bytearray(victim.read_bytes())
    data[300] ^= 1
    victim.write_bytes(data)
    capsys.readouterr()
    assert run([*command, "--json"]) == 11
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"] and {p["point"] for p in found["points"]} >= {2}
    assert [f["file"] for f in found["files"] if f["damage"]] == [victim.name]
    assert run(command) == 11
    assert "cannot be restored" in capsys.readouterr().out
    assert run(["points", "web-1", "-c", "receiver.toml", "--json"]) == 0
    listed = {p["point"]: p for p in json.loads(capsys.readouterr().out)}
    assert not listed[2]["restorable"] and victim.name in listed[2]["reason"]
    assert listed[4]["restorable"] and listed[4]["reason"] is None
    assert run(["points", "web-1", "-c", "receiver.toml"]) == 0
    assert f"point 2 is not restorable: {listed[2]['reason']}" in capsys.readouterr().out
    assert run(["status", "-c", "receiver.toml", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)[0]
    assert shown["not_restorable"] == [{"point": 2, "reason": listed[2]["reason"]}] and not shown["restorable"]
    assert run(["status", "-c", "receiver.toml"]) == 0
    assert f"hv-1/web-1: point 2 is not restorable: {listed[2]['reason']}" in capsys.readouterr().out
    assert run(["verify", "web-1", "--rate", "fast", "-c", "receiver.toml"]) == 2


def test_verify_of_an_empty_replica_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "receiver.toml").write_text(CONFIG)
    SmallPrimary({"os": 4096}).enrol(FileSystem(), tmp_path / "replicas").close()
    assert run(["verify", "web-1", "-c", "receiver.toml"]) == 0
    assert "web-1 has no point yet: there is nothing to verify" in capsys.readouterr().out
    assert run(["verify", "web-1", "-c", "receiver.toml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["point"] == 0


@pytest.mark.parametrize("what", ["file", "image"])
def test_a_point_that_cannot_be_restored_says_why_without_a_verification(
    audit: Audit, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    (directory,) = (path for path in (audit.root / "replicas").iterdir() if path.is_dir())
    if what == "file":
        victim = directory / "points" / str(audit.primary.made[2].delta_id)
        victim.write_bytes(victim.read_bytes()[:100])
        words = "an inverse between it and the head is damaged or missing"
    else:
        (directory / "head" / f"{audit.primary.ids['os']}.img").unlink()
        words = "an image that it needs is missing in head/"
    capsys.readouterr()
    for command in (["points", "web-1"], ["status"]):
        assert run([*command, "-c", "receiver.toml"]) == 0
        assert f"point 1 is not restorable: {words}" in capsys.readouterr().out


def test_a_damaged_receipt_of_an_older_point_is_told(audit: Audit, capsys: pytest.CaptureFixture[str]) -> None:
    (directory,) = (path for path in (audit.root / "replicas").iterdir() if path.is_dir())
    victim = directory / "receipts" / str(audit.primary.made[3].delta_id)
    victim.write_bytes(victim.read_bytes()[:-9])
    assert run(["status", "-c", "receiver.toml", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)[0]
    assert (shown["receipt"], shown["receipts_damaged"], shown["restorable"]) == ("signed", [4], True)
    assert run(["status", "-c", "receiver.toml"]) == 0
    out = capsys.readouterr().out
    assert "receipts damaged" in out and "the receipts of points 4 are damaged" in out
    assert run(["receipt", "export", "web-1", "--to", "again", "-c", "receiver.toml", "--json"]) == 11
    out, err = capsys.readouterr()
    assert list(json.loads(out)["files"]) == ["1", "5"] and json.loads(out)["damaged"] == [str(victim.resolve())]
    assert f"1 receipts of web-1 are damaged and were not written: {victim}" in err


def test_exporting_again_replaces_nothing_else(audit: Audit, capsys: pytest.CaptureFixture[str]) -> None:
    again = ["receipt", "export", "web-1", "--to", "audit", "-c", "receiver.toml"]
    assert run(again) == 0
    audit.files[2].write_bytes(audit.files[1].read_bytes())
    assert run(again) == 11
