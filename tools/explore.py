"""The crash explorer at random: histories, power cuts, kills, cuts during recovery, failing disks, as long as told.

    python tools/explore.py --seconds 3600 --seed 7             # or: make explore SECONDS_TO_EXPLORE=3600
    python tools/explore.py --replay explorer-7-12.state        # one state again, as it was found

Every round makes a small history of its own (seed, round), cuts the power at random, recovers with the real code and
compares (`tests/crash`). The first broken promise ends it: exit code 1, the state in a file, and the command that
tries exactly that state again.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import pickle
import random
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from replica.errors import ReplicaError
from replica.primary.spec import PART_BYTES
from replica.store import Policy
from tests.crash import histories
from tests.crash.explorer import (
    CrashState,
    Known,
    Recording,
    crash_states,
    examine,
    killed,
    nested,
    powered_off,
    record,
    repeatable,
    violates,
)
from tests.crash.worlds import MachineWorld, StoreWorld, Violation

STATES_PER_ROUND, NESTED_PER_ROUND, NESTED_EACH, FAULTS_PER_ROUND = 120, 3, 60, 4
SIZES = (0, 1, 512, 4_095, 4_096, 9_000, 16_384, 20_001, 40_960, 70_000)
COMES_BACK = ("left over", "lead nowhere", "not restorable")
"""After a sync that failed, what was removed may come back with the next power cut; it is shown, and harms nobody."""
_NOT_KEPT = ("disks", "noted", "_store", "_receiver")

Steps = list[tuple[str, Any]]


def store_world(rng: random.Random) -> StoreWorld:
    sizes = {name: rng.choice(SIZES) for name in "abc"[: rng.randint(1, 3)]}
    return StoreWorld(sizes, rng.choice(["raw", "raw", "vhd"]), rng.randrange(1 << 30))


def change(rng: random.Random) -> Any:
    """Something that happens to the disks between two points."""

    def apply(primary: Any) -> None:
        names = sorted(primary.content)
        name = rng.choice(names)
        data, kind = primary.content[name], rng.randrange(8)
        if kind == 0:
            return
        if kind == 1:
            primary.content[name] = bytearray(bytes(data)[: (size := rng.choice(SIZES))].ljust(size, b"\0"))
        elif kind == 2 and len(names) > 1:
            primary.content = {n: d for n, d in primary.content.items() if n != name}
        elif kind == 3:
            primary.content = {**primary.content, rng.choice(sorted(primary.ids)): bytearray(rng.randbytes(8_192))}
        elif data:
            for _ in range(rng.randint(1, 4)):
                at, length = rng.randrange(len(data)), rng.choice([1, 512, 4_096, 30_000])
                part = min(length, len(data) - at)
                data[at : at + part] = bytes(part) if kind == 4 else rng.randbytes(part)

    return apply


def policy(rng: random.Random) -> Policy:
    return Policy(keep_last=rng.randint(1, 4), hourly=rng.choice([0, 0, 2]))


def lock_newest(world: Any) -> None:
    if world.promises.points:
        histories.lock(world.promises.newest)(world)


def store_steps(rng: random.Random) -> Steps:
    steps: Steps = [("sync", histories.sync(change(rng)))]
    for _ in range(rng.randint(2, 8)):
        kind = rng.randrange(10)
        if kind < 6:
            steps.append(("sync", histories.sync(change(rng), partial=kind == 0)))
        elif kind == 6:
            steps.append(("restart", histories.restart))
        elif kind == 7:
            steps.append(("lock", lock_newest))
        else:
            steps.append(("rotate", histories.rotate(policy(rng))))
    return steps


def machine_world(rng: random.Random) -> MachineWorld:
    sizes = {name: rng.choice([size for size in SIZES if size >= 512]) for name in ("os", "data")[: rng.randint(1, 2)]}
    return MachineWorld(sizes, rng.randrange(1 << 30), rng.choice([8_192, 16_384, PART_BYTES]))


def other_machine(rng: random.Random) -> Any:
    """Disks that grow, shrink, come and go, and other files."""
    names = ("os", "data", "more")
    sizes = {name: rng.choice([size for size in SIZES if size >= 512]) for name in names[: rng.randint(1, 3)]}
    return histories.turn_into(
        sizes, {name: name * rng.randrange(3_000) for name in ("xml", "nvram")[: rng.randint(0, 2)]}
    )


def machine_steps(rng: random.Random) -> Steps:
    def writes(world: MachineWorld) -> None:
        for _ in range(rng.randint(0, 3)):
            name = rng.choice(sorted(world.content))
            at = rng.randrange(len(world.content[name]))
            part = min(rng.choice([1, 600, 4_096, 20_000]), len(world.content[name]) - at)
            world.write(name, at, bytes(part) if rng.random() < 0.3 else rng.randbytes(part))
        world.sync()

    steps: Steps = [("sync", writes)]
    for _ in range(rng.randint(1, 5)):
        kind = rng.randrange(10)
        if kind > 7:
            steps.append(("another machine", other_machine(rng)))
        elif kind == 0:
            steps += [("lose the state", histories.lose_state), ("sync", writes)]
        elif kind == 1:
            steps.append(("rotate", histories.rotate(policy(rng))))
        elif kind == 2:
            steps.append(("restart", histories.restart))
        else:
            steps.append(("sync", writes))
    return steps


def pick(items: list[Any], count: int, rng: random.Random) -> list[Any]:
    return rng.sample(items, min(count, len(items)))


class Explorer:
    def __init__(self, seed: int, only: str | None) -> None:
        self.seed, self.only = seed, only
        self.states = self.rounds = 0

    def round(self) -> bool:
        """One history; False if something is broken."""
        number, self.rounds = self.rounds, self.rounds + 1
        rng = random.Random(f"{self.seed}:{number}")
        kind = self.only or rng.choice(["store", "store", "machine"])
        world: Any = store_world(rng) if kind == "store" else machine_world(rng)
        steps = store_steps(rng) if kind == "store" else machine_steps(rng)
        with repeatable(0):
            recording = record(world, steps)
        states, known = list(crash_states(recording, rng)), Known()
        return (
            all(self.check(world, state, known, recording) for state in pick(states, STATES_PER_ROUND, rng))
            and self.nest(world, states, recording, known, rng)
            and self.fail(world, states, rng)
        )

    def nest(
        self, world: Any, states: list[CrashState], recording: Recording, known: Known, rng: random.Random
    ) -> bool:
        for _ in range(NESTED_PER_ROUND):
            state = rng.choice(states)
            models = powered_off(state)
            if rng.random() < 0.5:
                state, models = killed(recording, rng.randrange(len(recording.ops) + 1))
            inner = list(nested(world, state, models, rng))
            if not all(self.check(after, cut, known, recording) for after, cut in pick(inner, NESTED_EACH, rng)):
                return False
        return True

    def fail(self, world: Any, states: list[CrashState], rng: random.Random) -> bool:
        """A disk that fails at one call of a recovery and the sync after it, then a power cut."""
        for _ in range(FAULTS_PER_ROUND):
            state = rng.choice(states)
            after, models = world.after_crash(state.trees, state.promises), powered_off(state)
            host = rng.choice(sorted(after.disks))
            due, number = rng.randrange(1, 400), rng.choice([errno.EIO, errno.ENOSPC])

            def fault(call: int, _name: str, path: str, due: int = due, number: int = number) -> None:
                if call == due:
                    raise OSError(number, os.strerror(number), path)

            for name, disk in after.disks.items():
                disk.listener = models[name].apply
            after.disks[host].fault = fault
            with repeatable(after.depth):
                with suppress(ReplicaError, Violation):  # of one that stopped it is said that it broke its promise
                    after.recover()
                    after.next_sync()
                after.disks[host].fault = None
                with suppress(ReplicaError, Violation):
                    after.close()
            lost = {name: model.state((0,) * len(model.pending)) for name, model in models.items()}
            promises = replace(after.promises, receipts={})
            if not self.check(after, CrashState(due, host, (), lost, promises), Known(), None):
                return False
        return True

    def check(self, world: Any, state: CrashState, known: Known, recording: Recording | None) -> bool:
        self.states += 1
        broken = violates(world, state, known)
        if broken is None or (recording is None and any(words in broken for words in COMES_BACK)):
            return True
        step = recording.step_at(state.position - 1) if recording is not None else "after a failing disk"
        path = Path(f"explorer-{self.seed}-{self.rounds - 1}.state")
        kept = {name: value for name, value in vars(world).items() if name not in _NOT_KEPT}
        path.write_bytes(pickle.dumps((type(world), kept, state)))
        print(f"BROKEN in round {self.rounds - 1}, step {step!r}, {state}:\n  {broken}")
        print(f"reproduce it: python tools/explore.py --replay {path}")
        return False


def replay(path: Path) -> int:
    """Only for files of one's own: they are pickles."""
    kind, kept, state = pickle.loads(path.read_bytes())
    world = kind.__new__(kind)
    vars(world).update(kept, disks={}, noted=lambda _promises: None, _store=None, _receiver=None)
    try:
        examine(world, state.trees, state.promises)
    except Exception:
        logging.getLogger("explore").exception("broken: %s", state)
        return 1
    print("all is well: this state is recovered from")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=None, help="another one each time without it")
    parser.add_argument("--only", choices=["store", "machine"])
    parser.add_argument("--replay", type=Path)
    arguments = parser.parse_args()
    logging.getLogger("replica").setLevel(logging.CRITICAL)
    if arguments.replay:
        return replay(arguments.replay)
    seed = arguments.seed if arguments.seed is not None else int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}", flush=True)
    explorer = Explorer(seed, arguments.only)
    start = told = time.monotonic()
    well = True
    while well and time.monotonic() < start + arguments.seconds:
        well = explorer.round()
        now = time.monotonic()
        if now > told + 60:
            told = now
            rate = 60 * explorer.states / (now - start)
            print(f"{explorer.rounds} histories, {explorer.states} states, {rate:.0f} per minute", flush=True)
    rate = 60 * explorer.states / (time.monotonic() - start)
    print(f"{explorer.states} states in {explorer.rounds} histories, {rate:.0f} per minute")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
