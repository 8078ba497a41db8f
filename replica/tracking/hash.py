"""The hash tracker: which grains differ from the last committed point, found by reading the image once.

Per disk there is a directory of three files:

    secret    192 random bytes, the key of the grain digests (0600)
    digests   u64 per grain: keyed XXH3-64 of its content, 0 where it is all zero; a sparse file (see `digests`)
    leaves    the disk's Merkle tree (`merkle.FileNodes`)

They say what the disk held at the last committed point, and only `fold` ever
changes them. Files can be lost, cut, rot or come from different backups, so
they are believed only as far as they prove it: the digests name the state they
are of and carry a hash per window, the tree's root must be that state's. What
does not fit raises `TrackerDamageError`, and the disk has to be scanned fresh.

A scan reads the image in windows of 4 MiB. One native pass over a
window gives the digest of every grain, which grains differ from what is
stored, and which are zero; the caller gets these masks with the window's
bytes and ships what is dirty without reading anything twice. The new digests
and leaves stream into the journal, and the same stream goes through a dry
update of the tree: when the scan is over, the root of the result is known and
nothing has been written but the journal.

What the image has not allocated is not read. Where it has allocated nothing and
the stored digests (found by the data runs of their sparse file) are all zero, a
window is not even looked at; where they are not, its grains became zero.

A scan is `fresh` when the trackers cannot be trusted or are not there: then
every grain is covered, allocated or not, as a window or as a `Gap`.

    tracker = HashTracker(fs, directory, disk, base)
    scan = tracker.scan(image, journal, index, fresh=not tracker.known)
    for piece in scan: ...              # Window | Gap; a window's arrays are valid until the next one
    scan.root                           # 32 bytes

Digests are read a window at a time (8 KiB), not through a mapping of the file:
it costs nothing that could be measured beside the window itself, memory stays
flat, and a bad sector in the state directory is an error of this machine and
no SIGBUS for all of them.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import dropwhile, pairwise
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from replica import _native
from replica.durable import File, FileSystem
from replica.errors import TrackerDamageError
from replica.images import Image
from replica.merkle import FileNodes, MemoryNodes, MerkleTree
from replica.model import DIGEST_BYTES, Disk, State
from replica.tracking.digests import WindowHashes, count_windows, read_id
from replica.tracking.journal import WINDOW_BYTES, JournalRecord, grains_per_window
from replica.tracking.spans import Span, common_spans, merge_spans, spans_of_image, spans_of_runs

SECRET_BYTES = 192
READ_AHEAD_WINDOWS = 2
"""Windows read by other threads while one is worked on: 12 MiB of buffers in all."""

Bytes = NDArray[np.uint8]


class Window(NamedTuple):
    """A window's content and what is known of its grains. Valid until the next piece is asked for."""

    first_grain: int
    count_grains: int
    buffer: Bytes  # whole grains: bytes past the disk's end are zero
    dirty: Bytes | None  # u8 per grain; None in a fresh scan: nothing is known of any
    zero: Bytes  # u8 per grain


class Candidates(Protocol):
    """The grains that may have changed, where something better than hashing knows: a `DirtyBitmap`, for one."""

    def runs(self) -> Iterator[tuple[int, int]]:
        """(first grain, count), ascending, disjoint."""


class Records(Protocol):
    """Where the new digests and leaves go: a `JournalWriter`, or the trackers themselves when they are rebuilt."""

    def add(self, record: JournalRecord) -> None:
        """One window's; windows ascend."""


class Gap(NamedTuple):
    """In a fresh scan: a range of grains that were not read because they are zero."""

    first_grain: int
    stop_grain: int


def disk_directory(machine_directory: Path, disk: Disk) -> Path:
    return machine_directory / "disks" / str(disk.id)


class HashTracker:
    """The stored digests and tree of one disk. For one thread; the machine's lock keeps others out."""

    def __init__(self, fs: FileSystem, machine_directory: Path, disk: Disk, base: State | None) -> None:
        """Make what is missing. `base`: the state that a scan compares with. Raises StorageError."""
        self.disk = disk
        self.base = base
        self._fs = fs
        self.directory = disk_directory(machine_directory, disk)
        fs.make_directory(self.directory, private=True)
        self.secret = self._load_secret()
        self.known = self._fits()
        """What is stored says that it is `base` (whether it can be trusted is not known here)."""

    def _load_secret(self) -> bytes:
        path = self.directory / "secret"
        if self._fs.exists(path):
            secret = self._fs.read_bytes(path, 1 << 16)
            if len(secret) == SECRET_BYTES:
                return secret
        # Digests under another secret are worth nothing; they go before the new one is there.
        self._fs.unlink(self.directory / "digests")
        self._fs.unlink(self.directory / "leaves")
        secret = os.urandom(SECRET_BYTES)
        self._fs.replace_bytes(path, secret, private=True)
        return secret

    def _fits(self) -> bool:
        digests, leaves = self.directory / "digests", self.directory / "leaves"
        if self.base is None or self.base.is_empty or self.base.disk(self.disk.id) is None:
            return False
        if not self._fs.exists(digests) or not self._fs.exists(leaves):
            return False
        with self._fs.open(digests) as file:
            return read_id(file, self.disk) == self.base.delta_id

    def scan(
        self,
        image: Image,
        journal: Records,
        index: int,
        *,
        fresh: bool,
        candidates: Candidates | None = None,
        first_window: int = 0,
        check: Callable[[], None] = lambda: None,
    ) -> Scan:
        """Begin a scan of `image`, which has the disk's size. `index`: the disk's place in the result's table.

        Iterating raises TrackerDamageError as soon as what is stored proves not to be `base`.
        `candidates`: the only grains that may have changed, if something better than hashing knows (never with
        `fresh`). `first_window`: where it begins; what is before that is left as it was. `check` is called before
        every read and stops the scan by raising.
        """
        if not fresh and not self.known:
            raise ValueError(f"disk {self.disk.name!r} has no stored state to compare with")
        return Scan(self._fs, self, self.secret, image, journal, index, fresh, candidates, first_window, check)


class Scan:
    """One pass over one image. Iterate once, to the end; then `root` is what the manifest names."""

    def __init__(
        self,
        fs: FileSystem,
        tracker: HashTracker,
        secret: bytes,
        image: Image,
        journal: Records,
        index: int,
        fresh: bool,
        candidates: Candidates | None,
        first_window: int,
        check: Callable[[], None],
    ) -> None:
        self.disk = tracker.disk
        self.next_window = first_window
        """Where a scan that is to go on from here begins."""
        self.bytes_read = 0
        """Bytes read from the image so far."""
        self.root = b""
        self._fs, self._directory, self._secret, self._base = fs, tracker.directory, secret, tracker.base
        self._image, self._journal, self._index = image, journal, index
        self._fresh, self._candidates, self._check = fresh, candidates, check
        self._stopped = False
        grains = grains_per_window(self.disk)
        self._old, self._new = np.zeros(grains, np.uint64), np.zeros(grains, np.uint64)
        self._dirty = np.zeros(grains, np.uint8)
        self._leaves = np.zeros((WINDOW_BYTES // self.disk.leaf_bytes, DIGEST_BYTES), np.uint8)

    def stop(self) -> None:
        """End behind the window that was given last: what follows stays as it was, in the root as well."""
        self._stopped = True

    def __iter__(self) -> Iterator[Window | Gap]:
        if self._fresh:
            yield from self._run(None, MerkleTree(MemoryNodes(), self.disk.leaf_bytes))
            return
        with self._fs.open(self._directory / "digests") as digests, self._fs.open(self._directory / "leaves") as leaves:
            tree = MerkleTree(FileNodes(leaves), self.disk.leaf_bytes)
            self._check_root(tree)
            yield from self._run(digests, tree)

    def _check_root(self, tree: MerkleTree) -> None:
        state = self._base.disk(self.disk.id) if self._base is not None else None
        if state is None or tree.root(self.disk.size_bytes) != state.root:
            raise TrackerDamageError(
                f"what is known of disk {self.disk.name!r} is damaged: its Merkle tree has another root "
                f"({self._directory})"
            )

    def _run(self, digests: File | None, tree: MerkleTree) -> Iterator[Window | Gap]:
        update = tree.update(write=False)
        hashes = WindowHashes(digests, self.disk) if digests is not None else None
        passed = self.next_window if self._candidates is None else count_windows(self.disk)
        covered = 0
        for span, buffer in self._read_ahead(self._spans(digests)):
            first = span.window * grains_per_window(self.disk)
            if self._fresh and covered < first:
                yield Gap(covered, first)
            if hashes is not None:
                hashes.check_zero(passed, span.window)
                passed = max(passed, span.window + 1)
            window, record = self._look(first, buffer, digests, hashes)
            self._journal.add(record)
            first_leaf = first // self.disk.grains_per_leaf
            for start, stop in consecutive(record.leaves):
                update.put(first_leaf + int(record.leaves[start]), record.leaf_digests[start:stop])
            self.next_window = span.window + 1
            yield window
            covered = first + window.count_grains
            if self._stopped:
                break
        if hashes is not None and not self._stopped:
            hashes.check_zero(passed, count_windows(self.disk))
        if self._fresh and not self._stopped and covered < self.disk.count_grains:
            yield Gap(covered, self.disk.count_grains)
        self.root = update.root(self.disk.size_bytes)

    def _spans(self, digests: File | None) -> Iterator[Span]:
        spans = spans_of_image(self._image, self.disk.size_bytes)
        if digests is not None:
            per_window = grains_per_window(self.disk) * 8
            runs = ((start, start + length) for start, length in digests.data_runs(0, self.disk.count_grains * 8))
            spans = merge_spans(spans, spans_of_runs(runs, per_window))
        if self._candidates is not None:
            runs = ((first, first + count) for first, count in self._candidates.runs())
            spans = common_spans(spans, spans_of_runs(runs, grains_per_window(self.disk)))
        first = self.next_window
        return dropwhile(lambda span: span.window < first, spans) if first else spans

    def _read_ahead(self, spans: Iterator[Span]) -> Iterator[tuple[Span, Bytes]]:
        """Every span with its window's bytes; the next ones are being read meanwhile. Buffers are reused."""
        free = [np.empty(WINDOW_BYTES, np.uint8) for _ in range(READ_AHEAD_WINDOWS + 1)]
        waiting: deque[tuple[Span, Bytes, Future[int]]] = deque()
        with ThreadPoolExecutor(READ_AHEAD_WINDOWS, "read") as readers:
            try:
                more = True
                while more or waiting:
                    while more and free:
                        span = next(spans, None)
                        if span is None:
                            more = False
                            break
                        self._check()
                        buffer = free.pop()
                        waiting.append((span, buffer, readers.submit(self._read, span, buffer)))
                    if waiting:
                        span, buffer, future = waiting.popleft()
                        size = future.result()
                        self.bytes_read += span.bytes_to_read
                        yield span, buffer[:size]
                        free.append(buffer)
            finally:
                for _, _, future in waiting:
                    future.cancel()

    def _read(self, span: Span, buffer: Bytes) -> int:
        """Read a window; zeros where it is not allocated. Its size up to the disk's end, in whole grains."""
        start = span.window * WINDOW_BYTES
        size = min(WINDOW_BYTES, self.disk.size_bytes - start)
        padded = -(-size // self.disk.grain_bytes) * self.disk.grain_bytes
        done = start
        for begin, end in span.ranges:
            buffer[done - start : begin - start] = 0
            self._image.read_into(begin, buffer[begin - start : end - start].data)
            done = end
        buffer[done - start : padded] = 0
        return padded

    def _look(
        self, first: int, buffer: Bytes, digests: File | None, hashes: WindowHashes | None
    ) -> tuple[Window, JournalRecord]:
        """Hash and compare one window: what the caller gets, and what the journal gets."""
        disk, count = self.disk, len(buffer) // self.disk.grain_bytes
        new, dirty = self._new[:count], self._dirty[:count]
        old = None
        if digests is not None and hashes is not None:
            old = self._old[:count]
            old[digests.read_into(first * 8, old.data) // 8 :] = 0
            hashes.check(first // grains_per_window(disk), old)
        _native.scan(buffer, disk.grain_bytes, self._secret, old, new, dirty)
        zero = (new == 0).view(np.uint8)
        changed = np.flatnonzero(new if old is None else dirty)
        select = np.zeros(-(-count // disk.grains_per_leaf), np.uint8)
        select[changed // disk.grains_per_leaf] = 1
        leaves = np.flatnonzero(select)
        if len(leaves):
            _native.hash_leaves(
                buffer, disk.leaf_bytes, first // disk.grains_per_leaf, select, self._leaves[: len(select)]
            )
        record = JournalRecord(
            self._index, first, changed.astype(np.uint16), new[changed], leaves.astype(np.uint16), self._leaves[leaves]
        )
        return Window(first, count, buffer, None if old is None else dirty, zero), record


def consecutive(numbers: NDArray[np.uint16]) -> Iterator[tuple[int, int]]:
    """Slices of an ascending array that hold consecutive numbers."""
    if len(numbers):
        breaks = np.flatnonzero(np.diff(numbers.astype(np.int64)) != 1) + 1
        yield from pairwise((0, *(int(b) for b in breaks), len(numbers)))
