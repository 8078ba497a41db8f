"""Commits as the site runs them: in the background, one at a time per replica, each outcome told once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from replica.errors import BaseMismatchError, BusyError, RootMismatchError, StorageFullError, TransportError
from replica.model import DeltaId, random_id
from replica.store import Policy, Rotated
from replica.transport.wire import Adopt, Begin
from tests.receiver.conftest import Primary, World
from tests.receiver.memory_stores import MemoryStore, tail_of


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_commit_answers_the_new_state_and_is_idempotent(primary: Primary) -> None:
    state = primary.begin()
    primary.send(state)
    for _ in range(3):
        done = primary.commit(state)
        assert done is not None
        assert (done.head, done.applying, done.receiving) == (state, None, None)
    assert primary.store.commits == 1


def test_points_beyond_keep_last_are_rotated_out_with_the_commit(primary: Primary) -> None:
    for _ in range(5):
        primary.cycle()
    assert [s.point for s in primary.store.states] == [3, 4, 5]


def test_a_rotation_that_fails_fails_no_commit(primary: Primary, monkeypatch: pytest.MonkeyPatch) -> None:
    def rotate(_policy: Policy, *, brief: bool) -> Rotated:
        raise BusyError("a reader has it")

    monkeypatch.setattr(primary.store, "rotate", rotate)
    assert primary.cycle().head.point == 1


def test_a_long_commit_is_not_waited_for_and_can_be_watched(primary: Primary) -> None:
    state = primary.begin()
    primary.store.gate.clear()
    assert primary.commit(state, wait_seconds=0) is None
    assert primary.session.replica(primary.id).applying == state.delta_id
    assert primary.commit(state, wait_seconds=0.05) is None
    primary.store.gate.set()
    until(lambda: primary.session.replica(primary.id).applying is None)
    assert primary.session.replica(primary.id).head == state
    done = primary.commit(state)
    assert done is not None
    assert primary.store.commits == 1


def test_nothing_else_is_done_while_a_commit_runs(primary: Primary) -> None:
    state = primary.begin()
    primary.store.gate.clear()
    assert primary.commit(state, wait_seconds=0) is None
    other = DeltaId(random_id())
    begin = Begin(state.delta_id, primary.epoch, bytes(160))
    for call in (
        lambda: primary.session.begin(primary.id, other, begin),
        lambda: primary.session.begin(primary.id, state.delta_id, begin),
        lambda: primary.session.commit(primary.id, other, tail_of(state), 160, 0),
        lambda: primary.session.discard(primary.id, state.delta_id),
        lambda: primary.session.adopt(primary.id, Adopt(primary.epoch, random_id())),
        lambda: primary.send(state, 1),
    ):
        with pytest.raises(BusyError, match="is committing delta"):
            call()
    primary.store.gate.set()


def test_other_machines_go_on_while_one_commits(world: World, primary: Primary) -> None:
    state = primary.begin()
    primary.store.gate.clear()
    assert primary.commit(state, wait_seconds=0) is None
    second = world.primary("hv-1", "web-2")
    second.enrol()
    assert second.cycle().head.point == 1
    primary.store.gate.set()


def test_a_failed_commit_is_told_and_may_be_tried_again(primary: Primary) -> None:
    state = primary.begin()
    primary.store.fail = StorageFullError("no space in tier1")
    for _ in range(2):
        with pytest.raises(StorageFullError, match="no space in tier1"):
            primary.commit(state)
    assert primary.store.commits == 2
    primary.store.fail = None
    done = primary.commit(state)
    assert done is not None
    assert done.head == state


def test_a_failure_nobody_waited_for_is_the_next_answer(primary: Primary) -> None:
    state = primary.begin()
    primary.store.gate.clear()
    primary.store.fail = RootMismatchError("roots differ")
    assert primary.commit(state, wait_seconds=0) is None
    primary.store.gate.set()
    until(lambda: primary.session.replica(primary.id).applying is None)
    primary.store.fail = None
    with pytest.raises(RootMismatchError):
        primary.commit(state)
    assert primary.store.commits == 1
    assert primary.commit(state) is not None


def test_an_outcome_nobody_asked_for_does_not_stand_in_the_next_delta_s_way(primary: Primary) -> None:
    state = primary.begin()
    primary.store.gate.clear()
    primary.store.fail = RootMismatchError("roots differ")
    assert primary.commit(state, wait_seconds=0) is None
    primary.store.gate.set()
    until(lambda: primary.session.replica(primary.id).applying is None)
    primary.store.fail = None
    assert primary.cycle().head.point == 1


def test_a_fault_in_the_engine_ends_the_commit_too(primary: Primary) -> None:
    state = primary.begin()
    primary.store.fail = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        primary.commit(state)
    primary.store.fail = None
    assert primary.cycle().head.point == 1


def test_a_wrong_base_names_the_actual_head(primary: Primary) -> None:
    done = primary.cycle()
    begin = Begin(DeltaId(random_id()), primary.epoch, bytes(160))
    with pytest.raises(BaseMismatchError) as caught:
        primary.session.begin(primary.id, DeltaId(random_id()), begin)
    assert caught.value.head == done.head.delta_id


def test_a_damaged_segment_never_reaches_the_store(primary: Primary) -> None:
    state = primary.begin()
    with pytest.raises(TransportError, match="segment 0 was damaged on the way"):
        primary.session.put_segment(primary.id, state.delta_id, 0, 160, bytes(32), b"x")
    assert primary.store.segments == {}


def test_only_a_bounded_number_of_heads_is_rewritten_at_once(world: World) -> None:
    primaries = [world.primary("hv-1", f"web-{n}") for n in range(6)]
    states = []
    for primary in primaries:
        primary.enrol()
        state = primary.begin()
        primary.store.gate.clear()
        assert primary.commit(state, wait_seconds=0) is None
        states.append(state)
    until(lambda: sum(p.store.commits for p in primaries) == 4)
    time.sleep(0.05)
    assert sum(p.store.commits for p in primaries) == 4
    for primary in primaries:
        primary.store.gate.set()
    for primary, state in zip(primaries, states, strict=True):
        done = primary.commit(state)
        assert done is not None
        assert done.head == state


def test_closing_lets_a_commit_end_and_takes_nothing_new(world: World, primary: Primary) -> None:
    state = primary.begin()
    primary.store.gate.clear()
    assert primary.commit(state, wait_seconds=0) is None
    closed: list[bool] = []
    closing = threading.Thread(target=lambda: closed.append(world.site.close(10)))
    closing.start()
    time.sleep(0.05)
    assert not primary.store.closed
    with pytest.raises(BusyError, match="shutting down"):
        primary.begin()
    primary.store.gate.set()
    closing.join(10)
    assert closed == [True]
    assert primary.store.closed
    assert primary.store.head == state


def test_closing_gives_up_on_a_commit_that_does_not_end(world: World, primary: Primary) -> None:
    state = primary.begin()
    primary.store.gate.clear()
    assert primary.commit(state, wait_seconds=0) is None
    assert not world.site.close(0.05)
    assert not primary.store.closed


def test_a_commit_that_waits_for_its_turn_holds_no_tail(primary: Primary, monkeypatch: pytest.MonkeyPatch) -> None:
    let_go = threading.Event()

    class Tail(bytes):
        def __del__(self) -> None:
            let_go.set()

    finish = MemoryStore.finish

    def watched(store: MemoryStore, delta_id: DeltaId, tail: bytes, tail_offset: int) -> None:
        finish(store, delta_id, bytes(bytearray(tail)), tail_offset)

    monkeypatch.setattr(MemoryStore, "finish", watched)
    state = primary.begin()
    primary.store.gate.clear()

    primary.session.start_commit(primary.id, state.delta_id, Tail(tail_of(state)), 167)
    until(lambda: primary.store.applying is not None)
    try:
        assert let_go.is_set()
    finally:
        primary.store.gate.set()
