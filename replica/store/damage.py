"""Damage marks: which leaves of the head are known to be rotten. `marks/damage`, replaced atomically.

A mark is made where a leaf's content is not what its Merkle tree says: by `verify`
in whatever process, and by a commit that meets one. It stands until the leaf was
repaired, found good after all, or replaced. The sender is told of it and sends the
leaf again (`repair`); a point that reads it is listed as not restorable. So marks
are hints with a price, never proof: whoever acts on one looks at the leaf again.

A tree whose inner nodes do not fit is marked as a whole (`trees`): the next commit
makes it anew.

Writers of the document hold `damage.lock` for a moment, because `verify` runs beside
the process that has the replica's lock. A document that is damaged counts as empty:
what it said is found again by the next look at the leaf.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

from replica import documents
from replica.delta.ranges import Range, difference, union
from replica.durable import FileSystem
from replica.errors import FormatError
from replica.model import DamagedLeaves, Disk, DiskId, Frozen
from replica.store.layout import Layout
from replica.store.marks import Marks as RetentionMarks
from replica.store.verify import DiskVerdict

MAX_RANGES = 4096
"""With more of them a disk's are made one, from its first to its last: a mark too many costs a look, no more."""


class Marks(Frozen, frozen=True):
    """The document. `leaves` are sorted by disk and leaf, disjoint, and do not touch."""

    leaves: tuple[DamagedLeaves, ...] = ()
    trees: tuple[DiskId, ...] = ()

    def of(self, disk_id: DiskId) -> tuple[DamagedLeaves, ...]:
        return tuple(leaves for leaves in self.leaves if leaves.disk_id == disk_id)


def load(fs: FileSystem, layout: Layout) -> Marks:
    """The marks; none where there is no readable document. Raises StorageError."""
    if not fs.exists(layout.damage):
        return Marks()
    with suppress(FormatError):
        return documents.load(fs, layout.damage, Marks)
    return Marks()


def note(fs: FileSystem, layout: Layout, leaves: Iterable[DamagedLeaves], trees: Iterable[DiskId] = ()) -> None:
    """Mark these as well, durably."""
    added, more = tuple(leaves), set(trees)
    if added or more:
        _change(fs, layout, lambda marks: Marks(joined((*marks.leaves, *added)), _sorted({*marks.trees, *more})))


def clear(fs: FileSystem, layout: Layout, leaves: Iterable[DamagedLeaves], trees: Iterable[DiskId] = ()) -> None:
    """These are good again, durably."""
    gone, less = tuple(leaves), set(trees)
    if gone or less:
        _change(fs, layout, lambda marks: Marks(without(marks.leaves, gone), _sorted({*marks.trees} - less)))


def note_verdicts(fs: FileSystem, layout: Layout, verdicts: Sequence[DiskVerdict]) -> None:
    """Mark what `verify` found."""
    leaves: list[DamagedLeaves] = []
    for verdict in verdicts:
        disk = verdict.disk
        for offset, length in verdict.mismatches:
            stop = -(-(offset + length) // disk.leaf_bytes)
            leaves.append(DamagedLeaves(disk.id, offset // disk.leaf_bytes, stop))
    note(fs, layout, leaves, [verdict.disk.id for verdict in verdicts if verdict.tree_unfit])


def overlapping(marks: Marks, disk: Disk, start: int, stop: int) -> list[tuple[int, int]]:
    """Marked bytes of a disk in [start, stop), as half-open ranges of whole leaves."""
    ranges = ((d.first * disk.leaf_bytes, d.stop * disk.leaf_bytes) for d in marks.of(disk.id))
    return [(first, last) for first, last in ranges if first < stop and start < last]


def joined(leaves: Iterable[DamagedLeaves]) -> tuple[DamagedLeaves, ...]:
    """Sorted, with what touches or overlaps made one, and bounded in number."""
    found: list[DamagedLeaves] = []
    for entry in sorted(leaves, key=lambda entry: (entry.disk_id.bytes, entry.first)):
        last = found[-1] if found else None
        if last is not None and last.disk_id == entry.disk_id and entry.first <= last.stop:
            found[-1] = DamagedLeaves(last.disk_id, last.first, max(last.stop, entry.stop))
        else:
            found.append(entry)
    if len(found) <= MAX_RANGES:
        return tuple(found)
    disks: dict[DiskId, DamagedLeaves] = {}
    for entry in found:
        first = disks.get(entry.disk_id, entry).first
        disks[entry.disk_id] = DamagedLeaves(entry.disk_id, first, entry.stop)
    return tuple(disks.values())


def without(leaves: Iterable[DamagedLeaves], gone: Sequence[DamagedLeaves]) -> tuple[DamagedLeaves, ...]:
    """What is left of `leaves`."""
    left: list[DamagedLeaves] = []
    cut = _by_disk(gone)
    for disk_id, ranges in _by_disk(leaves).items():
        rest = difference(union(sorted(ranges)), union(sorted(cut.get(disk_id, ()))))
        left += [DamagedLeaves(disk_id, first, stop) for first, stop in rest]
    return joined(left)


def _by_disk(leaves: Iterable[DamagedLeaves]) -> dict[DiskId, list[Range]]:
    found: dict[DiskId, list[Range]] = {}
    for entry in leaves:
        found.setdefault(entry.disk_id, []).append((entry.first, entry.stop))
    return found


def first_of(leaves: Iterable[DamagedLeaves], limit: int) -> tuple[DamagedLeaves, ...]:
    """The first `limit` leaves of them."""
    found: list[DamagedLeaves] = []
    for entry in leaves:
        if limit <= 0:
            break
        stop = min(entry.stop, entry.first + limit)
        found.append(DamagedLeaves(entry.disk_id, entry.first, stop))
        limit -= stop - entry.first
    return tuple(found)


def _sorted(disks: Iterable[DiskId]) -> tuple[DiskId, ...]:
    return tuple(sorted(disks, key=lambda disk_id: disk_id.bytes))


def _change(fs: FileSystem, layout: Layout, change: Callable[[Marks], Marks]) -> None:
    RetentionMarks(fs, layout).ensure()  # a directory without its document would count every point as locked
    with fs.lock(layout.damage_lock, wait=True):
        before = load(fs, layout)
        after = change(before)
        if after == Marks():
            fs.unlink(layout.damage)
        elif after != before:
            documents.save(fs, layout.damage, after)
