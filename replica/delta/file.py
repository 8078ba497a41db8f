"""Delta files: written once, read at random.

skeleton
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from replica.delta.change import DiskChange
from replica.delta.extents import Rows
from replica.delta.header import Header
from replica.delta.keys import DataKey, KeySource
from replica.delta.manifest import Manifest, SegmentEntry
from replica.delta.segment import SealedSegment, Segment
from replica.durable import File, FileSystem
from replica.model import DeltaId, Epoch, ReplicaId, State

if TYPE_CHECKING:
    pass


class DeltaSealer:
    """The sender's side of one delta: pure, thread-safe, nothing touches a file.

    `allot()` gives out numbers in the order of the segments; `seal` may then
    run in any thread, in any order. `tail` seals the manifest, once.
    """

    header: bytes

    def __init__(self, key: DataKey, replica_id: ReplicaId, delta_id: DeltaId, epoch: Epoch, level: int = 1) -> None:
        raise NotImplementedError

    def allot(self) -> int:
        raise NotImplementedError

    def seal(self, segment: Segment, number: int | None = None) -> SealedSegment:
        """Seal under `number` (from `allot`), or under the next one."""
        raise NotImplementedError

    def tail(self, entries: Iterable[SegmentEntry], base: State, result: State) -> bytes:
        """Sealed manifest and trailer: the end of the file. Entries in number order, all that were allotted.

        The tail's offset is where the last segment in file order ends.
        """
        raise NotImplementedError


class DeltaWriter:
    """Writes a delta file in one go: the receiver's inverses. Not thread-safe (it seals in its own threads)."""

    def __init__(
        self,
        fs: FileSystem,
        path: Path,
        key: DataKey,
        replica_id: ReplicaId,
        delta_id: DeltaId,
        epoch: Epoch,
        level: int = 1,
    ) -> None:
        raise NotImplementedError

    def add(self, segment: Segment) -> None:
        raise NotImplementedError

    def finish(self, base: State, result: State) -> None:
        """Manifest and trailer, fsync, close. The file is complete but has still the name it was opened with."""
        raise NotImplementedError

    def close(self) -> None:
        """Close without finishing (idempotent); the caller unlinks what is there."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class DeltaFileReader:
    """An open delta file: a `Delta` and a `Layer`. Thread-safe. Owns `file` and closes it.

    The constructor checks header, trailer, key, manifest and that the segments fill the file exactly.
    """

    header: Header
    manifest: Manifest

    def __init__(self, file: File, keys: KeySource) -> None:
        raise NotImplementedError

    @property
    def delta_id(self) -> DeltaId:
        raise NotImplementedError

    @property
    def base(self) -> State:
        raise NotImplementedError

    @property
    def result(self) -> State:
        raise NotImplementedError

    @property
    def disks(self) -> tuple[DiskChange, ...]:
        raise NotImplementedError

    @property
    def stored_bytes(self) -> int:
        raise NotImplementedError

    @property
    def raw_bytes(self) -> int | None:
        raise NotImplementedError

    def segment(self, number: int) -> Segment:
        raise NotImplementedError

    def segments(self) -> Iterator[Segment]:
        raise NotImplementedError

    def extents(self) -> Iterator[tuple[int, Rows]]:
        raise NotImplementedError

    def verify(self) -> None:
        """Read and open everything; DamageError at the first byte that is not as sealed."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
