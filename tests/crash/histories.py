"""The scripted histories: small steps, one line each. Add a step and its crashes are tried."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from replica.store import Policy, ReplicaReader, rotation
from replica.store.layout import Layout
from replica.store.marks import Marks
from tests.crash.explorer import Step
from tests.crash.worlds import MachineWorld, StoreWorld
from tests.store.small_primary import SmallPrimary

FAR_NS = 4_000_000_000 * 10**9


def put(name: str, offset: int, length: int, seed: int = 0) -> Any:
    def change(primary: SmallPrimary) -> None:
        primary.content[name][offset : offset + length] = random.Random(seed or offset + length).randbytes(length)

    return change


def zero(name: str, offset: int, length: int) -> Any:
    def change(primary: SmallPrimary) -> None:
        primary.content[name][offset : offset + length] = bytes(length)

    return change


def resize(name: str, size: int, fill: int = 0) -> Any:
    def change(primary: SmallPrimary) -> None:
        old = bytes(primary.content[name])[:size]
        primary.content[name] = bytearray(old.ljust(size, bytes([fill])))

    return change


def without(name: str) -> Any:
    def change(primary: SmallPrimary) -> None:
        primary.content = {n: data for n, data in primary.content.items() if n != name}

    return change


def again(name: str, size: int) -> Any:
    def change(primary: SmallPrimary) -> None:
        primary.content[name] = bytearray(random.Random(size).randbytes(size))

    return change


def sync(change: Any = None, *, partial: bool = False) -> Step:
    return lambda world: world.sync(change, partial=partial)


def lock(point: int) -> Step:
    """Lock a point for ever."""

    def step(world: Any) -> None:
        fs, layout = world.receiver_fs(), Layout(world.directory())
        state = next(i.state for i in ReplicaReader(fs, layout.root).points() if i.state.point == point)
        Marks(fs, layout).lock(state.delta_id, point, FAR_NS)
        world.promises = replace(world.promises, locks=world.promises.locks | {point})

    return step


def rotate(policy: Policy) -> Step:
    """Drop and compose what the policy does not keep, one file removed in each step."""

    def step(world: Any) -> None:
        with patch.object(rotation, "MOST_REMOVED", 1):
            gone = world.store.rotate(policy, at_once=True)
            gone += world.store.thin(policy, at_once=True)
        numbers = {*gone.dropped, *gone.composed}
        left = {number: contents for number, contents in world.promises.points.items() if number not in numbers}
        world.promises = replace(world.promises, points=left)

    return step


def restart(world: Any) -> None:
    world.close()
    world.recover()


STORE_SIZES = {"a": 40_700, "b": 16_384}

STORE: list[tuple[str, Step]] = [
    ("part of a first copy", sync(put("a", 0, 9_000), partial=True)),
    ("first copy", sync(put("b", 4_096, 5_000))),
    ("delta", sync(put("a", 30_000, 6_000))),
    ("nothing", sync()),
    ("zeros", sync(zero("a", 0, 20_480))),
    ("lock", lock(2)),
    ("grow", sync(resize("b", 25_000, 7))),
    ("shrink", sync(resize("a", 18_000))),
    ("remove a disk", sync(without("b"))),
    ("add it again", sync(again("b", 8_192))),
    ("drop and compose", rotate(Policy(keep_last=3, hourly=0))),
    ("restart", restart),
    ("grow again", sync(resize("a", 33_000))),
    ("drop", rotate(Policy(keep_last=2, hourly=0))),
]


def store_world(seed: int = 1, head_format: str = "raw") -> StoreWorld:
    return StoreWorld(STORE_SIZES, head_format, seed)


def guest(*writes: tuple[str, int, bytes | int]) -> Step:
    """The guest writes (a number: so many random bytes), then a sync."""

    def step(world: MachineWorld) -> None:
        for name, offset, data in writes:
            world.write(name, offset, world.rng.randbytes(data) if isinstance(data, int) else data)
        world.sync()

    return step


def lose_state(world: MachineWorld) -> None:
    """The sender's state directory goes; the next sync adopts the replica."""
    world.promises = replace(world.promises, tracked=False)
    world.sender_fs().remove_tree(world.spec.state)


def turn_into(sizes: dict[str, int], files: dict[str, str]) -> Step:
    """The machine's disks are these, of so many bytes (what is new of them is random), and its files those."""

    def step(world: MachineWorld) -> None:
        had = world.content
        world.content = {
            name: had.get(name, b"")[:size] + world.rng.randbytes(max(0, size - len(had.get(name, b""))))
            for name, size in sizes.items()
        }
        world.files = {f"/nowhere/primary/{name}": text.encode() for name, text in files.items()}
        world.sync()

    return step


MACHINE_SIZES = {"os": 40_700, "data": 12_288}

MACHINE: list[tuple[str, Step]] = [
    ("first copy", guest(("os", 0, 9_000), ("data", 8_192, 100))),
    ("delta", guest(("os", 20_000, 5_000))),
    ("nothing", guest()),
    ("zeros", guest(("os", 0, bytes(8_192)), ("data", 0, 4_096))),
    ("drop", rotate(Policy(keep_last=2, hourly=0))),
    ("lose the state", lose_state),
    ("adopt and resync", guest(("data", 1_000, 1))),
    ("delta after", guest(("os", 39_000, 1_700))),
]


def machine_world(seed: int = 1) -> MachineWorld:
    return MachineWorld(MACHINE_SIZES, seed)


CHANGING: list[tuple[str, Step]] = [
    ("first copy in parts", guest(("os", 0, 30_000), ("os", 32_768, 1))),
    ("grow, a new disk, files", turn_into({"os": 50_000, "more": 5_000}, {"domain": "<domain/>"})),
    ("shrink, a disk less, other files", turn_into({"os": 20_000}, {"domain": "<domain>2</domain>", "nvram": "x"})),
]
"""Disks, files and parts, through the sender. `part_bytes` is so small that what is large comes as a series."""


def changing_world(seed: int = 1) -> MachineWorld:
    return MachineWorld({"os": 40_000}, seed, part_bytes=8_192)
