"""What a crash is tried on: a replica fed by hand (`StoreWorld`), and a sender with its receiver (`MachineWorld`).

A world lives on memory disks, does steps of a history, and after a crash *recovers*: the real code opens what is left,
and everything that was promised is compared with naive copies (`recover`). Its contents are so small that this
takes a few milliseconds.

    promises   what must be there whatever happens: every acknowledged point that no rotation was about to remove, …
    possible   contents of points that may be there: asked for, but not acknowledged
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from replica.delta import DataKey
from replica.durable import FileSystem
from replica.errors import BaseMismatchError, ConflictError, UnknownMachineError
from replica.model import DeltaId, DiskId, ReplicaId
from replica.plan import Mode
from replica.primary.cycle import SyncResult, sync_machine
from replica.primary.spec import PART_BYTES, DiskSpec, MachineSpec, SenderSpec
from replica.receipt import SignedReceipt
from replica.receiver.stores import FileStores
from replica.store import Identity, Policy, ReplicaReader, ReplicaStore, read_files, replica_directories
from replica.store.layout import Layout
from replica.store.marks import Marks
from replica.store.points import PointIndex
from replica.transport.tls import TlsFiles
from replica.transport.wire import (
    MAX_GRAIN_BYTES,
    Adopt,
    Begin,
    Begun,
    Enrol,
    GrainQuery,
    ReplicaInfo,
    StillDamaged,
    TreeQuery,
    to_problem,
)  # fmt: skip
from tests.crash.memory_disk import Content, MemoryDisk, Tree
from tests.store.small_primary import Made, SmallPrimary

Contents = dict[str, bytes]
Trees = dict[str, Tree]
"""One disk per host."""

STORAGE = Path("/nowhere/replicas")
PRIMARY = Path("/nowhere/primary")
TLS = TlsFiles(Path("ca"), Path("cert"), Path("key"))


class Violation(AssertionError):
    """A promise was broken."""


def require(condition: object, what: str) -> None:
    if not condition:
        raise Violation(what)


@dataclass(frozen=True)
class Promises:
    """What the engine has promised: contents of points by number, points that are locked, that no disk has to be read
    and compared as a whole again (`tracked`), the number of a point whose delta arrived whole (`received`), and
    receipts that were handed out."""

    points: dict[int, Contents] = field(default_factory=dict)
    locks: frozenset[int] = frozenset()
    tracked: bool = False
    received: int = 0
    receipts: dict[int, bytes] = field(default_factory=dict)

    @property
    def newest(self) -> int:
        return max(self.points, default=0)

    @property
    def key(self) -> tuple[object, ...]:
        return (*sorted(self.points), "locks", *sorted(self.locks), self.tracked, self.received, *sorted(self.receipts))

    def both(self, other: Promises) -> Promises:
        """What is in this one and in the other."""
        points = {number: contents for number, contents in self.points.items() if number in other.points}
        received = min(self.received, other.received)
        return Promises(points, self.locks & other.locks, self.tracked and other.tracked, received, other.receipts)


@dataclass
class World:
    """Hosts with their disks, what was promised, and what is possible."""

    disks: dict[str, MemoryDisk]
    promises: Promises = field(default_factory=Promises)
    possible: dict[int, list[Contents]] = field(default_factory=dict)
    rng: random.Random = field(default_factory=lambda: random.Random(1))
    depth: int = 0
    """How many crashes it has been through."""
    noted: Callable[[Promises], None] = lambda _promises: None

    def promise(self, **changes: Any) -> None:
        """From now on this is promised."""
        self.promises = replace(self.promises, **changes)
        self.noted(self.promises)

    def receiver_fs(self) -> FileSystem:
        return FileSystem(self.disks["receiver"])

    def directory(self) -> Path | None:
        found = replica_directories(self.receiver_fs(), STORAGE)
        require(len(found) <= 1, f"there are {len(found)} replicas")
        return found[0] if found else None

    def acknowledged(self, number: int, contents: Contents, receipt: SignedReceipt | None) -> None:
        receipts = {**self.promises.receipts, number: receipt.data} if receipt else self.promises.receipts
        self.promise(points={**self.promises.points, number: contents}, receipts=receipts)

    def resumable(self) -> bool:
        """Whether a delta is arriving that its sender will go on with."""
        return False

    # --- what must hold ---

    def check_points(self, *, only: set[int] | None = None) -> None:
        """Every promised point is listed, and every listed point is exactly what it was."""
        directory = self.directory()
        if directory is None:
            require(not self.promises.points, "the replica is gone")
            return
        reader = ReplicaReader(self.receiver_fs(), directory)
        locked = {mark.point for mark in Marks(self.receiver_fs(), reader.layout).load().locks}
        require(locked >= self.promises.locks, f"locks are gone: {self.promises.locks - locked}")
        listed = {info.state.point: info for info in reader.points()}
        for number in self.promises.points:
            require(number in listed, f"point {number} was acknowledged and is not listed ({sorted(listed)} are)")
        for number in self.promises.receipts.keys() & self.promises.points.keys():
            same = self.promises.receipts[number] == reader.receipt(number)
            require(same, f"point {number} has another receipt than was handed out")
        for number, info in listed.items():
            require(info.restorable, f"point {number} is listed as not restorable")
            if only is None or number in only:
                self._check_content(reader, number)

    def _check_content(self, reader: ReplicaReader, number: int) -> None:
        with reader.open_point(number) as opened:
            found: Contents = {}
            for state in opened.state.machine_disks:
                buffer = np.empty(state.disk.size_bytes, np.uint8)
                if state.disk.size_bytes:
                    opened.read_into(state.disk.id, 0, buffer.data)
                found[state.disk.name] = buffer.tobytes()
            found.update({f"/{path}": data for path, data in read_files(opened).items()})
        if number in self.promises.points:
            require(
                found == self.promises.points[number], f"point {number} was acknowledged and restores to something else"
            )
        else:
            require(found in self.possible.get(number, []), f"point {number} restores to what it never was")

    def check_leaks(self) -> None:
        """Nothing lies in the replica's directory that is not accounted for."""
        directory = self.directory()
        if directory is None:
            return
        fs, layout = self.receiver_fs(), Layout(directory)
        reader = ReplicaReader(fs, directory)
        state = reader.state
        require(state.applying is None, "a commit is still marked as going on")
        chain = PointIndex(fs, layout, reader._keyring).chain()
        expected = {
            "": {
                "replica.toml",
                "identity.copy",
                "state",
                "state.copy",
                "lock",
                "head",
                "incoming",
                "points",
                "pins",
                "keys",
            },
            "head": {f"{d.disk.id}.{kind}" for d in state.head.disks for kind in ("img", "tree")}
            | {f"{d.disk.name}.img" for d in state.head.disks},
            "incoming": set(),
            "points": {link.path.name for link in (*chain.links, *chain.spare)},
            "marks": {"retention"},
        }
        allowed = {
            "": {"head.lock", "commit.lock", "pins.lock", "marks.lock", "damage.lock", "marks", "receipts"},
            "marks": {"damage"},
        }
        for name, names in expected.items():
            present = set(fs.list_names(directory / name)) if name else set(fs.list_names(directory))
            extra = present - names - allowed.get(name, set())
            require(not extra, f"left over in {name or 'the directory'}: {sorted(extra)}")
            require(names <= present, f"missing in {name or 'the directory'}: {sorted(names - present)}")
        require(not [n for n in fs.list_names(directory / "keys") if not n.endswith(".key")], "left over in keys/")
        require(not chain.strays, f"inverses that lead nowhere: {[link.path.name for link in chain.strays]}")


# --- a replica fed by hand ---


class StoreWorld(World):
    """One replica; deltas of every kind are made by `SmallPrimary`, which keeps a copy of every content."""

    def __init__(self, sizes: dict[str, int], head_format: str = "raw", seed: int = 1) -> None:
        super().__init__({"receiver": MemoryDisk()}, rng=random.Random(seed))
        self.primary = SmallPrimary(sizes, seed)
        self.head_format = head_format
        self.by_state: dict[DeltaId, Contents] = {self.primary.state.delta_id: {}}
        self.made: dict[DeltaId, Made] = {}
        self._store: ReplicaStore | None = None
        self.receiver_fs().make_directory(STORAGE)

    def after_crash(self, trees: Trees, promises: Promises) -> StoreWorld:
        other = copy.copy(self)
        other.depth += 1
        other.disks = {host: MemoryDisk(tree) for host, tree in trees.items()}
        other.promises, other.possible = promises, {n: list(c) for n, c in self.possible.items()}
        other.by_state, other.made = dict(self.by_state), dict(self.made)
        other.primary = copy.copy(self.primary)
        other._store = None
        return other

    @property
    def store(self) -> ReplicaStore:
        if self._store is None:
            directory = self.directory()
            if directory is None:
                self._store = self.primary.enrol(self.receiver_fs(), STORAGE, self.head_format)
            else:
                self._store = ReplicaStore.open(self.receiver_fs(), directory)
            if self._store.stopped is not None:
                raise Violation(f"the replica did not recover: {self._store.stopped}") from self._store.stopped
        return self._store

    def close(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None

    def recover(self) -> None:
        """What a receiver does at its start."""
        commit_received(self.store)
        head = self.store.head
        require(head.delta_id in self.by_state, "the head is a state that never was")
        for number in (*self.promises.points, self.promises.received):
            require(head.point >= number, f"point {number} was acknowledged and the head is at {head.point}")

    def sync(self, change: Callable[[SmallPrimary], None] | None = None, *, partial: bool = False) -> None:
        """Make the next state on whatever the head is, and see it committed."""
        store, primary = self.store, self.primary
        primary.state = store.head
        primary.sent = self.by_state[store.head.delta_id]
        if change is not None:
            change(primary)
        made = primary.make(partial=partial)
        contents = {name: bytes(data) for name, data in primary.content.items()}
        self.by_state[made.delta_id] = contents
        if not partial:
            self.possible.setdefault(made.result.point, []).append(contents)
        self.made[made.delta_id] = made
        primary.send(store, made)
        if not partial:
            self.promise(received=made.result.point)
        store.commit(made.delta_id)
        if not partial:
            self.acknowledged(made.result.point, contents, store.receipt)

    def _arriving(self) -> Made | None:
        made = self.made.get(self.store.receiving) if self.store.receiving else None
        return made if made is not None and made.base == self.store.head else None

    def resumable(self) -> bool:
        return self._arriving() is not None

    def _resume(self, made: Made) -> None:
        """The sender is alive, begins its delta again and sends what is not there."""
        store = self.store
        there = store.begin(made.delta_id, made.base.delta_id, self.primary.epoch, made.header)
        for number, offset, digest, blob in made.segments:
            if not any(first <= number < stop for first, stop in there):
                store.receive(made.delta_id, number, offset, digest, blob)
        store.finish(made.delta_id, made.tail, made.tail_offset)
        store.commit(made.delta_id)
        if made.result.is_point:
            self.acknowledged(made.result.point, self.by_state[made.delta_id], store.receipt)

    def next_sync(self) -> None:
        """The first sync after a crash: the one that was cut, if its sender lives, and one of the head's content, a
        little changed."""
        made = self._arriving()
        if made is not None:
            self._resume(made)
        head = self.by_state[self.store.head.delta_id]
        self.primary.content = {name: bytearray(data) for name, data in head.items()} or {
            name: bytearray(self.rng.randbytes(len(data))) for name, data in self.primary.content.items()
        }
        name = min(self.primary.content)
        data = self.primary.content[name]
        if data:
            data[len(data) // 3] ^= 0x55
        self.sync()
        require(self.store.receipt is not None, f"no receipt: {self.store.receipts.trouble}")
        self.store.rotate(Policy(keep_last=1000))


def commit_received(store: ReplicaStore) -> None:
    """What arrived whole before a restart; one that is meant for another head is refused and discarded."""
    if store.received is not None:
        with suppress(BaseMismatchError):
            store.commit(store.received)


# --- a sender and its receiver ---


class DirectReceiver:
    """`transport.api.Receiver` over the store itself: no threads, no slots, no waiting."""

    bytes_sent = 0

    def __init__(self, world: MachineWorld) -> None:
        self._world = world
        self._stores: dict[ReplicaId, ReplicaStore] = {}
        for directory in replica_directories(world.receiver_fs(), STORAGE):
            self._keep(ReplicaStore.open(world.receiver_fs(), directory))

    def _keep(self, store: ReplicaStore) -> None:
        self._stores[store.identity.replica_id] = store
        if store.stopped is not None:
            raise Violation(f"the replica did not recover: {store.stopped}") from store.stopped
        commit_received(store)

    def store(self, replica_id: ReplicaId) -> ReplicaStore:
        if replica_id not in self._stores:
            raise UnknownMachineError(f"there is no replica {replica_id}")
        return self._stores[replica_id]

    def replicas(self, machine: str = "") -> list[ReplicaInfo]:
        return [self.replica(replica_id) for replica_id in self._stores]

    def replica(self, replica_id: ReplicaId) -> ReplicaInfo:
        store = self.store(replica_id)
        who, stopped, signed = store.identity, store.stopped, store.receipt
        return ReplicaInfo(
            replica_id, who.machine, who.owner, store.epoch, store.head, store.applying, store.receiving,
            stopped=to_problem(stopped) if stopped else None,
            damaged=store.damaged,
            receipt=signed.data if signed else None,
        )  # fmt: skip

    def enrol(self, replica_id: ReplicaId, enrol: Enrol) -> ReplicaInfo:
        key = DataKey(enrol.key_id, enrol.key)
        if replica_id not in self._stores:
            who = Identity(replica_id, enrol.machine, "hv-1", "prod", "raw", 0)
            self._keep(ReplicaStore.create(self._world.receiver_fs(), STORAGE, who, key, enrol.epoch))
        elif not self.store(replica_id).has_key(key):
            raise ConflictError("another key")
        return self.replica(replica_id)

    def adopt(self, replica_id: ReplicaId, adopt: Adopt) -> ReplicaInfo:
        self.store(replica_id).adopt(adopt.expected, adopt.holder)
        return self.replica(replica_id)

    def begin(self, replica_id: ReplicaId, delta_id: DeltaId, begin: Begin) -> Begun:
        return Begun(self.store(replica_id).begin(delta_id, begin.base, begin.epoch, begin.header))

    def put_segment(self, replica_id: ReplicaId, delta_id: DeltaId, number: int, offset: int, *rest: Any) -> None:
        digest, blob = rest
        self.bytes_sent += len(blob)
        self.store(replica_id).receive(delta_id, number, offset, digest, bytes(blob))

    def commit(self, replica_id: ReplicaId, delta_id: DeltaId, tail: bytes, offset: int, wait_seconds: float) -> Any:
        store = self.store(replica_id)
        if store.head.delta_id != delta_id:
            store.finish(delta_id, tail, offset)
        store.commit(delta_id)
        return self.replica(replica_id)

    def discard(self, replica_id: ReplicaId, delta_id: DeltaId) -> None:
        self.store(replica_id).discard(delta_id)

    def repair(self, replica_id: ReplicaId, disk_id: DiskId, first: int, *rest: Any) -> StillDamaged:
        epoch, _digest, content = rest
        return StillDamaged(self.store(replica_id).repair(disk_id, first, epoch, memoryview(content)))

    def nodes(self, replica_id: ReplicaId, disk_id: DiskId, query: TreeQuery) -> bytes:
        directory = self.store(replica_id).directory
        return FileStores(self._world.receiver_fs()).nodes(directory, query.base, disk_id, query.level, query.ranges)

    def grains(self, replica_id: ReplicaId, disk_id: DiskId, query: GrainQuery) -> bytes:
        directory, stores = self.store(replica_id).directory, FileStores(self._world.receiver_fs())
        return stores.grains(directory, query.base, disk_id, query.secret, query.ranges, MAX_GRAIN_BYTES)

    def abort(self) -> None:
        """Nothing hangs."""

    def close(self) -> None:
        for store in self._stores.values():
            store.close()


class MachineWorld(World):
    """A machine at its primary, and the replica; the images lie on the sender's disk but are not the engine's."""

    def __init__(self, sizes: dict[str, int], seed: int = 1, part_bytes: int = PART_BYTES) -> None:
        super().__init__({"receiver": MemoryDisk(), "sender": MemoryDisk()}, rng=random.Random(seed))
        self.content = {name: bytes(size) for name, size in sizes.items()}
        self.files: dict[str, bytes] = {}
        """Machine files: path -> content."""
        self._receiver: DirectReceiver | None = None
        self.receiver_fs().make_directory(STORAGE)
        self.sender_fs().make_directory(PRIMARY)
        self.machine = MachineSpec("web-1", "https://dr-1", (_disk_spec(min(sizes)),))
        self.spec = SenderSpec("hv-1", PRIMARY / "state", PRIMARY / "keys", TLS, (), part_bytes=part_bytes)
        self.show()

    def after_crash(self, trees: Trees, promises: Promises) -> MachineWorld:
        other = copy.copy(self)
        other.depth += 1
        other.disks = {host: MemoryDisk(tree) for host, tree in trees.items()}
        other.promises, other.possible = promises, {n: list(c) for n, c in self.possible.items()}
        other._receiver = None
        fs = other.sender_fs()
        there = [name for name in self.content if fs.exists(_disk_spec(name).image)]
        other.content = {name: other.image(name) for name in there}
        other.files = {path: fs.read_bytes(Path(path), 1 << 20) for path in self.files if fs.exists(Path(path))}
        other.show()
        return other

    def sender_fs(self) -> FileSystem:
        return FileSystem(self.disks["sender"])

    def image(self, name: str) -> bytes:
        path = next(disk.image for disk in self.machine.disks if disk.name == name)
        fs = self.sender_fs()
        with fs.open(path) as file:
            return file.read(0, file.size())

    def show(self) -> None:
        """The guest's content appears in the images; the machine is what has them."""
        disks = tuple(_disk_spec(name) for name in self.content)
        self.machine = replace(self.machine, disks=disks, files=tuple(Path(path) for path in self.files))
        self.spec = replace(self.spec, machines=(self.machine,))
        for path, data in self.files.items():
            self.disks["sender"].guest_write(Path(path), Content(len(data), _pages(data)))
        for disk in self.machine.disks:
            data = self.content[disk.name]
            self.disks["sender"].guest_write(disk.image, Content(len(data), _pages(data)))

    def write(self, name: str, offset: int, data: bytes) -> None:
        old = self.content[name]
        self.content[name] = old[:offset] + data + old[offset + len(data) :]

    @property
    def receiver(self) -> DirectReceiver:
        if self._receiver is None:
            self._receiver = DirectReceiver(self)
        return self._receiver

    @property
    def store(self) -> ReplicaStore:
        (store,) = self.receiver._stores.values()
        return store

    def close(self) -> None:
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None

    def recover(self) -> None:
        assert self.receiver
        for number in self.promises.points:
            require(self.store.head.point >= number, f"point {number} was acknowledged and is not the head's past")

    def sync(self, **options: Any) -> SyncResult:
        self.show()
        contents = {**self.content, **self.files}
        following = self.store.head.point + 1 if self.receiver._stores else 1
        for number in (following, following + 1):  # an earlier delta may turn out to be committed
            self.possible.setdefault(number, []).append(contents)
        options.setdefault("retry_seconds", 0)
        result = sync_machine(self.sender_fs(), self.spec, self.machine, self.receiver, **options)
        self.acknowledged(result.point, contents, self.store.receipt)
        self.promise(tracked=True)
        return result

    def next_sync(self) -> None:
        name = self.machine.disks[0].name
        self.write(name, len(self.content[name]) // 3, self.rng.randbytes(16))
        tracked = self.promises.tracked
        result = self.sync()
        if tracked:
            self._check_thrift(result)
        require(result.point == self.promises.newest, "the next sync made another point")
        require(
            not tracked or result.mode is Mode.INCREMENTAL, f"the trackers are lost: the next sync is {result.mode}"
        )
        require(self.store.receipt is not None, f"no receipt: {self.store.receipts.trouble}")
        self.store.rotate(Policy(keep_last=1000))

    def _check_thrift(self, result: SyncResult) -> None:
        """Nothing was shipped that the point before had already; of disks that only their guest changed."""
        before = [self.promises.points.get(result.point - 1), *self.possible.get(result.point - 1, [])]
        now = {**self.content, **self.files}
        sizes = {name: len(data) for name, data in now.items()}
        if any({name: len(data) for name, data in contents.items()} != sizes for contents in before if contents):
            return
        changed = {4096 * _different_grains(contents, self.content) for contents in before if contents is not None}
        in_part = self.spec.part_bytes != PART_BYTES  # what a part brought before the crash is not shipped again
        require(
            not changed or result.bytes_changed in changed or (in_part and result.bytes_changed < max(changed)),
            f"{result.bytes_changed} bytes were shipped where {sorted(changed)} differ",
        )

    def check_leaks(self) -> None:
        super().check_leaks()
        fs, directory = self.sender_fs(), self.spec.machine_directory("web-1")
        extra = set(fs.list_names(directory)) - {"lock", "machine.json", "status.json", "receipt", "disks"}
        require(not extra, f"left over at the sender: {sorted(extra)}")
        store = self.store
        ids = {str(entry.disk.id) for entry in store.head.disks}
        require(set(fs.list_names(directory / "disks")) <= ids, "left over in disks/ at the sender")
        for disk in fs.list_names(directory / "disks"):
            extra = set(fs.list_names(directory / "disks" / disk)) - {"secret", "digests", "windows", "leaves"}
            require(not extra, f"left over at the sender in disks/: {sorted(extra)}")


def _disk_spec(name: str) -> DiskSpec:
    return DiskSpec(name, PRIMARY / f"{name}.raw", "raw")


def _pages(data: bytes) -> dict[int, bytes]:
    pages = {n: data[n * 4096 : n * 4096 + 4096].ljust(4096, b"\0") for n in range(-(-len(data) // 4096))}
    return {n: page for n, page in pages.items() if any(page)}


def _different_grains(before: Contents, after: Contents) -> int:
    return sum(
        before[name][at : at + 4096] != data[at : at + 4096]
        for name, data in after.items()
        for at in range(0, len(data), 4096)
    )
