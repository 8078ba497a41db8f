"""The crash explorer: run a history on memory disks, cut the power everywhere, recover, compare.

    recording = record(world, steps)             # every operation of every disk, and what was promised when
    for state in crash_states(recording, rng):   # each that may be left, once
        examine(world, state)                    # recover, compare, sync again, look for leftovers

A recording of a recovery is a recording like any other, so crashes nest (`examine` returns it).
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from tests.crash.crash_states import CrashModel, digest
from tests.crash.memory_disk import Op
from tests.crash.worlds import Promises, Trees, Violation, World

Step = Callable[[Any], None]
Entry = tuple[str, Op]
Transform = Callable[[list[Entry]], list[Entry]]


@dataclass
class Recording:
    """What happened to the disks: from what state on, operation by operation; and from which one on what was promised.

    `models` is what was durable and pending at the start, per host.
    """

    models: dict[str, CrashModel]
    ops: list[Entry] = field(default_factory=list)
    promised: list[tuple[int, Promises]] = field(default_factory=list)
    steps: list[tuple[int, str]] = field(default_factory=list)

    def step_at(self, position: int) -> str:
        return next((name for start, name in reversed(self.steps) if start <= position), "start")


@dataclass(frozen=True)
class CrashState:
    """What is left after the power was cut behind operation `position`."""

    position: int
    host: str
    choice: tuple[int, ...]
    trees: Trees
    promises: Promises

    def __str__(self) -> str:
        return f"after operation {self.position} on the {self.host}'s disk, {self.choice}"


def listen(world: World, ops: list[Entry]) -> None:
    for host, disk in world.disks.items():
        disk.listener = lambda op, host=host: ops.append((host, op))
        disk.named_sites = True


def record(world: World, steps: Sequence[tuple[str, Step]], models: dict[str, CrashModel] | None = None) -> Recording:
    """Do the steps. A step that takes promises back (a rotation) takes them back from its beginning on."""
    models = models or {host: CrashModel(disk.tree()) for host, disk in world.disks.items()}
    recording = Recording(models)
    listen(world, recording.ops)
    recording.promised.append((0, world.promises))
    world.noted = lambda promises: recording.promised.append((len(recording.ops), promises))
    for name, step in steps:
        start = len(recording.ops)
        recording.steps.append((start, name))
        before = world.promises
        step(world)
        left = before.both(world.promises)
        if left.key != before.key:
            recording.promised.append((start, left))
        recording.promised.append((len(recording.ops), world.promises))
    return recording


def crash_states(
    recording: Recording, rng: random.Random, *, seen: set[int] | None = None, transform: Transform | None = None
) -> Iterator[CrashState]:
    """Every state that a crash may leave, each once. `seen` is added to; `transform` changes the operations first
    (and not their number)."""
    seen = set() if seen is None else seen
    models = {host: copied(model) for host, model in recording.models.items()}
    promised = list(recording.promised)
    ops = recording.ops if transform is None else transform(recording.ops)
    promises = Promises()
    for position in range(len(ops) + 1):
        changed = False
        while promised and promised[0][0] <= position:
            promises, changed = promised.pop(0)[1], True
        host = ops[position - 1][0] if position else next(iter(models))
        if position:
            models[host].apply(ops[position - 1][1])
            if ops[position - 1][1].kind in ("new", "sync", "nothing") and not changed:
                continue
        for name, model in models.items():
            if name != host and not changed:
                continue
            choices = list(model.choices(rng))
            if changed:
                choices.append((0,) * len(model.pending))
            for number, choice in enumerate(choices):
                trees = {name: model.state(choice)}
                for other, its in models.items():
                    if other != name:  # killed where it is; now and then cut off as well
                        lost = number % 3 == 2
                        trees[other] = its.state(tuple(int(not lost or rng.random() < 0.5) for _ in its.pending))
                key = hash((tuple(sorted((h, digest(t)) for h, t in trees.items())), promises.key))
                if key not in seen:
                    seen.add(key)
                    yield CrashState(position, name, choice, trees, promises)


def copied(model: CrashModel) -> CrashModel:
    other = CrashModel(model.durable)
    other.pending = list(model.pending)
    return other


RECOVERY: tuple[tuple[str, Step], ...] = (
    ("recover", lambda world: world.recover()),
    ("next sync", lambda world: world.next_sync()),
)


def examine(
    world: Any,
    trees: Trees,
    promises: Promises,
    *,
    models: dict[str, CrashModel] | None = None,
    known: set[int] | None = None,
) -> tuple[Any, Recording]:
    """Recover from what is left, and require all that was promised. The world afterwards, and what happened.

    `known`: disks that were found good after a recovery. What comes later depends on nothing else, so it is not
    tried again for a second state that recovers to the same.
    """
    after = world.after_crash(trees, promises)
    with repeatable(after.depth):
        return after, _examine(after, promises, models, known)


def _examine(after: Any, promises: Promises, models: dict[str, CrashModel] | None, known: set[int] | None) -> Recording:
    after.rng = random.Random(1)
    for host, model in (models or {}).items():  # what has no name any more still has its number
        after.disks[host].reserve(max((*model.durable, *(op.inode for op in model.pending))))
    recording = record(after, RECOVERY[:1], models)
    trees = {host: disk.tree() for host, disk in after.disks.items()}
    ignored = (lambda _path: False) if after.resumable() else _unread
    key = hash((tuple(digest(tree, ignored) for tree in trees.values()), promises.key))
    if known is not None and key in known:
        return recording
    _silence(after)
    after.check_points()
    _append(recording, record(after, RECOVERY[1:], {"-": CrashModel()}))
    _silence(after)
    after.check_points(only={after.promises.newest, min(after.promises.points)})
    after.check_leaks()
    after.close()
    if known is not None:
        known.add(key)
    return recording


@contextmanager
def repeatable(seed: int) -> Iterator[None]:
    """Random bytes and clocks that are the same every time: what recovers to the same is the same, bit for bit."""
    rng, clock = random.Random(seed), itertools.count(1_700_000_000_000_000_000, 1_000_001)
    with (
        mock.patch.object(os, "urandom", rng.randbytes),
        mock.patch.object(time, "time_ns", lambda: next(clock)),
        mock.patch.object(time, "clock_gettime_ns", lambda _which: next(clock)),
    ):
        yield


def _unread(path: str) -> bool:
    """Files that are only removed: what a cut left of a delta that nobody continues, and notes for people."""
    name = path.rpartition("/")[2]
    return name.startswith(".") or name.endswith((".part", ".index", "status.json"))


def _silence(world: World) -> None:
    for disk in world.disks.values():
        disk.listener = None


def _append(recording: Recording, newer: Recording) -> None:
    start = len(recording.ops)
    recording.ops += newer.ops
    recording.promised += [(start + position, promises) for position, promises in newer.promised]
    recording.steps += [(start + position, name) for position, name in newer.steps]


class Known:
    """Which states were found good, so that nothing is tried twice that cannot come out differently.

    Before a recovery: files whose names begin with a dot are only ever removed, so what is in them is the same.
    After it: the same disks (with repeatable clocks and random bytes), the same end.
    """

    def __init__(self) -> None:
        self.before: set[int] = set()
        self.after: set[int] = set()

    def key(self, state: CrashState) -> int:
        parts = tuple(sorted((host, digest(tree, _hidden)) for host, tree in state.trees.items()))
        return hash((parts, state.promises.key))


def _hidden(path: str) -> bool:
    return "/." in path


def violates(world: Any, state: CrashState, known: Known | None = None) -> str | None:
    """What recovering from a state breaks, in words; None if all is well."""
    known = known or Known()
    key = known.key(state)
    if key in known.before:
        return None
    try:
        examine(world, state.trees, state.promises, known=known.after)
    except Exception as error:  # noqa: BLE001 - whatever comes out is what is wrong
        return f"{type(error).__name__}: {error}"
    known.before.add(key)
    return None


def killed(recording: Recording, position: int) -> tuple[CrashState, dict[str, CrashModel]]:
    """The processes were killed behind an operation: all is as they saw it, and what was pending still is."""
    models = {host: copied(model) for host, model in recording.models.items()}
    for host, op in recording.ops[:position]:
        models[host].apply(op)
    promises = [promises for at, promises in recording.promised if at <= position][-1]
    trees = {host: model.state((1,) * len(model.pending)) for host, model in models.items()}
    return CrashState(position, "", (), trees, promises), models


def powered_off(state: CrashState) -> dict[str, CrashModel]:
    """After a power cut everything that is there is durable."""
    return {host: CrashModel(tree) for host, tree in state.trees.items()}


def nested(
    world: Any,
    state: CrashState,
    models: dict[str, CrashModel],
    rng: random.Random,
    *,
    seen: set[int] | None = None,
    transform: Transform | None = None,
) -> Iterator[tuple[Any, CrashState]]:
    """The states that a crash during recovery from `state` and the sync after it may leave, with their worlds."""
    after, recording = examine(world, state.trees, state.promises, models=models)
    for inner in crash_states(recording, rng, seen=seen, transform=transform):
        yield after, inner


def without_syncs(*sites: str) -> Transform:
    """As if the syncs at these call sites were not there. `sender` or `receiver` may stand before a site."""

    def transform(ops: list[Entry]) -> list[Entry]:
        return [
            (host, op._replace(kind="nothing"))
            if op.kind == "sync" and (op.site in sites or f"{host} {op.site}" in sites)
            else (host, op)
            for host, op in ops
        ]

    return transform


def sync_sites(recording: Recording) -> set[str]:
    return {op.site for _, op in recording.ops if op.kind == "sync"}


__all__ = [
    "CrashState", "Known", "Recording", "Violation", "crash_states", "examine", "killed", "nested", "powered_off",
    "record", "repeatable", "sync_sites", "violates", "without_syncs",
]  # fmt: skip
