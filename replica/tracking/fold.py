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
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from replica.durable import File, FileSystem
from replica.errors import DamageError
from replica.merkle import FileNodes, MerkleTree
from replica.model import EMPTY_DELTA_ID, DeltaId, DiskState
from replica.tracking.digests import WindowHashes, damaged, file_bytes, read_id, write_id
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
        with Target(fs, directory, state, base, summary.result.delta_id) as target:
            while record is not None and record.disk == index:
                target.put(record)
                record = next(records, None)
            target.finish(state.root)


class Target:
    """The trackers of one disk, being changed from `base` (None: from nothing) to `result`."""

    def __init__(
        self, fs: FileSystem, directory: Path, state: DiskState, base: DeltaId | None, result: DeltaId
    ) -> None:
        self._fs, self._directory, self._state, self._result = fs, directory, state, result
        self._window = grains_per_window(state.disk)
        self._digests = self._open("digests", base is None)
        try:
            self._begin(base, result)
            self._leaves = self._open("leaves", base is None)
        except BaseException:
            self._digests.close()
            raise
        self._update = MerkleTree(FileNodes(self._leaves), state.disk.leaf_bytes).update(write=True)

    def _begin(self, base: DeltaId | None, result: DeltaId) -> None:
        """From here on the digests are nobody's, durably. Raises TrackerDamageError if they never were `base`'s."""
        disk, self._from_base = self._state.disk, False
        if base is None:
            self._digests.truncate(file_bytes(disk))
        else:
            found = read_id(self._digests, disk)
            if self._digests.size() != file_bytes(disk) or not (_is_between(base, found) or _is_between(result, found)):
                raise damaged(disk, self._digests, "the digests are those of another state")
            self._from_base = found == base
            write_id(self._digests, disk, EMPTY_DELTA_ID)
        self._digests.sync()
        self._hashes = WindowHashes(self._digests, disk)

    def _open(self, name: str, fresh: bool) -> File:
        path = self._directory / name
        if not self._fs.exists(path):
            self._fs.make_directory(self._directory, private=True)
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
        offset = record.first_grain * 8
        digests = np.zeros(min(self._window, self._state.disk.count_grains - record.first_grain), "<u8")
        self._digests.read_into(offset, digests.data)
        window = record.first_grain // self._window
        if self._from_base:
            self._hashes.check(window, digests)
        digests[record.grains] = record.grain_digests
        if digests.any():
            self._digests.write(offset, digests.data)
        else:
            self._digests.zero(offset, digests.nbytes)
        self._hashes.write(window, digests)

    def finish(self, expected: bytes) -> None:
        """Complete the tree, compare its root with `expected`, and make everything durable."""
        disk = self._state.disk
        root = self._update.root(disk.size_bytes)
        if root != expected:
            raise DamageError(
                f"the Merkle tree of disk {disk.name!r} in {self._directory} is damaged",
                hint="the next sync reads the disk anew",
            )
        self._digests.sync()
        self._leaves.sync()
        self._fs.sync_directory(self._directory)
        write_id(self._digests, disk, self._result)
        self._digests.sync()

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *_: object) -> None:
        self._digests.close()
        self._leaves.close()


def _is_between(delta_id: DeltaId, found: DeltaId) -> bool:
    """Is `found` this id or nil, or one torn while the other was being written over it?"""
    pairs = zip(delta_id.bytes, found.bytes, strict=True)
    return all(there in (0, expected) for expected, there in pairs)
