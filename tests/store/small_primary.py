"""A primary in a few lines: contents in memory, deltas made by comparing every grain.

The oracle for store tests: it keeps a copy of the content at every point.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

import replica.store.commit as commits
from replica import _native
from replica.delta import DataKey, DeltaSealer, Packer, Segment, SegmentEntry, window_rows
from replica.durable import FileSystem
from replica.errors import ReplicaError
from replica.merkle import MemoryNodes, MerkleTree, leaf_digests
from replica.model import Consistency, DeltaId, Disk, DiskId, DiskState, Epoch, ReplicaId, State, random_id
from replica.store import Identity, ReplicaStore


@dataclass
class Made:
    """A sealed delta, ready to be sent."""

    delta_id: DeltaId
    base: State
    result: State
    header: bytes
    segments: list[tuple[int, int, bytes, bytes]] = field(default_factory=list)
    tail: bytes = b""
    tail_offset: int = 0


class SmallPrimary:
    def __init__(self, sizes: dict[str, int], seed: int = 1) -> None:
        self.random = random.Random(seed)
        self.replica_id = ReplicaId(random_id())
        self.key = DataKey.generate()
        self.epoch = Epoch(1, random_id())
        self.ids = {name: DiskId(random_id()) for name in sizes}
        self.content = {name: bytearray(size) for name, size in sizes.items()}
        self.state = State.empty(self.replica_id, self.epoch)
        self.sent: dict[str, bytes] = {}
        self.copies: dict[int, dict[str, bytes]] = {}
        self.made: list[Made] = []

    def enrol(self, fs: FileSystem, storage: Path, head_format: str = "raw") -> ReplicaStore:
        identity = Identity(self.replica_id, "web-1", "hv-1", "prod", head_format, 0)  # type: ignore[arg-type]
        return ReplicaStore.create(fs, storage, identity, self.key, self.epoch)

    def scribble(self, name: str | None = None, count: int = 5) -> None:
        for disk in [name] if name else list(self.content):
            data = self.content[disk]
            for _ in range(count):
                at = self.random.randrange(len(data))
                length = min(self.random.choice([1, 512, 4096, 70000]), len(data) - at)
                zeros = self.random.random() < 0.3
                data[at : at + length] = bytes(length) if zeros else self.random.randbytes(length)

    def disk(self, name: str) -> Disk:
        return Disk(self.ids[name], name, len(self.content[name]))

    def make(self, *, partial: bool = False, delta_id: DeltaId | None = None) -> Made:
        """Seal the change from the last committed state to the present content; `partial`: as a step, no point."""
        delta_id = delta_id or DeltaId(random_id())
        disks = sorted((self._disk_state(name) for name in self.content), key=lambda d: d.disk.id.bytes)
        point = self.state.point + (not partial)
        result = State(
            self.replica_id, delta_id, point, self.epoch, point * 10**9, Consistency.CRASH, tuple(disks), partial
        )
        sealer = DeltaSealer(self.key, self.replica_id, delta_id, self.epoch)
        made = Made(delta_id, self.state, result, sealer.header)
        entries: list[SegmentEntry] = []
        offset = len(sealer.header)

        def add(segment: Segment) -> None:
            nonlocal offset
            sealed = sealer.seal(segment)
            blob = bytes(sealed.blob)
            made.segments.append((sealed.number, offset, sealed.digest, blob))
            entries.append(
                SegmentEntry(sealed.number, sealed.disk, offset, len(blob), sealed.first, sealed.last, sealed.digest)
            )
            offset += len(blob)

        packer = Packer(add)
        ids = sorted({d.disk.id.bytes for d in self.state.disks} | {self.ids[name].bytes for name in self.content})
        for name, disk_id in sorted(self.ids.items(), key=lambda item: item[1].bytes):
            if name in self.content:
                self._pack(packer, ids.index(disk_id.bytes), name)
        packer.flush()
        made.tail, made.tail_offset = sealer.tail(entries, self.state, result), offset
        return made

    def _pack(self, packer: Packer, index: int, name: str) -> None:
        disk, new = self.disk(name), bytes(self.content[name])
        old = self.sent.get(name, b"")
        grain = disk.grain_bytes
        base_grains = -(-len(old) // grain)
        dirty = np.array(
            [
                new[i : i + grain].ljust(grain, b"\0") != old[i : i + grain].ljust(grain, b"\0")
                for i in range(0, len(new), grain)
            ],
            np.uint8,
        )
        zero = np.empty(len(dirty), np.uint8)
        _native.zeros(new, grain, zero)
        rows, payload = window_rows(0, new, grain, dirty, zero, base_grains)
        if len(rows):
            packer.add(index, grain, rows, payload)

    def _disk_state(self, name: str) -> DiskState:
        disk = self.disk(name)
        update = MerkleTree(MemoryNodes(), disk.leaf_bytes).update(write=False)
        if disk.size_bytes:
            update.put(0, leaf_digests(bytes(self.content[name]), 0, disk.leaf_bytes))
        return DiskState(disk, update.root(disk.size_bytes))

    def send(self, store: ReplicaStore, made: Made) -> None:
        store.begin(made.delta_id, made.base.delta_id, self.epoch, made.header)
        for number, offset, digest, blob in made.segments:
            store.receive(made.delta_id, number, offset, digest, blob)
        store.finish(made.delta_id, made.tail, made.tail_offset)

    def acknowledge(self, made: Made) -> None:
        self.state = made.result
        self.made.append(made)
        self.sent = {name: bytes(data) for name, data in self.content.items()}
        if made.result.is_point:
            self.copies[made.result.point] = dict(self.sent)

    def sync(self, store: ReplicaStore, *, partial: bool = False) -> Made:
        made = self.make(partial=partial)
        self.send(store, made)
        assert store.commit(made.delta_id) == made.result
        self.acknowledge(made)
        return made


def commit_until(
    step: str, error: ReplicaError, store: ReplicaStore, primary: SmallPrimary, monkeypatch: pytest.MonkeyPatch
) -> Made:
    """A commit that has come to `step` of `replica.store.commit` when that fails."""
    made = primary.make()
    primary.send(store, made)

    def fails(*_: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(commits, step, fails)
        with pytest.raises(type(error)):
            store.commit(made.delta_id)
    return made
