"""Upkeep of a site: short storage, the pace of points, and the thread that does what is due."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from replica.errors import BusyError, StorageFullError
from replica.receiver.admission import Pace
from replica.receiver.upkeep import Housekeeper
from replica.store import Policy, Rotated
from replica.store.space import DEFAULT_LIMITS, Space, judge
from tests.receiver.conftest import Primary, World
from tests.receiver.memory_stores import MemoryStore

GIB = 1 << 30


def test_a_short_storage_takes_nothing_and_gives_up_points_by_itself(
    world: World, primary: Primary, monkeypatch: pytest.MonkeyPatch
) -> None:
    primary.cycle()
    shed, refused, called = [], threading.Event(), threading.Event()

    def thin(self: MemoryStore, policy: Policy, *, at_once: bool = False, shed_bytes: int = 0) -> Rotated:
        if shed_bytes:
            assert refused.wait(10)
            shed.append((at_once, shed_bytes))
            world.stores.free_bytes = 1 << 39
            called.set()
        return Rotated()

    monkeypatch.setattr(MemoryStore, "thin", thin)
    world.stores.free_bytes = 3 * GIB
    with pytest.raises(StorageFullError, match="min_free"):
        primary.begin()
    refused.set()
    assert called.wait(10)
    assert shed == [(True, GIB)]
    primary.cycle()


def test_what_arrived_of_a_delta_that_was_given_up_makes_room(world: World, primary: Primary) -> None:
    primary.cycle()
    state = primary.begin()
    primary.send(state)
    world.stores.free_bytes = 3 * GIB
    with pytest.raises(StorageFullError):
        primary.send(state, 1)
    with pytest.raises(StorageFullError):
        primary.begin(state.delta_id)
    assert primary.store.receiving == state.delta_id
    with pytest.raises(StorageFullError):
        primary.begin()
    assert primary.store.receiving is None


def test_points_that_come_too_often_are_refused(world: World) -> None:
    world.spec = replace(world.spec, max_points_per_hour=2)
    world.open()
    primary = world.primary()
    primary.enrol()
    for _ in range(2):
        primary.cycle()
    with pytest.raises(BusyError, match="more than 2 points"):
        primary.begin()
    world.now += 1801
    primary.cycle()
    with pytest.raises(BusyError):
        primary.begin()


def test_parts_of_a_copy_that_bring_next_to_nothing_are_paced(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.spec = replace(world.spec, max_points_per_hour=2)
    monkeypatch.setattr("replica.receiver.slot.SMALL_PARTS_PER_HOUR", 3)
    world.open()
    primary = world.primary()
    primary.enrol()
    for _ in range(3):
        primary.cycle(partial=True)
    with pytest.raises(BusyError, match="more than 3 parts of a copy"):
        primary.begin()
    world.now += 1201
    primary.cycle()
    with monkeypatch.context() as patch:
        patch.setattr("replica.receiver.slot.SMALL_PART_BYTES", 1)
        for _ in range(5):
            primary.cycle(partial=True)


def test_the_pace_is_refilled_evenly_and_never_beyond_an_hour() -> None:
    pace = Pace(10.0, 0.0)
    for _ in range(10):
        pace = pace.take(0.0, 10)
    with pytest.raises(BusyError):
        pace.check(359.0, 10)
    pace.check(360.0, 10)
    assert pace.at(1e9, 10).left == 10
    assert pace.at(-5.0, 10).left == 0


class Slot:
    def __init__(self) -> None:
        self.seen = threading.Semaphore(0)

    def tidy(self) -> None:
        self.seen.release()


def test_the_housekeeper_looks_after_who_woke_it_and_after_all_in_time(caplog: pytest.LogCaptureFixture) -> None:
    slots = [Slot(), Slot()]
    space: list[Space] = [judge(5 * GIB, 100 * GIB, DEFAULT_LIMITS)]
    keeper = Housekeeper(lambda: slots, lambda: [("tier1", space[0])], every_seconds=0.05)
    keeper.start()
    for slot in (slots[1], slots[0], slots[1], slots[0]):
        assert slot.seen.acquire(timeout=10)
    keeper.wake(slots[0])
    assert slots[0].seen.acquire(timeout=10)
    keeper.stop()
    keeper._thread.join(10)
    assert not keeper._thread.is_alive()
    assert caplog.text.count("below warn_free") == 1, "said once, not every time"


def test_a_woken_slot_does_not_wait_for_the_timer() -> None:
    slot = Slot()
    keeper = Housekeeper(list, list, every_seconds=1e6)
    keeper.start()
    keeper.wake(slot)
    assert slot.seen.acquire(timeout=60)
    keeper.stop()


def test_a_policy_that_can_be_flooded_is_warned_of(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.open()
    assert "push out all others" in caplog.text
    caplog.clear()
    world.spec = replace(world.spec, retention=Policy())
    world.open()
    assert "push out" not in caplog.text
