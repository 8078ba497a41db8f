"""Fold: the trackers become what the committed delta made of the disk. Driven by the journal, and only by it.

    receiver committed                    ->
    journal renamed to `folding`          ->   (`Journal.accept`: the decision is durable)
    digests and leaves changed, synced    ->   (`fold`: writes what the journal says, where it says)
    the caller stores the new state       ->
    journal unlinked

Every write sets a value that the journal names, so folding again after a crash
at any point ends in the same files; the roots are compared at the end. The
digests say themselves whose they are: before the first of them changes they
become nobody's, durably, and the result's only when all the rest is durable. As
long as they still are the base's, every window is checked before it is changed.

A disk that was resized: its files get their new sizes as soon as they are
nobody's, grown by zeros. Of the window and the leaf at a cut the journal names
what changed inside; the window's hash is made anew from what is left of it, and
the tree is cut behind the last leaf.
"""

from __future__ import annotations

from pathlib import Path

from replica.durable import File, FileSystem
from replica.errors import DamageError, TrackerDamageError
from replica.merkle import FileNodes, MerkleTree
from replica.model import EMPTY_DELTA_ID, DeltaId, Disk, DiskState
from replica.tracking.digests import DigestTable, count_windows
from replica.tracking.hash import consecutive, disk_directory
from replica.tracking.journal import Journal, JournalRecord, grains_per_window


def fold(fs: FileSystem, machine_directory: Path, journal: Journal) -> None:
    """Change the trackers of every disk in an accepted journal; durable when this returns. Idempotent.

    Raises StorageError (fold again), FormatError (the journal is damaged) or DamageError (a tree does not have
    the root it must have); after the latter two the trackers are not to be trusted.
    """
    summary, records = journal.summary, journal.records()
    record = next(records, None)
    for index, state in enumerate(summary.result.disks):
        base = None if summary.fresh[index] else summary.base
        directory = disk_directory(machine_directory, state.disk)
        with Target(fs, directory, state, base, summary.before(index), summary.result.delta_id) as target:
            while record is not None and record.disk == index:
                target.put(record)
                record = next(records, None)
            target.finish(state.root)


class Target:
    """The trackers of one disk, being changed from `base` (None: from nothing) to `result`."""

    def __init__(
        self,
        fs: FileSystem,
        directory: Path,
        state: DiskState,
        base: DeltaId | None,
        before: Disk,
        result: DeltaId,
    ) -> None:
        self._fs, self._directory, self._state, self._result = fs, directory, state, result
        self._window, self._cut = grains_per_window(state.disk), -1
        self._from_base = False
        fs.make_directory(directory, private=True)
        self._table = (
            DigestTable.start(fs, directory, state.disk)
            if base is None
            else _of_base(fs, directory, before, state.disk, base, result)
        )
        try:
            if base is not None:
                self._begin(base, before)
            self._table.sync()
            self._leaves = self._open_leaves(fresh=base is None)
        except BaseException:
            self._table.close()
            raise
        self._update = MerkleTree(FileNodes(self._leaves), state.disk.leaf_bytes).update(write=True)
        self._shrinks = base is not None and before.size_bytes > state.disk.size_bytes

    def _begin(self, base: DeltaId, before: Disk) -> None:
        """From here on the digests are nobody's, durably, and of the result's size."""
        disk = self._state.disk
        self._from_base = self._table.read_id() == base
        if before.size_bytes > disk.size_bytes and disk.size_bytes:
            self._cut = count_windows(disk) - 1
            if self._from_base:
                self._table.check(self._cut, self._table.window(self._cut))
        self._table.write_id(EMPTY_DELTA_ID)
        if before.size_bytes != disk.size_bytes:
            self._table.sync()
            self._table.resize(disk)

    def _open_leaves(self, *, fresh: bool) -> File:
        path = self._directory / "leaves"
        if not self._fs.exists(path):
            return self._fs.create(path, private=True)
        file = self._fs.open(path, write=True)
        if fresh:
            file.truncate(0)
        return file

    def put(self, record: JournalRecord) -> None:
        self._put_digests(record)
        first_leaf = record.first_grain // self._state.disk.grains_per_leaf
        for start, stop in consecutive(record.leaves):
            self._update.put(first_leaf + int(record.leaves[start]), record.leaf_digests[start:stop])

    def _put_digests(self, record: JournalRecord) -> None:
        """Read, change and write the window's digests; a window of zeros becomes a hole, which a scan skips."""
        window = record.first_grain // self._window
        digests = self._table.window(window)
        if window == self._cut:
            self._cut = -1  # checked before it was cut
        elif self._from_base:
            self._table.check(window, digests)
        digests[record.grains] = record.grain_digests
        self._table.write(window, digests)

    def finish(self, expected: bytes) -> None:
        """Complete the tree, compare its root with `expected`, and make everything durable."""
        disk = self._state.disk
        if self._cut >= 0:
            self._table.write(self._cut, self._table.window(self._cut))
        if self._shrinks:
            self._update.truncate(disk.count_leaves)
        root = self._update.root(disk.size_bytes)
        if root != expected:
            raise DamageError(
                f"the Merkle tree of disk {disk.name!r} in {self._directory} is damaged",
                hint="the next sync reads the disk anew",
            )
        self._table.sync()
        self._leaves.sync()
        self._fs.sync_directory(self._directory)
        self._table.write_id(self._result)
        self._table.sync()

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *_: object) -> None:
        self._table.close()
        self._leaves.close()


def _of_base(fs: FileSystem, directory: Path, before: Disk, after: Disk, base: DeltaId, result: DeltaId) -> DigestTable:
    """The digests that are `base`'s, or on their way to `result`. Raises TrackerDamageError if they never were."""
    table = DigestTable.open(fs, directory, before, write=True)
    if table is None:
        raise TrackerDamageError(f"what is known of disk {before.name!r} is damaged: files are gone ({directory})")
    found = table.read_id()
    resizing = before.size_bytes != after.size_bytes and found != base
    if not (table.fits or resizing) or not (_is_between(base, found) or _is_between(result, found)):
        table.close()
        raise table.damaged("the digests are those of another state")
    return table


def _is_between(delta_id: DeltaId, found: DeltaId) -> bool:
    """Is `found` this id or nil, or one torn while the other was being written over it?"""
    pairs = zip(delta_id.bytes, found.bytes, strict=True)
    return all(there in (0, expected) for expected, there in pairs)
