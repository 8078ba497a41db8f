"""Stores in memory with the site's interface, which block or fail on command: for tests of the site alone.

A delta here is its segments; its tail says which state it leads to.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Self
from uuid import UUID

import msgspec

from replica.delta import DataKey
from replica.errors import (
    BaseMismatchError,
    BusyError,
    ConflictError,
    FencedError,
    PointGoneError,
    ProtocolError,
    ReplicaError,
)
from replica.model import (
    Consistency,
    DamagedLeaves,
    DeltaId,
    Disk,
    DiskId,
    DiskState,
    Epoch,
    KeyId,
    ReplicaId,
    State,
    random_id,
)
from replica.receipt import SignedReceipt
from replica.store import Identity, PointInfo, Policy, Rotated
from replica.store.layout import StoreState
from replica.store.space import Space, SpaceLimits, judge

DISK = Disk(DiskId(UUID(int=7)), "os", 3 << 20)


def tail_of(state: State) -> bytes:
    return msgspec.json.encode(state)


def next_state(base: State, epoch: Epoch, delta_id: DeltaId | None = None, frozen_at_ns: int = 1) -> State:
    return State(
        base.replica_id,
        delta_id or DeltaId(random_id()),
        base.point + 1,
        epoch,
        frozen_at_ns,
        Consistency.CRASH,
        (DiskState(DISK, bytes(32)),),
    )


class MemoryStore:
    """One replica. `gate` holds commits up while it is cleared; `fail` is raised by the next commits."""

    def __init__(self, identity: Identity, key: DataKey, epoch: Epoch) -> None:
        self.identity = identity
        self.key = key
        self.epoch = epoch
        self.head = State.empty(identity.replica_id, epoch)
        self.applying: DeltaId | None = None
        self.receiving: DeltaId | None = None
        self.received: DeltaId | None = None
        self.stopped: ReplicaError | None = None
        self.receipt: SignedReceipt | None = None
        self.segments: dict[int, bytes] = {}
        self.states: list[State] = []
        self.tail = b""
        self.gate = threading.Event()
        self.gate.set()
        self.fail: BaseException | None = None
        self.commits = 0
        self.closed = False
        self.received_bytes = 0
        self.damaged: tuple[DamagedLeaves, ...] = ()

    def repair(self, disk_id: DiskId, first: int, epoch: Epoch, content: memoryview) -> tuple[DamagedLeaves, ...]:
        if epoch != self.epoch:
            raise FencedError("another sender took it over", hint="stop one")
        left, self.damaged = self.damaged, ()
        return left[1:]

    def has_key(self, key: DataKey) -> bool:
        return (key.id, key.secret) == (self.key.id, self.key.secret)

    def adopt(self, expected: Epoch, holder: UUID) -> Epoch:
        if self.epoch.holder != holder:
            if self.epoch != expected:
                raise ConflictError("epoch is another")
            self.epoch = Epoch(expected.counter + 1, holder)
            self.receiving = None
        return self.epoch

    def begin(self, delta_id: DeltaId, base: DeltaId, epoch: Epoch, header: bytes) -> list[tuple[int, int]]:
        if epoch != self.epoch:
            raise FencedError("another sender took it over", hint="stop one")
        if self.applying:
            raise BusyError("applying")
        if base != self.head.delta_id:
            raise BaseMismatchError("another base", head=self.head.delta_id)
        if self.receiving != delta_id:
            self.receiving, self.segments = delta_id, {}
        return [(n, n + 1) for n in sorted(self.segments)]

    def receive(self, delta_id: DeltaId, number: int, offset: int, digest: bytes, blob: memoryview) -> None:
        if delta_id != self.receiving:
            raise ProtocolError("not open")
        self.received_bytes += len(blob)
        self.segments[number] = bytes(blob[:64])

    def finish(self, delta_id: DeltaId, tail: bytes, tail_offset: int) -> None:
        if self.receiving != delta_id:
            raise ProtocolError("not open")
        self.tail = tail

    def commit(self, delta_id: DeltaId, *, reserve_bytes: int = 0) -> State:
        if self.head.delta_id == delta_id:
            return self.head
        self.commits += 1
        self.applying = delta_id
        assert self.gate.wait(60)
        self.applying = None
        if self.fail is not None:
            raise self.fail
        self.head = msgspec.json.decode(self.tail, type=State)
        self.states.append(self.head)
        self.receiving = None
        return self.head

    def discard(self, delta_id: DeltaId) -> None:
        if self.receiving == delta_id:
            self.receiving = None

    def rotate(self, policy: Policy, *, at_once: bool = False, shed_bytes: int = 0, brief: bool = False) -> Rotated:
        dropped, self.states = self.states[: -policy.keep_last], self.states[-policy.keep_last :]
        return Rotated(tuple(state.point for state in dropped))

    def thin(self, policy: Policy, *, at_once: bool = False, shed_bytes: int = 0) -> Rotated:
        return Rotated()

    def close(self) -> None:
        self.closed = True


class MemoryPoint(AbstractContextManager["MemoryPoint"]):
    """A point whose disk holds its point number in every byte. `fail_at` raises beyond an offset."""

    def __init__(self, state: State, stores: MemoryStores) -> None:
        self.state = state
        self._stores = stores
        stores.open_points += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stores.open_points -= 1

    def read_into(self, disk_id: DiskId, offset: int, buffer: bytearray) -> None:
        if self._stores.damage_at is not None and offset + len(buffer) > self._stores.damage_at:
            raise ReplicaError("damaged there")
        view = memoryview(buffer)
        for start in range(0, len(view), 4096):
            part = view[start : start + 4096]
            part[:] = content(self.state.point, offset + start, len(part))


def content(point: int, offset: int, length: int) -> bytes:
    """What a disk holds at a point: the point's number and the offset of each 8 bytes."""
    first, last = offset // 8, -(-(offset + length) // 8)
    data = b"".join((point << 40 | word).to_bytes(8, "little") for word in range(first, last))
    return data[offset - first * 8 :][:length]


class MemoryReader:
    def __init__(self, store: MemoryStore, stores: MemoryStores) -> None:
        self._store = store
        self._stores = stores

    @property
    def identity(self) -> Identity:
        return self._store.identity

    @property
    def state(self) -> StoreState:
        return StoreState(self._store.head, self._store.epoch, self._store.applying)

    @property
    def head(self) -> State:
        return self._store.head

    @property
    def receiving(self) -> DeltaId | None:
        return self._store.receiving

    @property
    def received(self) -> DeltaId | None:
        return self._store.received

    def points(self) -> list[PointInfo]:
        return [PointInfo(state, 100, True) for state in self._store.states]

    def open_point(self, number: int | None = None) -> MemoryPoint:
        for state in self._store.states:
            if state.point == number:
                return MemoryPoint(state, self._stores)
        raise PointGoneError(f"no point {number}")

    def receipt(self, number: int) -> bytes:
        raise PointGoneError(f"no receipt of point {number}")


class MemoryStores:
    """All replicas of a site. `broken[id]` is raised when that one is opened or read."""

    def __init__(self) -> None:
        self.all: dict[ReplicaId, MemoryStore] = {}
        self.broken: dict[ReplicaId, ReplicaError] = {}
        self.locked: dict[ReplicaId, ReplicaError] = {}
        self.open_points = 0
        self.damage_at: int | None = None
        self.free_bytes = 1 << 39

    def __iter__(self) -> Iterator[MemoryStore]:
        return iter(self.all.values())

    def directories(self, storage: Path) -> list[Path]:
        return [storage / str(replica_id) for replica_id in self.all]

    def create(self, storage: Path, identity: Identity, key: DataKey, epoch: Epoch) -> MemoryStore:
        store = self.all[identity.replica_id] = MemoryStore(identity, key, epoch)
        return store

    def open(self, directory: Path) -> MemoryStore:
        replica_id = ReplicaId(UUID(directory.name))
        for errors in (self.broken, self.locked):
            if replica_id in errors:
                raise errors[replica_id]
        return self.all[replica_id]

    def reader(self, directory: Path) -> MemoryReader:
        replica_id = ReplicaId(UUID(directory.name))
        if replica_id in self.broken:
            raise self.broken[replica_id]
        return MemoryReader(self.all[replica_id], self)

    def space(self, directory: Path, limits: SpaceLimits) -> Space:
        return judge(self.free_bytes, 1 << 40, limits)

    def tree(self, directory: Path, disk: Disk, level: int, first: int, count: int) -> bytes:
        if first + count > 256 ** (4 - level):
            raise ProtocolError("outside")
        return b"".join(bytes([level]) + index.to_bytes(31, "little") for index in range(first, first + count))

    def nodes(
        self, directory: Path, base: DeltaId, disk_id: DiskId, level: int, ranges: list[tuple[int, int]]
    ) -> bytes:
        return b"".join(self.tree(directory, DISK, level, first, count) for first, count in ranges)

    def grains(
        self,
        directory: Path,
        base: DeltaId,
        disk_id: DiskId,
        secret: bytes,
        ranges: list[tuple[int, int]],
        limit_bytes: int,
    ) -> bytes:
        return b"".join(bytes(DISK.grains_per_leaf * 8 * count) for _, count in ranges)


def new_key() -> DataKey:
    return DataKey(KeyId(random_id()), random_id().bytes * 2)
