"""A small image in memory and a machine directory with one disk, scanned and folded like a cycle does it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import msgspec
import numpy as np
import pytest

from replica.durable import FileSystem
from replica.merkle import MemoryNodes, MerkleTree, leaf_digests
from replica.model import (
    EMPTY_DELTA_ID,
    Consistency,
    DeltaId,
    Disk,
    DiskId,
    DiskState,
    Epoch,
    ReplicaId,
    State,
    random_id,
)
from replica.tracking.fold import fold
from replica.tracking.hash import Gap, HashTracker, Window
from replica.tracking.journal import Journal, JournalSummary, JournalWriter


class MemoryImage:
    """A disk in an array; `ranges` is what it says is allocated (default: all)."""

    format, sector_bytes, path, files = "raw", 512, Path("memory"), ()

    def __init__(self, data: np.ndarray, ranges: list[tuple[int, int]] | None = None) -> None:
        self.data, self.ranges = data, ranges
        self.size_bytes = len(data)
        self.reads: list[tuple[int, int]] = []

    def allocated(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        for a, b in [(0, len(self.data))] if self.ranges is None else self.ranges:
            if a < stop and b > start:
                yield max(a, start), min(b, stop)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        view = np.frombuffer(buffer, np.uint8)
        view[:] = self.data[offset : offset + len(view)]
        self.reads.append((offset, offset + len(view)))

    def close(self) -> None: ...

    def __enter__(self) -> MemoryImage:
        return self

    def __exit__(self, *_: object) -> None: ...


@dataclass
class Machine:
    """One disk's trackers, driven through whole cycles without a receiver."""

    directory: Path
    disk: Disk
    fs: FileSystem = field(default_factory=FileSystem)
    head: State | None = None

    def scan(
        self, image: MemoryImage, *, fresh: bool | None = None, candidates: object = None, audit: object = None
    ) -> tuple[list[Window | Gap], State]:
        """Scan and finish the journal; copies of the pieces, and the result."""
        tracker = HashTracker(self.fs, self.directory, self.disk, self.head)
        fresh = not tracker.known if fresh is None else fresh
        pieces: list[Window | Gap] = []
        with JournalWriter(self.fs, self.directory) as journal:
            scan = tracker.scan(image, journal, 0, fresh=fresh, candidates=candidates, audit=audit)
            for piece in scan:
                if isinstance(piece, Window):
                    arrays = (a if a is None else a.copy() for a in (piece.buffer, piece.dirty, piece.zero))
                    piece = Window(piece.first_grain, piece.count_grains, *arrays)
                pieces.append(piece)
            epoch = Epoch(1, UUID(int=7))
            states = (DiskState(self.disk, scan.root),)
            result = State(ReplicaId(UUID(int=9)), DeltaId(random_id()), 1, epoch, 5, Consistency.CRASH, states)
            base = self.head.delta_id if self.head else EMPTY_DELTA_ID
            journal.finish(JournalSummary(base, result, (fresh,), (tracker.base_bytes,)))
        return pieces, result

    def fold(self) -> None:
        with Journal(self.fs, self.directory / "pending") as journal:
            self.head = journal.summary.result
            journal.accept()
            fold(self.fs, self.directory, journal)
            journal.remove()

    def resize(self, size_bytes: int) -> None:
        self.disk = msgspec.structs.replace(self.disk, size_bytes=size_bytes)

    def cycle(self, image: MemoryImage, **options: object) -> tuple[list[Window | Gap], State]:
        found = self.scan(image, **options)  # type: ignore[arg-type]
        self.fold()
        return found

    def dirty(self, image: MemoryImage, **options: object) -> set[int]:
        """The grains that a scan (thrown away) reports."""
        pieces, _ = self.scan(image, **options)  # type: ignore[arg-type]
        grains: set[int] = set()
        for piece in pieces:
            assert isinstance(piece, Window) and piece.dirty is not None
            grains.update(int(g) + piece.first_grain for g in np.flatnonzero(piece.dirty))
        return grains


def root_of(data: np.ndarray, disk: Disk) -> bytes:
    """The root, computed the plain way."""
    update = MerkleTree(MemoryNodes(), disk.leaf_bytes).update(write=True)
    if len(data):
        update.put(0, leaf_digests(data, 0, disk.leaf_bytes))
    return update.root(len(data))


@pytest.fixture
def machine(tmp_path: Path) -> Callable[..., Machine]:
    def make(size_bytes: int, **disk: int) -> Machine:
        return Machine(tmp_path, Disk(DiskId(UUID(int=3)), "os", size_bytes, **disk))

    return make
