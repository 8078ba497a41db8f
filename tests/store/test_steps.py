"""Rotation holds commits up for a few files at a time, and what went stays away in between."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from replica.durable import FileSystem
from replica.store import Policy, ReplicaStore, rotation
from tests.store.small_primary import SmallPrimary
from tests.store.test_thinning import HOURLY, Clocks, PowerCut, Unsynced, check, clocks, make_points, no_leaks

__all__ = ["clocks"]


class Watched(Unsynced):
    """Counts what is removed from each directory in each step."""

    def __init__(self) -> None:
        self.steps: list[Counter[str]] = []

    def unlink(self, path: Path) -> None:
        if self.steps and self.exists(path):
            self.steps[-1][path.parent.name] += 1
        super().unlink(path)

    def watch(self, quiet: Callable[[], Any]) -> Callable[[], Any]:
        @contextmanager
        def watched() -> Iterator[bool]:
            with quiet() as allowed:
                self.steps.append(Counter())
                yield allowed

        return watched


@pytest.fixture
def watched(tmp_path: Path, clocks: Clocks) -> tuple[Watched, SmallPrimary, ReplicaStore]:
    fs = Watched()
    primary = SmallPrimary({"os": 20_001})
    store = primary.enrol(fs, tmp_path / "storage")
    make_points(primary, store, clocks, 40, every=60)
    make_points(primary, store, clocks, 1, every=7200)
    store.rotate(Policy(keep_last=1000))
    for rotator in (store._dropper, store._thinner):
        rotator._quiet = fs.watch(rotator._quiet)  # type: ignore[method-assign]
    return fs, primary, store


def test_no_step_of_a_replacement_removes_more_than_a_commit_can_wait_for(
    watched: tuple[Watched, SmallPrimary, ReplicaStore],
) -> None:
    fs, primary, store = watched
    assert store.thin(HOURLY, at_once=True).composed == tuple(range(2, 41))
    assert max(step["points"] for step in fs.steps) == rotation.MOST_REMOVED
    assert max(step["receipts"] for step in fs.steps) <= rotation.MOST_REMOVED + 1  # and the list that moved on
    assert check(fs, store.directory, primary) == [1, 41]
    store.rotate(HOURLY)  # the reader's pin
    no_leaks(fs, store.directory)
    assert len(store.receipts.names()) == 2


def test_a_commit_drops_a_few_points_and_the_rest_goes_behind(
    watched: tuple[Watched, SmallPrimary, ReplicaStore],
) -> None:
    fs, primary, store = watched
    policy = Policy(keep_last=2, hourly=0)
    first = store.rotate(policy, brief=True)
    assert first.dropped == tuple(range(1, rotation.MOST_REMOVED + 1)) and first.more
    rest = store.rotate(policy)
    assert rest.dropped == tuple(range(rotation.MOST_REMOVED + 1, 40)) and not rest.more
    assert max(step["points"] for step in fs.steps) == rotation.MOST_REMOVED
    assert check(fs, store.directory, primary) == [40, 41]


def test_receipts_that_a_cut_left_go_a_few_at_a_time(watched: tuple[Watched, SmallPrimary, ReplicaStore]) -> None:
    fs, _primary, store = watched
    receipts = store.receipts
    forget, receipts.forget = receipts.forget, lambda _: None  # type: ignore[method-assign]
    store.rotate(Policy(keep_last=1, hourly=0), brief=True)
    receipts.forget = forget  # type: ignore[method-assign]
    while store.rotate(Policy(keep_last=1, hourly=0), brief=True).more:
        pass
    assert max(step["receipts"] for step in fs.steps) <= rotation.MOST_REMOVED + 1
    assert len(receipts.names()) == 1


@pytest.mark.parametrize("cut_at", range(1, 12))
def test_what_was_composed_away_stays_away_though_the_old_end_goes_before_it(
    tmp_path: Path, clocks: Clocks, cut_at: int
) -> None:
    class CutAt(Unsynced):
        gone = 0

        def unlink(self, path: Path) -> None:
            self.gone += path.parent.name == "points"
            if self.gone == cut_at:
                raise PowerCut
            super().unlink(path)

    fs: FileSystem = Unsynced()
    primary = SmallPrimary({"os": 20_001})
    store = primary.enrol(fs, tmp_path / "storage")
    make_points(primary, store, clocks, 12, every=60)
    make_points(primary, store, clocks, 2, every=7200)
    store.rotate(HOURLY)
    store._thinner._fs = CutAt()
    with pytest.raises(PowerCut):
        store.thin(HOURLY)
    listed = check(fs, store.directory, primary)
    while store.rotate(Policy(keep_last=1, hourly=0), brief=True).more:
        after = check(fs, store.directory, primary)
        assert set(after) <= set(listed), "a point that had gone is listed again"
        listed = after
    assert check(fs, store.directory, primary) == [14]
    store.rotate(Policy(keep_last=1, hourly=0))  # the reader's pin
    no_leaks(fs, store.directory)


def test_commits_go_on_between_the_steps(watched: tuple[Watched, SmallPrimary, ReplicaStore], clocks: Clocks) -> None:
    """A commit in each pause, with its own drop: the replacement goes on and nothing that stays is lost."""
    fs, primary, store = watched
    remove, commits = store._thinner._remove_spare, []

    def committing(*args: Any) -> bool:
        primary.scribble(count=1)
        commits.append(primary.sync(store))
        clocks.pass_(3700)
        store.rotate(HOURLY, brief=True)
        return remove(*args)

    store._thinner._remove_spare = committing  # type: ignore[method-assign]
    assert store.thin(HOURLY, at_once=True).composed == tuple(range(2, 42))  # 41 is the newest of its hour no more
    assert len(commits) > 1
    assert check(fs, store.directory, primary) == [1, *range(42, 42 + len(commits))]
    store.rotate(HOURLY)
    no_leaks(fs, store.directory)
    assert len(store.receipts.names()) == 1 + len(commits)
