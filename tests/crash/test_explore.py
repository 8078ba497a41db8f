"""The exhaustive history: every state that a crash may leave is recovered from, and a crash during recovery as well.

How many states there were is in the summary of the test run. `tools/explore.py` goes on where this ends, at random.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.crash.explorer import (
    Known,
    Recording,
    crash_states,
    killed,
    nested,
    powered_off,
    record,
    repeatable,
    violates,
)
from tests.crash.histories import CHANGING, MACHINE, STORE, changing_world, machine_world, store_world

HISTORIES: dict[str, tuple[Callable[[], Any], Any]] = {
    "store": (store_world, STORE),
    "store, vhd": (lambda: store_world(head_format="vhd"), STORE),
    "machine": (machine_world, MACHINE),
    "machine that changes": (changing_world, CHANGING),
}
PARTS = 2
AT_LEAST = {"store": 2_860, "store, vhd": 2_860, "machine": 4_200, "machine that changes": 4_000}
NESTED = {"store": 6_000, "machine": 5_000}


@functools.cache
def recorded(name: str) -> tuple[Any, Recording]:
    make, steps = HISTORIES[name]
    world = make()
    with repeatable(0):
        return world, record(world, steps)


def fail(recording: Recording, state: Any, broken: str) -> None:
    pytest.fail(f"in step {recording.step_at(state.position - 1)!r}, {state}: {broken}")


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("name", HISTORIES)
def test_every_crash_is_recovered_from(name: str, part: int, record_property: Callable[[str, object], None]) -> None:
    world, recording = recorded(name)
    states = list(crash_states(recording, random.Random(1)))
    assert len(states) >= AT_LEAST[name]
    known = Known()
    mine = states[part * len(states) // PARTS : (part + 1) * len(states) // PARTS]
    for state in mine:
        broken = violates(world, state, known)
        if broken:
            fail(recording, state, broken)
    record_property("crash states", len(mine))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("name", NESTED)
def test_a_crash_during_recovery_is_a_crash_like_any_other(
    name: str, part: int, record_property: Callable[[str, object], None]
) -> None:
    """After a power cut, and after a kill that left what was written in the page cache."""
    world, recording = recorded(name)
    rng = random.Random(part)
    states = list(crash_states(recording, rng))
    first: list[Any] = [(state, powered_off(state)) for state in rng.sample(states, 100)]
    # Behind what gives a name: it is seen, and not durable yet.
    named = [n + 1 for n, (_, op) in enumerate(recording.ops) if op.kind in ("add", "rename")]
    first += [killed(recording, position) for position in rng.sample(named, 100)]
    rng.shuffle(first)
    tried, known, seen = 0, Known(), set[int]()
    wanted = NESTED[name] // PARTS
    each = wanted // 40
    for state, models in first:
        inner_states = list(nested(world, state, models, rng, seen=seen))
        for after, inner in rng.sample(inner_states, min(each, len(inner_states), wanted - tried)):
            tried += 1
            broken = violates(after, inner, known)
            if broken:
                fail(recording, state, f"recovered, then {inner}: {broken}")
        if tried >= wanted:
            break
    assert tried == wanted
    record_property("crash states", tried)


def test_there_are_enough_of_them() -> None:
    assert sum(itertools.chain(AT_LEAST.values(), NESTED.values())) >= 20_000
