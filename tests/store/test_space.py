"""Space: the decisions with a free space that the test makes up, and a commit that would not have its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from replica.durable import File, FileSystem
from replica.errors import StorageFullError
from replica.store import Policy, ReplicaReader, ReplicaStore
from replica.store.space import DEFAULT_LIMITS, Limit, SpaceLimits, judge
from tests.store.small_primary import SmallPrimary

GIB = 1 << 30


class Tight(FileSystem):
    """A file system that says it has so much free."""

    free = 1000 * GIB

    def free_bytes(self, path: Path) -> int:
        return self.free


@pytest.mark.parametrize(
    ("free", "total", "low", "short"),
    [
        (11 * GIB, 100 * GIB, False, 0),
        (9 * GIB, 100 * GIB, True, 0),
        (GIB, 100 * GIB, True, GIB),
        (101 * GIB, 100_000 * GIB, False, 0),
        (99 * GIB, 100_000 * GIB, True, 0),
        (3 * GIB, 100_000 * GIB, True, GIB),
    ],
)
def test_shares_of_large_file_systems_are_bounded(free: int, total: int, low: bool, short: int) -> None:
    space = judge(free, total, DEFAULT_LIMITS)
    assert (space.is_low, space.short_bytes) == (low, short)


def test_limits_by_hand() -> None:
    space = judge(5 * GIB, 100 * GIB, SpaceLimits(warn_free=Limit(share=0.01), min_free=Limit(size_bytes=6 * GIB)))
    assert space.is_low and space.short_bytes == GIB
    assert not judge(0, 100 * GIB, SpaceLimits(Limit(), Limit())).is_low


def test_a_commit_that_may_not_fit_is_refused_before_it_begins(tmp_path: Path) -> None:
    fs = Tight()
    primary = SmallPrimary({"os": 1_000_000})
    store = primary.enrol(fs, tmp_path)
    primary.scribble(count=30)
    made = primary.make()
    primary.send(store, made)
    fs.free = 500_000
    with pytest.raises(StorageFullError, match="min_free"):
        store.commit(made.delta_id, reserve_bytes=400_000)
    assert store.stopped is None and store.applying is None and store.received == made.delta_id
    fs.free = 2_000_000
    assert store.commit(made.delta_id, reserve_bytes=400_000) == made.result


@pytest.mark.parametrize("what", ["zeroed", "cut off", "removed"])
def test_what_a_commit_takes_away_needs_space_in_the_inverse(tmp_path: Path, what: str) -> None:
    fs = Tight()
    primary = SmallPrimary({"os": 3_000_000, "data": 4096})
    store = primary.enrol(fs, tmp_path)
    primary.content["os"][1 << 20 : 2 << 20] = primary.random.randbytes(1 << 20)
    primary.sync(store)
    if what == "zeroed":
        primary.content["os"][:] = bytes(3_000_000)
    elif what == "cut off":
        del primary.content["os"][4096:]
    else:
        del primary.content["os"]
    made = primary.make()
    primary.send(store, made)
    fs.free = 400_000 + (1 << 20) - 1
    with pytest.raises(StorageFullError, match="min_free"):
        store.commit(made.delta_id, reserve_bytes=400_000)
    assert store.stopped is None and store.received == made.delta_id
    fs.free += 1 << 20  # holes need nothing, and a file system knows of data in blocks
    assert store.commit(made.delta_id, reserve_bytes=400_000) == made.result


class Full(FileSystem):
    """A file system that has no space left; what is removed does not make any."""

    full = False

    def create(self, path: Path, *, private: bool = False) -> File:
        if self.full:
            raise StorageFullError(f"cannot create {path}: no space left on device")
        return super().create(path, private=private)


def test_a_full_storage_is_relieved_and_its_replicas_can_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replica.store.marks.SAVE_EVERY_NS", 0)
    fs = Full()
    primary = SmallPrimary({"os": 1_000_000})
    store = primary.enrol(fs, tmp_path)
    for _ in range(4):
        primary.scribble(count=4)
        primary.sync(store)
    fs.full = True
    assert store.rotate(Policy(keep_last=3, hourly=0)).dropped == (1,), "no space to write the observed time"
    store.close()
    store = ReplicaStore.open(fs, store.directory)
    assert isinstance(store.stopped, StorageFullError)
    assert store.head == primary.state and store.applying is None
    with pytest.raises(StorageFullError):
        store.begin(primary.made[0].delta_id, store.head.delta_id, primary.epoch, b"")
    with pytest.raises(StorageFullError):
        store.commit(primary.state.delta_id)  # what `state` says may not be durable: nothing is acknowledged
    assert len(list((store.directory / "points").iterdir())) == 2
    fs.full = False
    primary.scribble(count=4)
    made = primary.make()
    primary.send(store, made)
    assert store.stopped is None
    store.close()
    fs.full = True
    store = ReplicaStore.open(fs, store.directory)
    with pytest.raises(StorageFullError):
        store.discard(made.delta_id)  # nor is what a redo may need given up
    fs.full = False
    assert store.received == made.delta_id and store.commit(made.delta_id) == made.result


def test_points_are_given_up_for_space_as_far_as_needed(tmp_path: Path) -> None:
    fs = FileSystem()
    primary = SmallPrimary({"os": 1_000_000})
    store = primary.enrol(fs, tmp_path)
    for _ in range(8):
        primary.scribble(count=4)
        primary.sync(store)
    policy = Policy(keep_last=8, hourly=0, min_count=2)
    sizes = {info.state.point: info.stored_bytes for info in ReplicaReader(fs, store.directory).points()}
    assert store.rotate(policy, shed_bytes=sizes[1] + 1).dropped == (1, 2)
    assert store.rotate(policy, shed_bytes=10**9).dropped == (3, 4, 5, 6)
    assert not store.rotate(policy, shed_bytes=10**9)
