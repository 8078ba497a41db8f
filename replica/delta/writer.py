"""Making delta files: `DeltaSealer` for the sender, `DeltaWriter` for a file on the spot.

`DeltaSealer` is pure: it turns segments into sealed blobs and, at the end, the
entries into the sealed manifest and trailer. Where the blobs go, and in which
file order, is the caller's business:

    sealer = DeltaSealer(key, replica_id, delta_id, epoch)
    sealed = sealer.seal(segment)                     # goes to an offset that the caller allots
    entries.append(SegmentEntry.of(sealed, offset))
    tail = sealer.tail(entries, base, result)         # goes behind the last blob

`DeltaWriter` is the receiver's use of it: a new file, the segments one after
the other, sealed by a few threads, fsynced by `finish`. Giving the file its
final name is left to the caller (`FileSystem.publish`).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from replica.delta.extents import LOST
from replica.delta.header import HEADER_BYTES, Trailer
from replica.delta.keys import DataKey
from replica.delta.manifest import SegmentEntry, encode_manifest
from replica.delta.seal import Kind, Sealer
from replica.delta.segment import DEFAULT_LEVEL, SealedSegment, Segment, seal_segment
from replica.durable import FileSystem
from replica.model import NEVER, DeltaId, Epoch, ReplicaId, Stamp, State

SEALING_THREADS = 2


class DeltaSealer:
    """Seals one delta, once: a fresh salt, each number once, the tail once. Thread-safe.

    `allot` gives out numbers in the order of the segments; `seal` may then run in
    any thread and in any order.
    """

    def __init__(
        self, key: DataKey, replica_id: ReplicaId, delta_id: DeltaId, epoch: Epoch, level: int = DEFAULT_LEVEL
    ) -> None:
        self._sealer = Sealer(key, replica_id, delta_id, epoch)
        self._delta_id = delta_id
        self._level = level
        self._lock = threading.Lock()
        self._allotted = 0

    @property
    def header(self) -> bytes:
        """The file's first 160 bytes."""
        return self._sealer.header.raw

    def allot(self) -> int:
        """The next segment's number. Segments are numbered in ascending order of (disk, grain)."""
        with self._lock:
            self._allotted += 1
            return self._allotted - 1

    def seal(self, segment: Segment, number: int | None = None) -> SealedSegment:
        """Compress and seal under a `number` from `allot`, or under the next one."""
        return seal_segment(self._sealer, self.allot() if number is None else number, segment, self._level)

    def tail(
        self,
        entries: Iterable[SegmentEntry],
        base: State,
        result: State,
        committed: Stamp = NEVER,
        *,
        lost: bool = False,
    ) -> bytes:
        """Sealed manifest and trailer: what follows the last blob. Once.

        `entries` are those of all allotted numbers, in their order; they are read once, so that they may
        come from a spool; `lost`: some segments have LOST extents. FormatError if they are not ascending or leave gaps.
        """
        end = HEADER_BYTES
        count = 0

        def counted() -> Iterator[SegmentEntry]:
            nonlocal end, count
            for entry in entries:
                end = max(end, entry.offset + entry.length)
                count += 1
                yield entry

        manifest = encode_manifest(self._delta_id, base, result, counted(), committed, lost=lost)
        assert count == self._allotted, f"{self._allotted} segments were allotted and {count} are in the manifest"
        self._sealer.claim_manifest()
        sealed = self._sealer.seal(Kind.MANIFEST, 0, 0, manifest, len(manifest))
        return sealed + Trailer(end, len(sealed)).raw


class DeltaWriter:
    """Writes one delta file from front to back. Called from one thread; seals in a few of its own.

    A context manager: leaving it without `finish` closes what is there, for the caller to unlink.
    """

    def __init__(
        self,
        fs: FileSystem,
        path: Path,
        key: DataKey,
        replica_id: ReplicaId,
        delta_id: DeltaId,
        epoch: Epoch,
        level: int = DEFAULT_LEVEL,
        threads: int = SEALING_THREADS,
    ) -> None:
        self._sealer = DeltaSealer(key, replica_id, delta_id, epoch, level)
        self._file = fs.create(path)
        self._offset = 0
        self._entries: list[SegmentEntry] = []
        self._lost = False
        self._limit = threads + 1
        self._running: deque[Future[SealedSegment]] = deque()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="seal")
        try:
            self._append(self._sealer.header)
        except BaseException:
            self.close()
            raise

    @property
    def stored_bytes(self) -> int:
        """Bytes written so far."""
        return self._offset

    def add(self, segment: Segment) -> None:
        """Take the next segment; may return before it is sealed. At most `threads` + 1 are in memory."""
        self._lost = self._lost or bool((segment.extents["data"] == LOST).any())
        number = self._sealer.allot()
        self._running.append(self._pool.submit(self._sealer.seal, segment, number))
        while len(self._running) >= self._limit:
            self._drain()

    def finish(self, base: State, result: State, committed: Stamp = NEVER) -> None:
        """Manifest and trailer, fsync, close: the file is complete and on stable storage, under its present name.

        `committed`, in an inverse: when the result had been committed here.
        """
        while self._running:
            self._drain()
        self._append(self._sealer.tail(self._entries, base, result, committed, lost=self._lost))
        self._file.sync()
        self.close()

    def close(self) -> None:
        """Close, whatever is in the file. Idempotent."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._file.close()

    def _drain(self) -> None:
        sealed = self._running.popleft().result()
        self._entries.append(SegmentEntry.of(sealed, self._offset))
        self._append(sealed.blob)

    def _append(self, data: bytes) -> None:
        self._file.write(self._offset, data)
        self._file.start_writing(self._offset, len(data))
        self._offset += len(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
