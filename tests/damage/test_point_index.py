"""Inverses that do not open: it may be their key that is damaged, and what was damaged may be put back."""

from __future__ import annotations

from pathlib import Path

import pytest

from replica.durable import FileSystem
from replica.errors import KeyMissingError, PointGoneError
from replica.model import NEVER
from replica.store import Layout, ReplicaReader, ReplicaStore
from replica.store.retention import Policy
from tests.damage.damage_lab import flip
from tests.store.small_primary import SmallPrimary

FS = FileSystem()


def committed(storage: Path, points: int) -> tuple[SmallPrimary, ReplicaStore]:
    primary = SmallPrimary({"os": 70_000})
    store = primary.enrol(FS, storage)
    for _ in range(points):
        primary.scribble()
        primary.sync(store)
    return primary, store


def restorable(reader: ReplicaReader) -> set[int]:
    return {info.state.point for info in reader.points() if info.restorable}


def test_a_damaged_key_hides_no_point(tmp_path: Path) -> None:
    _, store = committed(tmp_path, 3)
    (key,) = Layout(store.directory).keys.iterdir()
    flip(key, 40)
    reader = ReplicaReader(FS, store.directory)
    with pytest.raises(KeyMissingError, match=key.name):
        reader.points()
    with pytest.raises(KeyMissingError):
        reader.open_point(1)
    fresh = ReplicaReader(FS, store.directory)
    flip(key, 40)
    for each in (reader, fresh):
        assert [info.state.point for info in each.points()] == [1, 2, 3] and not each.damaged
    store.rotate(Policy(keep_last=1, hourly=0))
    assert [info.state.point for info in reader.points()] == [3]


def test_an_inverse_that_was_put_back_is_seen(tmp_path: Path) -> None:
    primary, store = committed(tmp_path, 3)
    path = Layout(store.directory).point(primary.made[2].delta_id)
    whole = path.read_bytes()
    flip(path, 40)
    reader = ReplicaReader(FS, store.directory)
    assert restorable(reader) == {3} and reader.damaged == [path]
    path.write_bytes(whole)
    assert restorable(reader) == {1, 2, 3} and not reader.damaged


@pytest.mark.parametrize("how", ["damaged", "missing"])
def test_a_point_whose_inverse_does_not_open_borrows_nothing_from_an_older_one(tmp_path: Path, how: str) -> None:
    primary, store = committed(tmp_path, 4)
    before = {info.state.point: info for info in ReplicaReader(FS, store.directory).points()}
    path = Layout(store.directory).point(primary.made[2].delta_id)  # leads from point 3 to point 2
    flip(path, 40) if how == "damaged" else path.unlink()
    reader = ReplicaReader(FS, store.directory)
    one, two, *good = reader.points()
    assert [info.state.point for info in (one, two, *good)] == [1, 2, 3, 4]
    assert good == [before[3], before[4]]
    assert (two.restorable, two.stored_bytes, two.committed) == (False, 0, NEVER)
    assert (one.restorable, one.stored_bytes, one.committed) == (False, before[1].stored_bytes, before[1].committed)
    for info in (one, two):
        assert "damaged or missing" in info.reason
        with pytest.raises(PointGoneError, match="cannot be restored: an inverse between it and the head") as caught:
            reader.open_point(info.state.point)
        assert (path.name in caught.value.message) is (how == "damaged")


def test_a_point_that_nothing_names_any_more_is_not_just_unknown(tmp_path: Path) -> None:
    primary, store = committed(tmp_path, 3)
    store.rotate(Policy(keep_last=24, hourly=0))  # what led back to before point 1 goes
    path = Layout(store.directory).point(primary.made[1].delta_id)  # so no other file names point 1
    flip(path, 40)
    with pytest.raises(PointGoneError, match="has no point 1.*2 to 3") as caught:
        ReplicaReader(FS, store.directory).open_point(1)
    assert path.name in caught.value.hint
