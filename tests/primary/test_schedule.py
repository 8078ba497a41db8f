"""The timetable is arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replica.primary.schedule import Schedule


def test_starts_at_once_and_keeps_to_the_grid() -> None:
    schedule = Schedule.starting(30, 100)
    assert schedule.due == 100
    assert schedule.succeeded(103).due == 130
    assert schedule.succeeded(130).due == 160, "a slot is not used twice"
    assert schedule.succeeded(129.999).due == 130


def test_missed_slots_are_skipped() -> None:
    assert Schedule.starting(30, 100).succeeded(100 + 95).due == 220


def test_back_off_doubles_up_to_the_interval() -> None:
    schedule, delays = Schedule.starting(30, 0), []
    for _ in range(8):
        schedule = schedule.failed(1000)
        delays.append(schedule.due - 1000)
    assert delays == [1, 2, 4, 8, 16, 30, 30, 30]
    assert schedule.succeeded(1001).due == 1020 and schedule.succeeded(1001).failures == 0


@pytest.mark.parametrize(("every", "longest"), [(3600, 300), (5, 5), (0.5, 0.5)])
def test_back_off_is_bounded(every: float, longest: float) -> None:
    schedule = Schedule.starting(every, 0)
    for _ in range(2000):
        schedule = schedule.failed(0)
    assert schedule.due == longest


@given(st.floats(1, 1e6), st.floats(0, 1e9), st.floats(0, 1e7))
def test_the_next_slot_lies_in_the_future_but_not_beyond_one_interval(every: float, origin: float, took: float) -> None:
    due = Schedule.starting(every, origin).succeeded(origin + took).due
    assert origin + took < due + 1e-3
    assert due <= origin + took + every + 1e-3
