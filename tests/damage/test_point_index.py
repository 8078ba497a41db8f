"""Inverses that do not open: it may be their key that is damaged, and what was damaged may be put back."""

from __future__ import annotations

from pathlib import Path

import pytest

from replica.durable import FileSystem
from replica.errors import KeyMissingError
from replica.store import Layout, ReplicaReader
from replica.store.retention import Policy
from tests.damage.damage_lab import flip
from tests.store.small_primary import SmallPrimary

FS = FileSystem()


def test_a_damaged_key_hides_no_point(tmp_path: Path) -> None:
    primary = SmallPrimary({"os": 70_000})
    store = primary.enrol(FS, tmp_path)
    for _ in range(3):
        primary.scribble()
        primary.sync(store)
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
    primary = SmallPrimary({"os": 70_000})
    store = primary.enrol(FS, tmp_path)
    for _ in range(3):
        primary.scribble()
        primary.sync(store)
    path = Layout(store.directory).point(primary.made[2].delta_id)
    whole = path.read_bytes()
    flip(path, 40)
    reader = ReplicaReader(FS, store.directory)
    assert {info.state.point for info in reader.points() if info.restorable} == {3} and reader.damaged == [path]
    path.write_bytes(whole)
    assert {info.state.point for info in reader.points() if info.restorable} == {1, 2, 3} and not reader.damaged
