"""Retention is a pure function; these are its promises, most of them as properties."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replica.model import DeltaId, Stamp, random_id
from replica.store.retention import KINDS, Action, Decision, Kept, Policy, bucket, decide

START = datetime(2026, 11, 24, 8, tzinfo=UTC)
NOTHING = Policy(keep_last=1, hourly=0)


def ns(moment: datetime) -> int:
    return int(moment.timestamp()) * 10**9


def at(wall_ns: int) -> Stamp:
    return Stamp(wall_ns, wall_ns)


def made(minutes: Iterable[float], contents: Iterable[int] | None = None, size: int = 100) -> list[Kept]:
    """Points committed so many minutes after 08:00, each with a content of its own unless given."""
    contents = contents or range(1, 1_000_000)
    return [
        Kept(DeltaId(random_id()), n, at(ns(START + timedelta(minutes=minute))), content, size)
        for n, (minute, content) in enumerate(zip(minutes, contents, strict=False), 1)
    ]


def staying(states: list[Kept], decision: Decision) -> list[Kept]:
    going = set(decision.drops) | {delta_id for run in decision.runs for delta_id in run}
    return [state for state in states if state.delta_id not in going]


def numbers(states: list[Kept], decision: Decision) -> list[int]:
    return [state.number for state in staying(states, decision)]


def later(states: list[Kept], minutes: float = 0) -> Stamp:
    return at(states[-1].committed.wall_ns + int(minutes * 60e9))


def test_buckets_are_utc_and_weeks_are_iso() -> None:
    midnight = ns(datetime(2027, 1, 1, tzinfo=UTC))
    before = {kind: bucket(kind, midnight - 1) for kind in KINDS}
    after = {kind: bucket(kind, midnight) for kind in KINDS}
    assert list(before.values()) == ["2026-12-31 23", "2026-12-31", "2026-W53", "2026-12", "2026"]
    assert list(after.values()) == ["2027-01-01 00", "2027-01-01", "2026-W53", "2027-01", "2027"]
    sunday = ns(datetime(2026, 11, 29, 23, 59, 59, tzinfo=UTC))
    assert (bucket("weekly", sunday), bucket("weekly", sunday + 10**9)) == ("2026-W48", "2026-W49")


def test_the_first_of_each_hour_stays_and_the_rest_is_composed_once_the_hour_is_closed() -> None:
    hour = made(n / 2 for n in range(120))
    policy = Policy(keep_last=1, hourly=24)
    for count in range(2, 121):
        assert decide(hour[:count], policy, later(hour)).runs == (), "an open hour was composed"
    states = [*hour, *made([60.0], [999])]
    decision = decide(states, policy, later(states))
    assert decision.runs == (tuple(state.delta_id for state in hour[1:]),)
    assert [v.action for v in decision.verdicts] == [Action.KEEP, *[Action.COMPOSE] * 119, Action.KEEP]
    assert decision.verdicts[0].reason == "hourly 2026-11-24 08"
    assert decision.verdicts[-1].reason.startswith("newest, hourly 2026-11-24 09")


def test_points_that_fall_out_of_keep_last_wait_until_all_of_their_hour_did() -> None:
    states, composed = [], []
    policy = Policy(keep_last=24, hourly=24)
    for state in made(n / 2 for n in range(400)):
        states.append(state)
        decision = decide(states, policy, later(states))
        composed += [len(run) for run in decision.runs]
        states = staying(states, decision)
    assert composed == [119, 119, 119]
    waiting = [v for v in decide(states, policy, later(states)).verdicts if v.waits]
    assert len(waiting) == 40 - 24 - 1 and all("bucket is closed" in v.reason for v in waiting)


def test_hours_are_composed_into_their_day_at_once() -> None:
    states, composed = [], []
    policy = Policy(keep_last=1, hourly=24, daily=7)
    for state in made(60 * n for n in range(24 * 4)):
        states.append(state)
        decision = decide(states, policy, later(states))
        composed += [len(run) for run in decision.runs]
        states = staying(states, decision)
    assert composed == [15, 23, 23], "the first day begins at 08:00"
    assert max(composed) == 23


def test_an_open_run_is_composed_when_it_is_too_long_or_space_is_short() -> None:
    states = made(n / 100 for n in range(400))
    policy = Policy(keep_last=2, hourly=24)
    assert len(decide(states[:200], policy, later(states), at_once=True).runs[0]) == 197
    assert decide(states[:200], policy, later(states)).runs == ()
    assert len(decide(states, policy, later(states)).runs[0]) == 397


def test_unchanged_points_count_as_one_and_only_first_and_newest_stay() -> None:
    states = made([0, 1, 2, 3, 4, 5, 6], [1, 2, 3, 3, 3, 3, 4])
    decision = decide(states, Policy(keep_last=3, hourly=0), later(states), at_once=True)
    assert numbers(states, decision) == [2, 3, 6, 7]
    assert [v.reason for v in decision.verdicts][3:5] == ["unchanged since point 3"] * 2
    assert decision.verdicts[0].action is Action.DROP


def test_two_groups_that_become_neighbours_become_one() -> None:
    states = made([0, 10, 60, 120], [7, 8, 7, 9])
    policy = Policy(keep_last=1, hourly=2)
    decision = decide(states, policy, later(states), at_once=True)
    again = decide(staying(states, decision), policy, later(states), at_once=True)
    assert again.drops == () and again.runs == ()


def test_steps_of_a_copy_go_when_its_point_is_there() -> None:
    points = made([0, 5])
    steps = [Kept(DeltaId(random_id()), 1, at(ns(START)), None, 50, is_point=False) for _ in range(3)]
    under_way = [points[0], *steps]
    assert decide(under_way, Policy(), later(points)).runs == ()
    assert decide(under_way, Policy(), later(points)).drops == ()
    done = [points[0], *steps, points[1]]
    assert decide(done, Policy(), later(points)).runs == (tuple(step.delta_id for step in steps),)
    assert decide(steps, Policy(), later(points)).drops == tuple(step.delta_id for step in steps[:-1])
    first = [*steps, points[1]]
    assert decide(first, Policy(), later(points)).drops == tuple(step.delta_id for step in steps)


def test_steps_of_a_copy_that_comes_to_no_point_are_composed_when_they_are_too_many() -> None:
    (point,) = made([0])
    steps = [Kept(DeltaId(random_id()), 1, at(ns(START)), None, 50, is_point=False) for _ in range(258)]
    assert decide([point, *steps[:256]], Policy(), later(steps)).runs == (), "255 steps, and the head"
    ids = tuple(step.delta_id for step in steps)
    assert decide([point, *steps], Policy(), later(steps)).runs == (ids[:-1],)
    assert decide([point, *steps], Policy(), later(steps)).drops == ()
    assert decide(steps, Policy(), later(steps)).drops == ids[:-1]


def test_min_age_ends_when_both_clocks_say_so() -> None:
    states = made([0, 1])
    policy = Policy(keep_last=1, hourly=0, min_age_seconds=3600)
    born = states[0].committed.wall_ns
    young, old = born + 3599 * 10**9, born + 3601 * 10**9
    for wall, observed, stays in ((young, old, True), (old, young, True), (old, old, False), (born - 1, old, True)):
        assert (1 in numbers(states, decide(states, policy, Stamp(wall, observed)))) is stays, (wall, observed)


def test_space_takes_what_only_keep_last_holds_and_buckets_where_allowed() -> None:
    states = made([*range(0, 300, 60), *range(300, 340)])
    policy = Policy(keep_last=24, hourly=24, min_count=2)
    short = decide(states, policy, later(states), shed_bytes=350)
    assert [v.number for v in short.verdicts if v.reason == "space is short"] == [22, 23, 24, 25]
    all_of_it = numbers(states, decide(states, policy, later(states), shed_bytes=10**9))
    assert all_of_it == [1, 2, 3, 4, 5, 6, 44, 45]
    shedding = Policy(keep_last=24, hourly=24, min_count=2, shed_buckets=True)
    locked = {states[2].delta_id: "locked"}
    assert numbers(states, decide(states, shedding, later(states), locked, shed_bytes=10**9)) == [3, 44, 45]
    old = Policy(keep_last=24, hourly=24, min_age_seconds=3600 * 2, shed_buckets=True)
    assert numbers(states, decide(states, old, later(states), shed_bytes=10**9))[0] == 5


@pytest.mark.parametrize("wrong", [{"keep_last": 0}, {"hourly": -1}, {"min_count": 0}, {"min_age_seconds": -1.0}])
def test_a_policy_is_bounded(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Policy(**wrong)  # type: ignore[arg-type]


# --- properties ---

policies = st.builds(
    Policy,
    keep_last=st.integers(1, 5),
    hourly=st.integers(0, 4),
    daily=st.integers(0, 3),
    weekly=st.integers(0, 2),
    monthly=st.integers(0, 2),
    yearly=st.integers(0, 2),
    min_count=st.integers(1, 4),
    min_age_seconds=st.sampled_from([0, 600, 86400]),
)


@st.composite
def histories(draw: st.DrawFn, least: int = 1) -> list[Kept]:
    gaps = draw(st.lists(st.sampled_from([0.5, 7, 20, 61, 600, 1441, 20_000]), min_size=least, max_size=40))
    contents = draw(st.lists(st.integers(1, 3), min_size=len(gaps), max_size=len(gaps)))
    minutes = [sum(gaps[:n]) for n in range(len(gaps))]
    return made(minutes, contents)


@given(histories(), policies, st.data())
def test_floors_and_locks_hold_and_the_newest_stays(states: list[Kept], policy: Policy, data: st.DataObject) -> None:
    locked = {s.delta_id: "locked" for s in states if data.draw(st.booleans())}
    shed = data.draw(st.sampled_from([0, 10**9]))
    loose = Policy(**{**{f: getattr(policy, f) for f in policy.__struct_fields__}, "shed_buckets": True})
    now = later(states)
    left = staying(states, decide(states, loose, now, locked, shed_bytes=shed))
    assert states[-1] in left
    assert {s.delta_id for s in left} >= locked.keys()
    runs = 1 + sum(a.content != b.content for a, b in pairwise(states))
    left_runs = 1 + sum(a.content != b.content for a, b in pairwise(left))
    assert left_runs >= min(policy.min_count, runs)
    contents_young = {s.content for s in states if now.wall_ns - s.committed.wall_ns < policy.min_age_seconds * 10**9}
    assert contents_young <= {s.content for s in left}


@given(histories(), policies, st.booleans())
def test_a_second_decision_takes_nothing_more(states: list[Kept], policy: Policy, at_once: bool) -> None:
    left = staying(states, decide(states, policy, later(states), at_once=at_once))
    again = decide(left, policy, later(states), at_once=at_once)
    assert again.drops == () and again.runs == ()


@given(histories(), policies, st.sampled_from(["keep_last", "min_count", "min_age_seconds", *KINDS]))
def test_a_larger_policy_keeps_no_less(states: list[Kept], policy: Policy, field: str) -> None:
    fields = {name: getattr(policy, name) for name in policy.__struct_fields__}
    larger = Policy(**{**fields, field: fields[field] + (3600 if field == "min_age_seconds" else 1)})
    unlike = [Kept(s.delta_id, s.number, s.committed, s.number, s.stored_bytes) for s in states]
    less, more = (numbers(unlike, decide(unlike, p, later(states), at_once=True)) for p in (policy, larger))
    assert set(less) <= set(more)


@given(histories(), policies, st.integers(1, 200), st.booleans())
def test_flooding_pushes_out_nothing_that_a_bucket_holds(
    states: list[Kept], policy: Policy, count: int, unchanged: bool
) -> None:
    """However many points come in the hour of the newest one, with whatever content."""
    end = states[-1].committed.wall_ns
    room = max(0, (end // (3600 * 10**9) + 1) * 3600 * 10**9 - 1 - end)
    flood = [
        Kept(DeltaId(random_id()), len(states) + n, at(end + room * n // count), 0 if unchanged else n + 10, 100)
        for n in range(1, count + 1)
    ]
    now = at(end)
    before = decide(states, policy, now, at_once=True)
    held = {v.delta_id for v in before.verdicts if any(kind in v.reason for kind in KINDS)}
    left: list[Kept] = list(staying(states, before))
    for point in flood:
        left.append(point)
        left = staying(left, decide(left, policy, now, at_once=True))
    contents = {s.content for s in states if s.delta_id in held}
    assert contents <= {s.content for s in left}


@given(histories(2), policies, st.integers(0, 3))
def test_every_state_is_accounted_for(states: list[Kept], policy: Policy, steps: int) -> None:
    middle = [Kept(DeltaId(random_id()), 1, states[0].committed, None, 9, is_point=False) for _ in range(steps)]
    mixed = [states[0], *middle, *states[1:]]
    decision = decide(mixed, policy, later(states))
    assert [v.delta_id for v in decision.verdicts] == [s.delta_id for s in states]
    going = {v.delta_id for v in decision.verdicts if v.action is not Action.KEEP}
    gone = set(decision.drops) | {delta_id for run in decision.runs for delta_id in run}
    assert going == gone - {s.delta_id for s in middle}
    assert {s.delta_id for s in middle} <= gone
    order = [s.delta_id for s in mixed]
    assert list(decision.drops) == order[: len(decision.drops)]
    for run in decision.runs:
        first = order.index(run[0])
        assert list(run) == order[first : first + len(run)]
        assert first > 0 and first + len(run) < len(order)
