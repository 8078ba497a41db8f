"""`lock`, `prune`, and what `points` and `status` say of retention, on a replica made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from replica.cli.app import run
from replica.durable import FileSystem
from replica.store import ReplicaReader, ReplicaStore
from tests.store.small_primary import SmallPrimary

CONFIG = """\
listen = "127.0.0.1:0"
[tls]
ca = "ca"
cert = "cert"
key = "key"
[[storage]]
name = "tier1"
path = "replicas/"
[retention]
keep_last = 2
hourly = 0
"""


class Site:
    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.config = root / "receiver.toml"
        self.config.write_text(CONFIG)
        self.capsys = capsys
        self.primary = SmallPrimary({"os": 100_000})
        (root / "replicas").mkdir()
        self.store: ReplicaStore = self.primary.enrol(FileSystem(), root / "replicas")
        for _ in range(5):
            self.primary.scribble()
            self.primary.sync(self.store)

    def run(self, *arguments: str, code: int = 0) -> str:
        assert run([*arguments, "-c", str(self.config)]) == code
        return self.capsys.readouterr().out

    def json(self, *arguments: str, code: int = 0) -> Any:
        return json.loads(self.run(*arguments, "--json", code=code))


@pytest.fixture
def site(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Site:
    return Site(tmp_path, capsys)


def test_a_dry_run_says_what_goes_and_why_and_changes_nothing(site: Site) -> None:
    said = site.json("prune", "web-1", "--dry-run")
    assert [(p["point"], p["action"]) for p in said["points"]] == [
        (1, "drop"),
        (2, "drop"),
        (3, "drop"),
        (4, "keep"),
        (5, "keep"),
    ]
    assert said["points"][0]["reason"] == "no rule holds it"
    assert "one of the last 2" in said["points"][3]["reason"]
    assert said["bytes_at_most"] == sum(p["bytes"] for p in said["points"][:3]) > 0
    assert "3 points would go" in site.run("prune", "web-1", "--dry-run")
    assert len(site.json("points", "web-1")) == 5


def test_prune_needs_the_replica_for_itself(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    error = site.json("prune", "web-1", code=9)["error"]
    assert "prunes by itself" in error["hint"]
    site.store.close()
    assert site.json("prune", "web-1")["dropped"] == [1, 2, 3]
    assert [p["point"] for p in site.json("points", "web-1")] == [4, 5]
    assert "0 points went" in site.run("prune", "web-1")


def test_a_lock_holds_a_point_while_serve_has_the_replica(site: Site) -> None:
    assert "no point of web-1 is locked" in site.run("lock", "web-1")
    (made,) = site.json("lock", "web-1", "--point", "2", "--until", "2190-01-31", "--reason", "audit")
    assert (made["point"], made["until"], made["reason"], made["holds"]) == (
        2,
        "2190-01-31T00:00:00.000000Z",
        "audit",
        True,
    )
    said = site.json("prune", "web-1", "--dry-run")["points"]
    assert [p["action"] for p in said] == ["drop", "keep", "compose", "keep", "keep"]
    assert said[1]["reason"].startswith("locked until 2190-01-31")
    site.store.close()
    site.run("prune", "web-1")
    listed = site.json("points", "web-1")
    assert [p["point"] for p in listed] == [2, 4, 5]
    assert [p["locked_until"] for p in listed] == ["2190-01-31T00:00:00.000000Z", None, None]
    assert "locked until 2190" in listed[0]["kept"] and listed[0]["committed_at"] is not None
    assert "kept as" in site.run("points", "web-1")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--point", "2", "--until", "2020-01-01"), 3, "not ahead of now"),
        (("--point", "2", "--until", "2189-01-01"), 3, "nobody can shorten"),
        (("--point", "9", "--until", "2190-01-01"), 12, "no point 9"),
        (("--point", "2", "--until", "tomorrow"), 2, "is no date"),
        (
            (
                "--point",
                "2",
            ),
            2,
            "both --point and --until",
        ),
    ],
)
def test_what_cannot_be_locked_is_refused(
    site: Site, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], code: int, words: str
) -> None:
    site.run("lock", "web-1", "--point", "2", "--until", "2190-01-01")
    assert run(["lock", "web-1", *arguments, "-c", str(site.config)]) == code
    assert words in capsys.readouterr().err


def test_status_warns_of_what_should_be_changed(site: Site) -> None:
    (row,) = site.json("status")
    assert any("push out all others" in text for text in row["warnings"])
    site.run("lock", "web-1", "--point", "2", "--until", "2190-01-01")
    (row,) = site.json("status")
    assert not any("push out" in text for text in row["warnings"])
    site.config.write_text(CONFIG.replace('path = "replicas/"', 'path = "replicas/"\nmin_free = "1000000TiB"'))
    assert "nothing is taken" in site.run("status")
    (site.store.directory / "marks" / "retention").write_bytes(b"rot")
    assert "every point is kept" in site.run("status")
    assert all("not known" in p["kept"] for p in site.json("points", "web-1"))
    assert run(["lock", "web-1", "--begin-anew", "--point", "2", "--until", "2190-01-01", "-c", str(site.config)]) == 2
    assert "no point of web-1 is locked" in site.run("lock", "web-1", "--begin-anew")
    assert run(["lock", "web-1", "--begin-anew", "-c", str(site.config)]) == 3


@pytest.mark.parametrize("name", ["points", "head", "marks", "receipts"])
def test_a_replica_that_cannot_be_read_hides_no_other(site: Site, name: str) -> None:
    other = SmallPrimary({"os": 4096})
    other.enrol(FileSystem(), site.config.parent / "replicas").close()
    path = site.store.directory / name
    if path.exists():
        path.rename(site.config.parent / "aside")
    path.symlink_to(name)  # a loop: no call on it succeeds
    found, broken = site.json("status")
    assert (found["point"], broken["directory"]) == (0, str(site.store.directory))
    assert broken["error"]["code"] == "storage" and f"/{name}" in broken["error"]["message"]
    assert broken["machine"] == found["machine"]
    assert "it cannot be read" in site.run("status")


def test_a_storage_that_cannot_be_read_hides_no_other(site: Site) -> None:
    site.config.write_text(CONFIG.replace("[retention]", '[[storage]]\nname = "tier2"\npath = "loop"\n[retention]'))
    (site.config.parent / "loop").symlink_to("loop")
    found, broken = site.json("status")
    assert (found["point"], broken["directory"]) == (5, str(site.config.parent / "loop"))
    assert "loop" in site.run("status")


def test_verify_names_points_that_cannot_be_restored_whatever_the_reason(site: Site) -> None:
    reader = ReplicaReader(FileSystem(), site.store.directory)
    points = [info.state.point for info in reader.points()]
    inverse = next(link.path for link in reader._index.chain().links if link.result.point == points[1])
    inverse.rename(site.config.parent / "away")
    site.run("verify", "web-1")
    assert "point 2: not restorable" in site.run("verify", "web-1", "--points", code=11)
    found = site.json("verify", "web-1", "--points", code=11)
    assert (found["ok"], found["not_restorable"]) == (False, points[:2])
