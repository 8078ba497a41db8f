"""Each barrier is taken away once, and the explorer must find what breaks; docs/CRASH.md lists them all."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import pytest

from tests.crash.barriers import BARRIERS, COVERED, Barrier
from tests.crash.explorer import (
    Known,
    Recording,
    copied,
    crash_states,
    examine,
    killed,
    nested,
    record,
    repeatable,
    sync_sites,
    violates,
)
from tests.crash.histories import MACHINE, STORE, machine_world, store_world

DOCUMENT = Path(__file__).parents[2] / "docs" / "CRASH.md"


@functools.cache
def recorded(kind: str) -> tuple[Any, Recording, frozenset[int]]:
    world: Any = store_world() if kind == "store" else machine_world()
    with repeatable(0):
        recording = record(world, STORE if kind == "store" else MACHINE)
    seen: set[int] = set()
    for _ in crash_states(recording, random.Random(1), seen=seen):
        pass
    return world, recording, frozenset(seen)


def kills(recording: Recording) -> list[int]:
    """Behind every rename: its name is seen, and not durable yet."""
    return [position + 1 for position, (_, op) in enumerate(recording.ops) if op.kind == "rename"]


@functools.cache
def found(barrier: Barrier) -> str | None:
    """What breaks without the barrier, in a state that cannot come about with it."""
    kind = "machine" if barrier.how == "machine" else "store"
    world, recording, seen = recorded(kind)
    known = Known()
    if barrier.how != "killed store":
        states = crash_states(recording, random.Random(1), seen=set(seen), transform=barrier.transform)
        return _first(((world, state) for state in states), known)
    for position in kills(recording):
        state, models = killed(recording, position)
        with_it: set[int] = set()
        for _ in nested(world, state, _copied(models), random.Random(2), seen=with_it):
            pass
        inner = nested(world, state, models, random.Random(2), seen=with_it, transform=barrier.transform)
        broken = _first(inner, known)
        if broken:
            return broken
    return None


def _copied(models: dict[str, Any]) -> dict[str, Any]:
    return {host: copied(model) for host, model in models.items()}


def _first(states: Any, known: Known) -> str | None:
    for world, state in states:
        broken = violates(world, state, known)
        if broken:
            return f"{state.position}: {broken}"
    return None


@pytest.mark.slow
@pytest.mark.parametrize("barrier", BARRIERS, ids=lambda barrier: barrier.name)
def test_without_a_barrier_something_breaks(barrier: Barrier) -> None:
    assert found(barrier), f"nothing depends on {barrier.name}, or the explorer is blind to it"


def test_every_sync_is_a_barrier_or_covered() -> None:
    sites: set[str] = set()
    for kind in ("store", "machine"):
        world, recording, _ = recorded(kind)
        sites |= sync_sites(recording)
        states = list(crash_states(recording, random.Random(3)))
        for state in states[:: len(states) // 40]:
            sites |= sync_sites(examine(world, state.trees, state.promises)[1])
    known = {site.removeprefix("sender ").removeprefix("receiver ") for b in BARRIERS for site in b.sites} | set(
        COVERED
    )
    new = {site for site in sites if site not in known and "remove_tree" not in site}
    assert not new, "a sync that is in neither list of tests/crash/barriers.py"


def test_every_barrier_is_documented() -> None:
    text = DOCUMENT.read_text()
    for barrier in BARRIERS:
        assert barrier.name in text, f"docs/CRASH.md does not have {barrier.name!r}"
