"""A scripted life of one replica's store, recorded change by change, and what must be true after a power cut in it.

    history = record()                       # a log of changes, with notes of what was promised when
    for state, promise in history.states():  # every disk a power cut may leave
        check(state, promise)

A *promise* is what the primary was told by then, and what it holds: enough to say what must be there afterwards,
and to go on. A step is a function of `Life`; a new one is a line in `STEPS`.

After a power cut the store is opened by the real code, and then

1. it opens without help and is not stopped;
2. its head is the newest state that was acknowledged, or the one whose commit was under way;
3. every point that was promised and not under way to be dropped is listed, and every point that is listed restores
   byte for byte, and no other point does;
4. the next delta is taken, and its point is right;
5. after that nothing lies in the directory but what is accounted for.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from replica.durable import FileSystem
from replica.errors import ReplicaError
from replica.model import DeltaId, Disk
from replica.store import Layout, Policy, ReplicaReader, ReplicaStore
from replica.store.marks import Marks
from replica.store.points import PointIndex
from tests.crash.disk import ROOT, Kernel, Op, crash_states, replay
from tests.crash.disk import Disk as PowerDisk
from tests.store.small_primary import Made, SmallPrimary

STORAGE = Path(ROOT) / "storage"
GRAIN, LEAF = 512, 2048


class TinyPrimary(SmallPrimary):
    """Disks of a few leaves, so that a state costs milliseconds."""

    def disk(self, name: str) -> Disk:
        return Disk(self.ids[name], name, len(self.content[name]), grain_bytes=GRAIN, leaf_bytes=LEAF)

    def change(self, name: str, grains: int = 3) -> None:
        data = self.content[name]
        for _ in range(grains):
            at = self.random.randrange(max(1, len(data) // GRAIN)) * GRAIN
            size = min(GRAIN, len(data) - at)
            data[at : at + size] = bytes(size) if self.random.random() < 0.25 else self.random.randbytes(size)

    def clone(self) -> TinyPrimary:
        other = TinyPrimary({})
        other.random = random.Random(self.random.random())
        for name in ("replica_id", "key", "epoch", "state"):
            setattr(other, name, getattr(self, name))
        other.ids = dict(self.ids)
        other.content = {name: bytearray(data) for name, data in self.content.items()}
        other.sent, other.copies = dict(self.sent), dict(self.copies)
        return other


@dataclass(frozen=True)
class Promise:
    """What holds at a place of the log.

    `contents`: delta id -> content per disk, of every point that may be listed; `must`: those that have to be.
    `pending`: a delta whose commit may have been asked for; None if none was.
    """

    primary: TinyPrimary
    contents: dict[DeltaId, dict[str, bytes]]
    must: frozenset[DeltaId]
    enrolled: bool = True
    pending: Made | None = None
    pending_content: dict[str, bytes] = field(default_factory=dict)


class Life:
    """One life of a store on a kernel of its own; steps change it and note what they promise."""

    def __init__(self, seed: int = 1, sizes: dict[str, int] | None = None) -> None:
        self.kernel = Kernel()
        self.kernel.mkdir(ROOT + "/storage")
        for path in (ROOT, ROOT + "/storage"):
            fd = self.kernel.open(path, 0)
            self.kernel.fsync(fd)
            self.kernel.close(fd)
        self.start = self.kernel.disk.copy()
        self.kernel.log.clear()
        self.fs = FileSystem(self.kernel)
        self.primary = TinyPrimary(sizes or {"os": 9 * LEAF + 700, "data": 4 * LEAF}, seed)
        self.promise = Promise(self.primary.clone(), {}, frozenset(), enrolled=False)
        self._note(self.promise)
        self.store: ReplicaStore = self.primary.enrol(self.fs, STORAGE)
        self._note(replace(self.promise, enrolled=True))

    def _note(self, promise: Promise) -> None:
        self.promise = promise
        self.kernel.note(promise)

    @property
    def directory(self) -> Path:
        return STORAGE / str(self.primary.replica_id)

    # --- steps ---

    def commit(self, *, partial: bool = False) -> None:
        """Ship what changed, and have it committed."""
        made = self.primary.make(partial=partial)
        before = self.promise
        content = {name: bytes(data) for name, data in self.primary.content.items()}
        contents = dict(before.contents)
        if made.result.is_point:
            contents[made.delta_id] = content
        waiting = replace(before, contents=contents, pending=made, pending_content=content)
        waiting = replace(waiting, primary=self.primary.clone())
        self._note(waiting)
        self.primary.send(self.store, made)
        assert self.store.commit(made.delta_id) == made.result
        self.primary.acknowledge(made)
        must = before.must | ({made.delta_id} if made.result.is_point else set())
        self._note(Promise(self.primary.clone(), contents, frozenset(must)))

    def give_up(self) -> None:
        """Begin a delta, send a part of it, and begin another one later."""
        made = self.primary.make()
        self.store.begin(made.delta_id, made.base.delta_id, self.primary.epoch, made.header)
        for number, offset, digest, blob in made.segments[:1]:
            self.store.receive(made.delta_id, number, offset, digest, blob)

    def rotate(self, keep_last: int) -> None:
        """Drop and compose away; from here on the points that go are not promised any more."""
        reader = ReplicaReader(self.fs, self.directory)
        listed = [info.state for info in reader.points()]
        locked = {lock.delta_id for lock in Marks(self.fs, reader.layout).load().locks}
        kept = {state.delta_id for state in listed[-keep_last:]} | locked
        self._note(replace(self.promise, must=self.promise.must & kept))
        policy = Policy(keep_last=keep_last, hourly=0)
        self.store.rotate(policy, at_once=True)
        self.store.thin(policy, at_once=True)
        listed = [info.state for info in reader.points()]
        assert {state.delta_id for state in listed} == kept & {state.delta_id for state in listed}
        self._note(replace(self.promise, contents={d: c for d, c in self.promise.contents.items() if d in kept}))

    def lock(self) -> None:
        """Lock the oldest point."""
        reader = ReplicaReader(self.fs, self.directory)
        state = reader.points()[0].state
        Marks(self.fs, reader.layout).lock(state.delta_id, state.point, time.time_ns() + 10**18)

    def reopen(self) -> None:
        self.store.close()
        self.store = ReplicaStore.open(self.fs, self.directory)

    def resize(self, name: str, size_bytes: int) -> None:
        data = self.primary.content[name]
        self.primary.content[name] = data[:size_bytes] + bytes(max(0, size_bytes - len(data)))
        self.primary.change(name, 2)

    def add(self, name: str, size_bytes: int) -> None:
        from replica.model import DiskId, random_id

        self.primary.ids[name] = DiskId(random_id())
        self.primary.content[name] = bytearray(self.primary.random.randbytes(size_bytes))

    def remove(self, name: str) -> None:
        del self.primary.content[name]


Step = Callable[[Life], None]


def _changed(*names: str, grains: int = 3) -> Step:
    def step(life: Life) -> None:
        for name in names:
            life.primary.change(name, grains)
        life.commit()

    return step


def _resized(name: str, size_bytes: int) -> Step:
    def step(life: Life) -> None:
        life.resize(name, size_bytes)
        life.commit()

    return step


def _part(life: Life) -> None:
    life.primary.change("os", 4)
    life.commit(partial=True)


def _added(life: Life) -> None:
    life.add("extra", 3 * LEAF + 100)
    life.commit()


def _removed(life: Life) -> None:
    life.remove("extra")
    life.commit()


def _zeroed(life: Life) -> None:
    life.primary.content["data"][:] = bytes(len(life.primary.content["data"]))
    life.commit()


STEPS: tuple[tuple[str, Step], ...] = (
    ("part of a first copy", _part),
    ("first copy", _changed("os", "data", grains=6)),
    ("delta", _changed("os")),
    ("unfinished delta", Life.give_up),
    ("delta after it", _changed("data")),
    ("restart", Life.reopen),
    ("rotation", lambda life: life.rotate(2)),
    ("lock", Life.lock),
    ("zeroing", _zeroed),
    ("grow", _resized("data", 6 * LEAF + 300)),
    ("shrink", _resized("os", 5 * LEAF + 200)),
    ("part", _part),
    ("disk added", _added),
    ("rotation again", lambda life: life.rotate(3)),
    ("disk removed", _removed),
    ("thinning", lambda life: life.rotate(1)),
    ("unchanged", lambda life: life.commit()),
)


@dataclass(frozen=True)
class History:
    """A recorded life: where it began, every change, and where each step begins in the log."""

    start: PowerDisk
    log: list[Op]
    steps: list[tuple[str, int]]

    def states(
        self, *, limit: int = 64, seed: int = 1, without: Callable[[Op], bool] = lambda _op: False
    ) -> Iterator[tuple[PowerDisk, Promise, str]]:
        """Every different disk that a power cut may leave, with what must hold, and at which step and change.

        `without`: barriers that do nothing.
        """
        seen: set[tuple[int, int]] = set()
        chance = random.Random(seed)
        promise: Promise | None = None
        names = {at: name for name, at in self.steps}
        name = "enrolment"
        for index, (op, disk) in enumerate(replay(self.start, self.log, without)):
            name = names.get(index, name)
            if op.kind == "note" and isinstance(op.args[0], Promise):
                promise = op.args[0]
            if promise is None or op.kind == "make":
                continue
            for state in crash_states(disk, disk.pending(), chance, limit):
                key = (state.digest(), id(promise))
                if key not in seen:
                    seen.add(key)
                    yield state, promise, f"{name}, change {index} ({op.kind} {op.label})"


def record(steps: tuple[tuple[str, Step], ...] = STEPS, seed: int = 1) -> History:
    life = Life(seed)
    begins = []
    for name, step in steps:
        begins.append((name, len(life.kernel.log)))
        step(life)
    life.store.close()
    return History(life.start, life.kernel.log, begins)


class ViolationError(AssertionError):
    """A promise that was broken by a power cut."""


def check(state: PowerDisk, promise: Promise, *, seen: set[int] | None = None) -> None:
    """Recover, and hold the store to the promise. ViolationError. `seen`: recovered states that were checked before."""
    kernel = Kernel(state.copy(), labels=False)
    fs = FileSystem(kernel)
    directory = STORAGE / str(promise.primary.replica_id)
    try:
        if not fs.exists(directory / "replica.toml"):
            _must(not promise.enrolled, "an enrolled replica is gone")
            return
        store = ReplicaStore.open(fs, directory)
        _must(store.stopped is None, f"it is stopped: {store.stopped}")
        if store.received is not None:
            store.commit(store.received)
        parts = (
            kernel.disk.digest(f"{directory}/{name}") for name in ("head", "points", "incoming", "receipts", "keys")
        )
        key = hash((*parts, store.head.delta_id, store.epoch, id(promise)))
        if seen is not None:
            if key in seen:
                store.close()
                return
            seen.add(key)
        primary = _agreed(store, promise)
        check_points(fs, directory, promise.contents, promise.must)
        made = primary.sync(store)
        contents = {**promise.contents, made.delta_id: primary.sent}
        check_points(fs, directory, contents, promise.must | {made.delta_id})
        everything = Policy(keep_last=1000, hourly=0)
        store.rotate(everything)
        store.thin(everything, at_once=True)
        check_points(fs, directory, contents, (promise.must | {made.delta_id}) - _unchanged(contents))
        store.close()
        check_no_leaks(fs, directory)
        left = list(kernel.open_paths)
        _must(not left, f"files are open that nobody needs: {left}")
    except ReplicaError as error:
        raise ViolationError(f"{type(error).__name__}: {error}") from error


def _must(condition: bool, what: str) -> None:
    if not condition:
        raise ViolationError(what)


def _agreed(store: ReplicaStore, promise: Promise) -> TinyPrimary:
    """The primary, who finds out which of its states the head is."""
    primary = promise.primary.clone()
    if promise.pending is not None and store.head == promise.pending.result:
        primary.state, primary.sent = promise.pending.result, dict(promise.pending_content)
    _must(
        store.head == primary.state, f"the head is {store.head.delta_id}, not the acknowledged {primary.state.delta_id}"
    )
    for name in list(primary.content):
        primary.change(name, 2)
    return primary


def _unchanged(contents: dict[DeltaId, dict[str, bytes]]) -> set[DeltaId]:
    """Points that are as another one: of a run of them not all stay."""
    return {one for one, data in contents.items() if any(data == other for d, other in contents.items() if d != one)}


def check_points(
    fs: FileSystem, directory: Path, contents: dict[DeltaId, dict[str, bytes]], must: frozenset[DeltaId] | set[DeltaId]
) -> None:
    """Everything that must be listed is, and everything listed restores exactly."""
    reader = ReplicaReader(fs, directory)
    infos = reader.points()
    listed = {info.state.delta_id for info in infos}
    _must(not reader.damaged, f"damaged inverses: {reader.damaged}")
    _must(must <= listed, f"points are gone: {must - listed}")
    for info in infos:
        _must(info.state.delta_id in contents, f"point {info.state.point} ({info.state.delta_id}) was never promised")
        _must(info.restorable, f"point {info.state.point} is listed as lost")
        with reader.open_point(info.state.point) as point:
            expected = contents[info.state.delta_id]
            _must({d.name for d in point.disks} == expected.keys(), f"point {info.state.point} has other disks")
            for disk in point.disks:
                buffer = np.zeros(disk.size_bytes, np.uint8)
                point.read_into(disk.id, 0, buffer.data)
                _must(buffer.tobytes() == expected[disk.name], f"point {info.state.point}, disk {disk.name!r} differs")


def check_no_leaks(fs: FileSystem, directory: Path) -> None:
    """Only what is accounted for lies in a replica's directory."""
    layout = Layout(directory)
    reader = ReplicaReader(fs, directory)
    state = reader.state
    index = PointIndex(fs, layout, reader._keyring)
    chain = index.chain()
    _must(not chain.spare, f"inverses that are spare: {[link.path.name for link in chain.spare]}")
    _must(not chain.strays, f"inverses that nothing reaches: {[link.path.name for link in chain.strays]}")
    head = state.head
    expected = {
        "head": {
            name
            for entry in head.disks
            for name in (f"{entry.disk.id}.img", f"{entry.disk.id}.tree", f"{entry.disk.name}.img")
        },
        "incoming": set(),
        "points": {link.path.name for link in chain.links},
    }
    for name, wanted in expected.items():
        found = set(fs.list_names(directory / name))
        _must(found == wanted, f"{name}/ has {sorted(found ^ wanted)} too many or too few")
    for name in ("", "head", "points", "incoming", "keys", "marks", "pins", "receipts"):
        for found_name in fs.list_names(directory / name):
            _must(not found_name.startswith("."), f"left over: {name}/{found_name}")
