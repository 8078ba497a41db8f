"""The stores as the site sees them: the protocols it works with and the one that lives in directories.

The site's own tests stand in for these with stores that block or fail on command.
"""

from __future__ import annotations

import logging
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self
from uuid import UUID

from replica.delta import DataKey
from replica.durable import FileSystem
from replica.errors import ProtocolError, ReplicaError, StorageError
from replica.merkle import FileNodes, MerkleTree
from replica.model import DamagedLeaves, DeltaId, Disk, DiskId, Epoch, State
from replica.receipt import SignedReceipt
from replica.store import Identity, PointInfo, Policy, ReplicaReader, ReplicaStore, Rotated, replica_directories
from replica.store.compare import Ranges, StillHead
from replica.store.layout import Layout, StoreState
from replica.store.receipt_key import ReceiptKey
from replica.store.space import Space, SpaceLimits, judge

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger(__name__)


class Store(Protocol):
    """The writer of one replica (`ReplicaStore`)."""

    @property
    def identity(self) -> Identity: ...
    @property
    def head(self) -> State: ...
    @property
    def epoch(self) -> Epoch: ...
    @property
    def applying(self) -> DeltaId | None: ...
    @property
    def receiving(self) -> DeltaId | None: ...
    @property
    def received(self) -> DeltaId | None: ...
    @property
    def stopped(self) -> ReplicaError | None: ...
    @property
    def damaged(self) -> tuple[DamagedLeaves, ...]: ...
    @property
    def receipt(self) -> SignedReceipt | None: ...
    def repair(self, disk_id: DiskId, first: int, epoch: Epoch, content: memoryview) -> tuple[DamagedLeaves, ...]: ...
    def has_key(self, key: DataKey) -> bool: ...
    def adopt(self, expected: Epoch, holder: UUID) -> Epoch: ...
    def begin(self, delta_id: DeltaId, base: DeltaId, epoch: Epoch, header: bytes) -> list[tuple[int, int]]: ...
    def receive(self, delta_id: DeltaId, number: int, offset: int, digest: bytes, blob: memoryview) -> None: ...
    def finish(self, delta_id: DeltaId, tail: bytes, tail_offset: int) -> None: ...
    def commit(self, delta_id: DeltaId, *, reserve_bytes: int = 0) -> State: ...
    def discard(self, delta_id: DeltaId) -> None: ...
    def rotate(self, policy: Policy, *, at_once: bool = False, shed_bytes: int = 0, brief: bool = False) -> Rotated: ...
    def thin(self, policy: Policy, *, at_once: bool = False, shed_bytes: int = 0) -> Rotated: ...
    def close(self) -> None: ...


class OpenPoint(Protocol):
    """A pinned point (`PointReader`)."""

    @property
    def state(self) -> State: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None: ...
    def read_into(self, disk_id: DiskId, offset: int, buffer: Buffer) -> None: ...


class Reader(Protocol):
    """Reading one replica beside its writer (`ReplicaReader`)."""

    @property
    def identity(self) -> Identity: ...
    @property
    def state(self) -> StoreState: ...
    @property
    def head(self) -> State: ...
    @property
    def receiving(self) -> DeltaId | None: ...
    @property
    def received(self) -> DeltaId | None: ...
    def points(self) -> list[PointInfo]: ...
    def open_point(self, number: int | None = None) -> OpenPoint: ...
    def receipt(self, number: int) -> bytes: ...


class Stores(Protocol):
    """Where stores come from."""

    def directories(self, storage: Path) -> list[Path]:
        """The directory of every replica in a storage. Raises StorageError if there is no such storage."""

    def create(self, storage: Path, identity: Identity, key: DataKey, epoch: Epoch) -> Store:
        """Make a replica's directory and open it."""

    def open(self, directory: Path) -> Store:
        """Take the lock and recover."""

    def reader(self, directory: Path) -> Reader:
        """Look at a replica without its lock."""

    def space(self, directory: Path, limits: SpaceLimits) -> Space:
        """How the storage under a replica stands."""

    def tree(self, directory: Path, disk: Disk, level: int, first: int, count: int) -> bytes:
        """Digests of the head's Merkle tree, 32 bytes each."""

    def nodes(self, directory: Path, base: DeltaId, disk_id: DiskId, level: int, ranges: Ranges) -> bytes:
        """The same by ranges, of the head that `base` made and no other."""

    def grains(
        self, directory: Path, base: DeltaId, disk_id: DiskId, secret: bytes, ranges: Ranges, limit_bytes: int
    ) -> bytes:
        """Keyed digests of the grains of ranges of leaves of that head, and whether each leaf is whole."""


class FileStores:
    """Replicas in directories of a file system. Thread-safe."""

    def __init__(self, fs: FileSystem, receipt_key: ReceiptKey | None = None) -> None:
        """`receipt_key`: what all of them sign receipts with; each storage has its own without it."""
        self._fs = fs
        self._receipt_key = receipt_key

    def directories(self, storage: Path) -> list[Path]:
        if not self._fs.exists(storage):
            if not self._fs.exists(storage.parent):
                raise StorageError(
                    f"storage {storage} is not there, nor is {storage.parent}",
                    hint="is its file system mounted? correct the path, or create the directory",
                )
            log.warning("storage %s was not there and is made now; if it had replicas, mount it and restart", storage)
            self._fs.make_directory(storage)
        return replica_directories(self._fs, storage)

    def create(self, storage: Path, identity: Identity, key: DataKey, epoch: Epoch) -> Store:
        return ReplicaStore.create(self._fs, storage, identity, key, epoch, self._receipt_key)

    def open(self, directory: Path) -> Store:
        return ReplicaStore.open(self._fs, directory, self._receipt_key)

    def reader(self, directory: Path) -> Reader:
        return ReplicaReader(self._fs, directory)

    def space(self, directory: Path, limits: SpaceLimits) -> Space:
        return judge(self._fs.free_bytes(directory), self._fs.total_bytes(directory), limits)

    def tree(self, directory: Path, disk: Disk, level: int, first: int, count: int) -> bytes:
        with self._fs.open(Layout(directory).tree(disk.id)) as file:
            try:
                return MerkleTree(FileNodes(file), disk.leaf_bytes).level(level, first, count).tobytes()
            except ValueError as error:
                raise ProtocolError(str(error)) from error

    def nodes(self, directory: Path, base: DeltaId, disk_id: DiskId, level: int, ranges: Ranges) -> bytes:
        with StillHead(self._fs, Layout(directory), base) as head:
            return head.nodes(disk_id, level, ranges)

    def grains(
        self, directory: Path, base: DeltaId, disk_id: DiskId, secret: bytes, ranges: Ranges, limit_bytes: int
    ) -> bytes:
        with StillHead(self._fs, Layout(directory), base) as head:
            return head.grains(disk_id, secret, ranges, limit_bytes)
