"""Deep chains: few open files, exact bytes, and no second look at the points while nothing is committed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from replica.durable import FileSystem
from replica.store import ReplicaReader
from replica.store.layers import OPEN_FILES
from replica.store.points import PointIndex
from tests.store.small_primary import SmallPrimary

SIZES = {"os": 300_000}
POINTS = 120

CHILD = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (96, 96))
from replica.durable import FileSystem
from replica.store import ReplicaReader
with ReplicaReader(FileSystem(), Path(sys.argv[1])).open_point(1) as point:
    for _ in range(2):
        buffer = bytearray(point.disks[0].size_bytes)
        point.read_into(point.disks[0].id, 0, buffer)
sys.stdout.buffer.write(buffer)
"""


def deep(fs: FileSystem, directory: Path, points: int) -> tuple[SmallPrimary, Path]:
    primary = SmallPrimary(SIZES)
    store = primary.enrol(fs, directory)
    for _ in range(points):
        primary.scribble(count=2)
        primary.sync(store)
    store.close()
    return primary, store.directory


def test_a_point_behind_more_inverses_than_files_may_be_open(tmp_path: Path) -> None:
    assert POINTS > 96 > OPEN_FILES
    primary, directory = deep(FileSystem(), tmp_path, POINTS)
    found = subprocess.run([sys.executable, "-c", CHILD, directory], capture_output=True, timeout=60, check=False)
    assert found.returncode == 0, found.stderr.decode()
    assert found.stdout == primary.copies[1]["os"]


def test_the_points_are_looked_at_again_only_after_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fs = FileSystem()
    primary = SmallPrimary(SIZES)
    store = primary.enrol(fs, tmp_path)
    for _ in range(3):
        primary.scribble()
        primary.sync(store)
    looks = [0]
    real = PointIndex.chain

    def counted(index: PointIndex) -> object:
        looks[0] += 1
        return real(index)

    with ReplicaReader(fs, store.directory).open_point(1) as point:
        monkeypatch.setattr(PointIndex, "chain", counted)
        for commits in range(3):
            for _ in range(4):
                buffer = bytearray(SIZES["os"])
                point.read_into(point.disks[0].id, 0, buffer)
                assert buffer == primary.copies[1]["os"]
            assert looks[0] == 1 + commits
            primary.scribble()
            with monkeypatch.context() as undisturbed:
                undisturbed.setattr(PointIndex, "chain", real)
                primary.sync(store)
    store.close()


def test_a_name_that_belongs_to_another_inverse_by_now_is_noticed(tmp_path: Path) -> None:
    """Composed inverses take older names: what is read must be what the chain was found with."""
    fs = FileSystem()
    primary, directory = deep(fs, tmp_path, 5)
    with ReplicaReader(fs, directory).open_point(1) as point:
        names = [directory / "points" / str(made.delta_id) for made in primary.made[1:]]
        one, other = names[0], names[1]
        spare = one.with_name(".spare")
        one.rename(spare)
        other.rename(one)
        spare.rename(other)
        buffer = bytearray(SIZES["os"])
        point.read_into(point.disks[0].id, 0, buffer)
        assert buffer == primary.copies[1]["os"]
