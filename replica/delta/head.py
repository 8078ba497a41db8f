"""A head: the disks that deltas are applied to, and its double in memory.

The store keeps a head in files; `MemoryHead` keeps one on the heap, for tests,
examples and whoever wants to try the algebra without a disk:

    head = MemoryHead.of(replica_id, epoch, {disk: b"..."})
    inverse = apply(head, delta)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from replica.delta.extents import as_bytes
from replica.merkle import MemoryNodes, MerkleTree, leaf_digests
from replica.model import Consistency, DeltaId, Disk, DiskId, DiskState, Epoch, ReplicaId, State, random_id

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Head(Protocol):
    """What `apply` needs. Offsets and lengths are bytes, always inside the disk's present size."""

    @property
    def disks(self) -> tuple[Disk, ...]:
        """The disks as they are now: inside a commit, after `set_disks`, the new ones."""
        ...

    @property
    def state(self) -> State:
        """The committed state."""
        ...

    def read_into(self, disk_id: DiskId, offset: int, buffer: Buffer) -> None: ...

    def read_ranges(self, disk_id: DiskId, ranges: Sequence[tuple[int, int]], buffer: Buffer) -> None:
        """Fill `buffer` with the ranges (offset, length), ascending, one behind the other."""
        ...

    def write_ranges(self, disk_id: DiskId, ranges: Sequence[tuple[int, int]], data: Buffer) -> None:
        """Write `data` to the ranges (offset, length), ascending, one behind the other."""
        ...

    def zero(self, disk_id: DiskId, offset: int, length: int) -> None:
        """Make the range read as zeros, as a hole where that can be. Cheap for ranges of any length."""
        ...

    def set_disks(self, disks: Sequence[Disk]) -> None:
        """Make the head hold exactly `disks`: add (all zeros, an empty tree), remove, resize.

        What a resize adds reads as zeros, and what it cuts off is gone, also when it grows again later.
        Trees are left alone. Idempotent, and finishes what a call that was cut short had begun.
        """
        ...

    def tree(self, disk_id: DiskId) -> MerkleTree: ...

    def flush(self) -> None:
        """Between `write` and `settle`: all that was written is on stable storage, and read from there next."""
        ...


class MemoryHead:
    """A head on the heap. Not thread-safe."""

    def __init__(self, state: State) -> None:
        """A head in `state`, whose disks are all zeros until something is put."""
        self._state = state
        self._disks: dict[DiskId, Disk] = {}
        self._contents: dict[DiskId, bytearray] = {}
        self._trees: dict[DiskId, MerkleTree] = {}
        self.set_disks([d.disk for d in state.disks])

    @classmethod
    def of(
        cls,
        replica_id: ReplicaId,
        epoch: Epoch,
        contents: Mapping[Disk, bytes],
        *,
        point: int = 0,
        delta_id: DeltaId | None = None,
    ) -> MemoryHead:
        """A head with this content, in a state that names its roots. Each content is as long as its disk."""
        disks = sorted(contents, key=lambda d: d.id.bytes)
        blank = tuple(DiskState(d, bytes(32)) for d in disks)
        name = DeltaId(random_id()) if delta_id is None else delta_id
        head = cls(State(replica_id, name, point, epoch, 0, Consistency.CRASH, blank))
        for disk in disks:
            if len(contents[disk]) != disk.size_bytes:
                raise ValueError(f"disk {disk.name!r} has {disk.size_bytes} bytes, not {len(contents[disk])}")
            head._contents[disk.id][:] = contents[disk]
        roots = tuple(DiskState(d, head._hash(d)) for d in disks)
        head._state = State(replica_id, name, point, epoch, 0, Consistency.CRASH, roots)
        return head

    def _hash(self, disk: Disk) -> bytes:
        update = self.tree(disk.id).update(write=True)
        if disk.size_bytes:
            update.put(0, leaf_digests(self._contents[disk.id], 0, disk.leaf_bytes))
        return update.root(disk.size_bytes)

    @property
    def disks(self) -> tuple[Disk, ...]:
        return tuple(sorted(self._disks.values(), key=lambda d: d.id.bytes))

    @property
    def state(self) -> State:
        return self._state

    def commit(self, state: State) -> None:
        """The writes are done: from now on the head is this state."""
        self._state = state

    def content(self, disk_id: DiskId) -> bytes:
        """A copy of the disk's bytes."""
        return bytes(self._contents[disk_id])

    def read_into(self, disk_id: DiskId, offset: int, buffer: Buffer) -> None:
        target = as_bytes(buffer)
        self._check(disk_id, offset, len(target))
        target[:] = as_bytes(self._contents[disk_id])[offset : offset + len(target)]

    def read_ranges(self, disk_id: DiskId, ranges: Sequence[tuple[int, int]], buffer: Buffer) -> None:
        target, at = as_bytes(buffer), 0
        for offset, length in ranges:
            self.read_into(disk_id, offset, target[at : at + length].data)
            at += length

    def write_ranges(self, disk_id: DiskId, ranges: Sequence[tuple[int, int]], data: Buffer) -> None:
        source, at = as_bytes(data), 0
        for offset, length in ranges:
            self.write(disk_id, offset, source[at : at + length].data)
            at += length

    def write(self, disk_id: DiskId, offset: int, data: Buffer) -> None:
        source = as_bytes(data)
        self._check(disk_id, offset, len(source))
        self._contents[disk_id][offset : offset + len(source)] = source.data

    def zero(self, disk_id: DiskId, offset: int, length: int) -> None:
        self._check(disk_id, offset, length)
        self._contents[disk_id][offset : offset + length] = bytes(length)

    def set_disks(self, disks: Sequence[Disk]) -> None:
        self._disks = {d.id: d for d in disks}
        for disk_id in self._contents.keys() - self._disks.keys():
            del self._contents[disk_id], self._trees[disk_id]
        for disk in disks:
            content = self._contents.setdefault(disk.id, bytearray())
            self._trees.setdefault(disk.id, MerkleTree(MemoryNodes(), disk.leaf_bytes))
            del content[disk.size_bytes :]
            content.extend(bytes(disk.size_bytes - len(content)))

    def tree(self, disk_id: DiskId) -> MerkleTree:
        return self._trees[disk_id]

    def flush(self) -> None:
        """Nothing to do: memory is as durable as it gets."""

    def _check(self, disk_id: DiskId, offset: int, length: int) -> None:
        size = self._disks[disk_id].size_bytes
        if offset < 0 or length < 0 or offset + length > size:
            raise ValueError(f"{length} bytes at {offset} are not inside a disk of {size} bytes")
