"""The hash tracker: which grains differ from the last committed point, found by reading the image once.

Per disk there is a directory of four files:

    secret    192 random bytes, the key of the grain digests (0600)
    digests   u64 per grain: keyed XXH3-64 of its content, 0 where it is all zero; a sparse file (see `digests`)
    windows   which state that is, and a hash per window of digests
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

The disk may have another size than at the last committed point: grains beyond
the base's end were zero, and of a disk that was cut the leaf at the cut is
hashed anew, since it may have lost content without a grain in it changing.

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
from replica.bitmap import DirtyBitmap
from replica.durable import FileSystem
from replica.errors import AuditMissError, TrackerDamageError
from replica.images import Image
from replica.merkle import FileNodes, MemoryNodes, MerkleTree
from replica.model import DIGEST_BYTES, Disk, DiskState, State
from replica.tracking.audit import HASH, AuditPlan, sample_clean
from replica.tracking.digests import NAMES, DigestTable, count_windows
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
        fs.clear_temporaries(self.directory)
        seen = fs.exists(self.directory / "secret")
        self.secret = self._load_secret()
        self.known = self._fits()
        """What is stored says that it is `base` (whether it can be trusted is not known here)."""
        if seen and not self.known:  # made by a process that was killed, maybe: digests under it are worth what it is
            fs.settle_names(self.directory / "secret", levels=3)

    @property
    def base_bytes(self) -> int:
        """The disk's size at `base`; the size it has now if `base` does not know it."""
        state = self.base.disk(self.disk.id) if self.base is not None else None
        return state.disk.size_bytes if state is not None else self.disk.size_bytes

    def _load_secret(self) -> bytes:
        path = self.directory / "secret"
        if self._fs.exists(path):
            secret = self._fs.read_bytes(path, 1 << 16)
            if len(secret) == SECRET_BYTES:
                return secret
        # Digests under another secret are worth nothing; they go before the new one is there.
        for name in (*NAMES, "leaves"):
            self._fs.unlink(self.directory / name)
        secret = os.urandom(SECRET_BYTES)
        self._fs.replace_bytes(path, secret, private=True)
        return secret

    def _fits(self) -> bool:
        state = self.base.disk(self.disk.id) if self.base is not None else None
        if self.base is None or state is None or not self._fs.exists(self.directory / "leaves"):
            return False
        table = DigestTable.open(self._fs, self.directory, state.disk)
        if table is None:
            return False
        with table:
            return table.fits and table.read_id() == self.base.delta_id

    def scan(
        self,
        image: Image,
        journal: Records,
        index: int,
        *,
        fresh: bool,
        candidates: Candidates | None = None,
        first_window: int = 0,
        audit: AuditPlan | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> Scan:
        """Begin a scan of `image`, which has the disk's size. `index`: the disk's place in the result's table.

        Iterating raises TrackerDamageError as soon as what is stored proves not to be `base`.
        `candidates`: the only grains that may have changed, if something better than hashing knows (never with
        `fresh`); `audit`: what of the rest is looked at all the same. A grain that changed and is no candidate, or a
        leaf that is not what its unchanged grains make, raises AuditMissError. Only a `DirtyBitmap` is audited.
        `first_window`: where the scan begins; what is before that is left as it was. `check` is called before every
        read and stops the scan by raising.
        """
        if not fresh and not self.known:
            raise ValueError(f"disk {self.disk.name!r} has no stored state to compare with")
        return Scan(self._fs, self, self.secret, image, journal, index, fresh, candidates, first_window, audit, check)


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
        audit: AuditPlan | None,
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
        self._audit = audit or AuditPlan()
        grains = grains_per_window(self.disk)
        self._old, self._new = np.zeros(grains, np.uint64), np.zeros(grains, np.uint64)
        self._dirty = np.zeros(grains, np.uint8)
        self._before = self._base.disk(self.disk.id) if self._base is not None and not fresh else None
        self._leaves = np.zeros((WINDOW_BYTES // self.disk.leaf_bytes, DIGEST_BYTES), np.uint8)

    def stop(self) -> None:
        """End behind the window that was given last: what follows stays as it was, in the root as well."""
        self._stopped = True

    def __iter__(self) -> Iterator[Window | Gap]:
        if self._before is None:
            yield from self._run(None, MerkleTree(MemoryNodes(), self.disk.leaf_bytes))
            return
        table = DigestTable.open(self._fs, self._directory, self._before.disk)
        assert table is not None
        with table, self._fs.open(self._directory / "leaves") as leaves:
            tree = MerkleTree(FileNodes(leaves), self.disk.leaf_bytes)
            self._check_root(tree, self._before)
            if isinstance(self._candidates, DirtyBitmap):
                self._sample(table, self._candidates)
            yield from self._run(table, tree)

    def _check_root(self, tree: MerkleTree, before: DiskState) -> None:
        if tree.root(before.disk.size_bytes) != before.root:
            raise TrackerDamageError(
                f"what is known of disk {self.disk.name!r} is damaged: its Merkle tree has another root "
                f"({self._directory})"
            )

    @property
    def _cut_leaf(self) -> int | None:
        """The leaf in which the disk was cut, if it was: part of it may be gone, and no grain in it need differ."""
        if self._before is None or self._before.disk.size_bytes <= self.disk.size_bytes:
            return None
        return self.disk.size_bytes // self.disk.leaf_bytes if self.disk.size_bytes % self.disk.leaf_bytes else None

    def _run(self, table: DigestTable | None, tree: MerkleTree) -> Iterator[Window | Gap]:
        update = tree.update(write=False)
        passed = self.next_window if self._candidates is None else count_windows(self.disk)
        covered = 0
        for span, buffer in self._read_ahead(self._spans(table)):
            first = span.window * grains_per_window(self.disk)
            if self._fresh and covered < first:
                yield Gap(covered, first)
            if table is not None:
                table.check_zero(passed, span.window)
                passed = max(passed, span.window + 1)
            window, record = self._look(first, buffer, table)
            if table is not None:
                self._check_window(window, span.window, tree)
            self._journal.add(record)
            first_leaf = first // self.disk.grains_per_leaf
            for start, stop in consecutive(record.leaves):
                update.put(first_leaf + int(record.leaves[start]), record.leaf_digests[start:stop])
            self.next_window = span.window + 1
            yield window
            covered = first + window.count_grains
            if self._stopped:
                break
        if table is not None and not self._stopped:
            table.check_zero(passed, count_windows(self.disk))
        if self._fresh and not self._stopped and covered < self.disk.count_grains:
            yield Gap(covered, self.disk.count_grains)
        if self._before is not None and self.disk.size_bytes < self._before.disk.size_bytes:
            update.truncate(self.disk.count_leaves)
        self.root = update.root(self.disk.size_bytes)

    def _spans(self, table: DigestTable | None) -> Iterator[Span]:
        spans = spans_of_image(self._image, self.disk.size_bytes)
        if table is not None:
            runs = table.runs(count_windows(self.disk))
            spans = merge_spans(spans, spans_of_runs(runs, grains_per_window(self.disk)))
            audited = (Span(window, ()) for window in self._audit.windows)
            spans = merge_spans(spans, audited)
        if self._candidates is not None:
            runs = ((first, first + count) for first, count in self._candidates.runs())
            wanted = spans_of_runs(runs, grains_per_window(self.disk))
            spans = common_spans(spans, merge_spans(wanted, (Span(window, ()) for window in self._audit.windows)))
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

    def _look(self, first: int, buffer: Bytes, table: DigestTable | None) -> tuple[Window, JournalRecord]:
        """Hash and compare one window: what the caller gets, and what the journal gets."""
        disk, count = self.disk, len(buffer) // self.disk.grain_bytes
        new, dirty = self._new[:count], self._dirty[:count]
        old = None
        if table is not None:
            table.read(first // grains_per_window(disk), self._old)
            table.check(first // grains_per_window(disk), self._old)
            old = self._old[:count]
        _native.scan(buffer, disk.grain_bytes, self._secret, old, new, dirty)
        zero = (new == 0).view(np.uint8)
        changed = np.flatnonzero(new if old is None else dirty)
        select = np.zeros(-(-count // disk.grains_per_leaf), np.uint8)
        select[changed // disk.grains_per_leaf] = 1
        cut = -1 if self._cut_leaf is None else self._cut_leaf - first // disk.grains_per_leaf
        if 0 <= cut < len(select):
            select[cut] = 1
        leaves = np.flatnonzero(select)
        if table is not None and first // grains_per_window(disk) in self._audit.windows:
            select[:] = 1
        if select.any():
            _native.hash_leaves(
                buffer, disk.leaf_bytes, first // disk.grains_per_leaf, select, self._leaves[: len(select)]
            )
        record = JournalRecord(
            self._index, first, changed.astype(np.uint16), new[changed], leaves.astype(np.uint16), self._leaves[leaves]
        )
        return Window(first, count, buffer, None if old is None else dirty, zero), record

    def _sample(self, table: DigestTable, candidates: DirtyBitmap) -> None:
        """Read and hash some grains that are reported clean. Raises AuditMissError."""
        disk = self.disk
        per_window, loaded = grains_per_window(disk), -1
        buffer, new, dirty = np.zeros(disk.grain_bytes, np.uint8), np.zeros(1, np.uint64), np.zeros(1, np.uint8)
        for grain in sample_clean(candidates, self._audit.sample, self._audit.random):
            self._check()
            window, start = grain // per_window, grain * disk.grain_bytes
            if window != loaded:
                table.read(window, self._old)
                table.check(window, self._old)
                loaded = window
            size = min(disk.grain_bytes, disk.size_bytes - start)
            buffer[size:] = 0
            self._image.read_into(start, buffer[:size].data)
            self.bytes_read += size
            _native.scan(buffer, disk.grain_bytes, self._secret, self._old[grain % per_window :][:1], new, dirty)
            if dirty[0]:
                raise self._missed(grain)

    def _check_window(self, window: Window, number: int, tree: MerkleTree) -> None:
        """A window that was read for whatever reason: is what changed a candidate, and what did not as it was?"""
        assert window.dirty is not None
        if isinstance(self._candidates, DirtyBitmap):
            reported = self._candidates.mask(window.first_grain, window.count_grains)
            unreported = np.flatnonzero((window.dirty != 0) & (reported == 0))
            if len(unreported):
                raise self._missed(window.first_grain + int(unreported[0]))
        if number not in self._audit.windows:
            return
        per_leaf = self.disk.grains_per_leaf
        count = -(-window.count_grains // per_leaf)
        clean = np.ones(count, bool)
        clean[np.flatnonzero(window.dirty) // per_leaf] = False
        first_leaf = window.first_grain // per_leaf
        if self._cut_leaf is not None and first_leaf <= self._cut_leaf < first_leaf + count:
            clean[self._cut_leaf - first_leaf] = False
        wrong = (self._leaves[:count] != tree.leaves(first_leaf, count)).any(axis=1) & clean
        if wrong.any():
            offset = (first_leaf + int(np.flatnonzero(wrong)[0])) * self.disk.leaf_bytes
            raise AuditMissError(
                f"the tracker {HASH!r} of disk {self.disk.name!r} is wrong: the leaf at byte {offset} is not what its "
                "unchanged content makes",
                disk=self.disk.name,
                tracker=HASH,
            )

    def _missed(self, grain: int) -> AuditMissError:
        name = self._audit.tracker
        return AuditMissError(
            f"the tracker {name!r} missed a change of disk {self.disk.name!r} at byte {grain * self.disk.grain_bytes}",
            hint="it is not believed of this disk until all of it was read; find out why it missed it",
            disk=self.disk.name,
            tracker=name,
        )


def consecutive(numbers: NDArray[np.uint16]) -> Iterator[tuple[int, int]]:
    """Slices of an ascending array that hold consecutive numbers."""
    if len(numbers):
        breaks = np.flatnonzero(np.diff(numbers.astype(np.int64)) != 1) + 1
        yield from pairwise((0, *(int(b) for b in breaks), len(numbers)))
