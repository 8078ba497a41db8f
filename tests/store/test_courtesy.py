"""Readers of much let a short commit go first; a long one, and one that nobody ends, they do not wait for."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from replica.durable import FileSystem
from replica.errors import BusyError, StorageError
from replica.store import ReplicaReader, ReplicaStore, restore_point
from replica.store.courtesy import PATIENCE_SECONDS, POLL_SECONDS, Courtesy, going_first
from replica.store.layout import Layout
from replica.store.verify_round import verify_replica
from tests.store.small_primary import SmallPrimary


class Waits:
    """A clock that moves by what is slept, and what happens meanwhile."""

    def __init__(self) -> None:
        self.now = 0.0
        self.then: list[tuple[float, Callable[[], object]]] = []

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for at, what in list(self.then):
            if self.now >= at:
                self.then.remove((at, what))
                what()


@pytest.fixture
def waits() -> Waits:
    return Waits()


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path)


@pytest.fixture
def courtesy(layout: Layout, waits: Waits) -> Courtesy:
    return Courtesy(FileSystem(), layout, clock=lambda: waits.now, sleep=waits.sleep)


def test_a_short_commit_is_waited_for_and_no_longer(courtesy: Courtesy, layout: Layout, waits: Waits) -> None:
    courtesy.wait()
    assert waits.now == 0
    with FileSystem().lock(layout.commit_lock) as lock:
        waits.then.append((0.1, lock.release))
        courtesy.wait()
    assert 0.1 <= waits.now <= 0.1 + 2 * POLL_SECONDS
    courtesy.wait()
    assert waits.now <= 0.1 + 2 * POLL_SECONDS


def test_a_long_commit_costs_its_readers_half_a_second_once(courtesy: Courtesy, layout: Layout, waits: Waits) -> None:
    for number in (1, 2):  # the patience is for each commit
        with FileSystem().lock(layout.commit_lock):
            for _ in range(5):
                courtesy.wait()
            assert waits.now == pytest.approx(number * PATIENCE_SECONDS, abs=2 * number * POLL_SECONDS)
        courtesy.wait()


def test_without_the_lock_all_go_on(layout: Layout, waits: Waits) -> None:
    class Broken(FileSystem):
        def _lock(self, *_: object) -> None:  # type: ignore[override]
            raise StorageError("no locks here")

    with going_first(Broken(), layout):
        Courtesy(Broken(), layout, sleep=waits.sleep).wait()
    with FileSystem().lock(layout.commit_lock, shared=True), going_first(FileSystem(), layout):
        pass
    assert waits.now == 0


@pytest.fixture
def stored(tmp_path: Path) -> tuple[SmallPrimary, ReplicaStore]:
    primary = SmallPrimary({"os": 700_001})
    store = primary.enrol(FileSystem(), tmp_path / "storage")
    primary.scribble()
    primary.sync(store)
    return primary, store


def test_the_lock_is_held_while_a_delta_is_made_durable_and_committed(
    stored: tuple[SmallPrimary, ReplicaStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    primary, store = stored
    lock, held = Layout(store.directory).commit_lock, []

    def look(done: int, total: int) -> None:
        try:
            FileSystem().lock(lock, shared=True).release()
            held.append(False)
        except BusyError:
            held.append(True)

    primary.scribble()
    made = primary.make()
    primary.send(store, made)
    publish = FileSystem.publish

    def publish_looking(fs: FileSystem, *names: Path) -> None:
        look(0, 0)
        publish(fs, *names)

    monkeypatch.setattr(FileSystem, "publish", publish_looking)
    store.commit(made.delta_id, look)
    assert held and all(held)
    held.clear()
    look(0, 0)
    assert held == [False]


@pytest.mark.parametrize("reader", ["restore", "verify"])
def test_readers_wait_for_it(
    stored: tuple[SmallPrimary, ReplicaStore], tmp_path: Path, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replica.store.courtesy.PATIENCE_SECONDS", 60.0)
    _, store = stored
    fs, layout = FileSystem(), Layout(store.directory)

    def read() -> None:
        if reader == "verify":
            assert verify_replica(fs, layout).ok
        else:
            with ReplicaReader(fs, store.directory).open_point() as point:
                restore_point(fs, point, tmp_path / "out", "raw")

    with ThreadPoolExecutor(1) as pool:
        with fs.lock(layout.commit_lock):
            reading = pool.submit(read)
            with pytest.raises(TimeoutError):
                reading.result(timeout=0.3)
        reading.result(timeout=30)
