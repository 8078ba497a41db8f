"""apply: a delta becomes the head, and leaves behind the delta that leads back.

Three streaming passes, so that the store can put its durability barriers
between them (docs/ARCHITECTURE.md, "Commit"):

    prepare(head, delta, sink)      reads only. Every leaf that will change is read and checked against the tree;
                                    the inverse's segments go to `sink`, from those same buffers; the roots that
                                    will result are computed and compared with the manifest's.
    write(head, delta)              the disks and the extents. Reads nothing; may be repeated.
    head.flush()
    settle(head, delta, inverse)    what changed is read back, the tree rewritten, the roots compared again.
                                    May be repeated.

Rolling back is `write(head, inverse)` and `settle(head, inverse, delta)`.

Why `settle` takes both deltas. It must know which leaves may differ from what
the tree says, also when an earlier `settle` was interrupted and the tree is half
written; so it must not ask the tree. A leaf changes only if it gets data or
loses data, that is where the delta or its inverse has a DATA extent (or a LOST
one: data was lost there). (And the leaf at the smaller of the two sizes, and all behind the end if the disk shrank.)
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Protocol

import numpy as np

from replica.delta.change import Delta, DiskChange, MemoryDelta, check_roots, total_bytes
from replica.delta.extents import DATA, Rows, as_bytes, count_data
from replica.delta.head import Head, MemoryHead
from replica.delta.leaves import PIECE_BYTES, ByDisk, leaf_runs, ranges_of
from replica.delta.prepare import THREADS, prepare
from replica.delta.ranges import union
from replica.delta.segment import Segment
from replica.errors import LostError
from replica.merkle import Digests, Leaves, leaf_digests_at
from replica.model import DeltaId, DiskState, random_id
from replica.pipeline import Bytes, in_order
from replica.progress import Progress, silent


class Extents(Protocol):
    """Where a delta has extents: all that `settle` wants to know of the other direction."""

    def extents(self) -> Iterator[tuple[int, Rows]]: ...


def write(head: Head, delta: Delta, progress: Progress = silent) -> None:
    """Pass 2: the disks, then every extent. Reads nothing of the head, so it may be repeated after any crash.

    Call it only with a delta that `prepare` accepted, or with an inverse. LostError, and nothing is changed, if
    content that nobody has would have to be written; StorageError, and the head may then be half written.
    """
    if delta.marks_lost:
        raise LostError(
            f"state {delta.result.delta_id} cannot be made again: damage took some of it before it was overwritten"
        )
    head.set_disks([c.after for c in delta.disks if c.after])
    total, done = total_bytes(delta, progress), 0
    for segment in delta.segments():
        change = delta.disks[segment.disk]
        _write_rows(head, change, segment.extents, as_bytes(segment.payload).data)
        done += segment.raw_bytes
        progress(done, total)


def _write_rows(head: Head, change: DiskChange, rows: Rows, payload: memoryview) -> None:
    grain, size = change.grain_bytes, change.result_bytes
    places: list[tuple[int, int]] = []
    for first, count, data in rows.tolist():
        offset = first * grain
        length = min(count * grain, size - offset)
        if data == DATA:
            places.append((offset, length))
        else:
            head.zero(change.disk_id, offset, length)
    head.write_ranges(change.disk_id, places, payload)


def settle(head: Head, delta: Delta, inverse: Extents, progress: Progress = silent) -> tuple[DiskState, ...]:
    """Pass 3, after `head.flush()`: read back what changed, rewrite the tree. Returns disks and roots.

    `inverse` is the other direction (see the module's docstring); its content is not read, only where it has DATA.
    RootMismatchError if a root is not the manifest's: what was written is not what is there.
    """
    total, done, roots = total_bytes(delta, progress), 0, []
    forth, back = ByDisk(delta.extents()), ByDisk(inverse.extents())
    for index, change in enumerate(delta.disks):
        per_leaf = change.leaf_bytes // change.grain_bytes
        counted = _Counted(forth.take(index), change.grain_bytes)
        runs = union(leaf_runs(counted, per_leaf), leaf_runs(back.take(index), per_leaf), _boundary_leaf(change))
        if change.after is None:
            for _ in runs:
                pass
            continue
        update = head.tree(change.disk_id).update(write=True)
        with closing(_read_back(head, change, runs)) as found:
            for leaves, digests in found:
                update.put_at(leaves, digests)
                progress(done + counted.data_bytes, total)
        done += counted.data_bytes
        if change.result_bytes < change.base_bytes:
            update.truncate(change.after.count_leaves)
        roots.append(DiskState(change.after, update.root(change.result_bytes)))
    return check_roots(tuple(roots), delta.result)


class _Counted:
    """Passes rows on and counts their data."""

    def __init__(self, rows: Iterator[Rows], grain_bytes: int) -> None:
        self._rows, self._grain_bytes, self.data_bytes = rows, grain_bytes, 0

    def __iter__(self) -> Iterator[Rows]:
        for rows in self._rows:
            yield rows
            self.data_bytes += count_data(rows) * self._grain_bytes


def _boundary_leaf(change: DiskChange) -> list[tuple[int, int]]:
    """The leaf in which a resized disk ended or will end: it may lose what was behind the end."""
    smaller = min(change.base_bytes, change.result_bytes)
    if change.base_bytes == change.result_bytes or not smaller % change.leaf_bytes:
        return []
    leaf = smaller // change.leaf_bytes
    return [(leaf, leaf + 1)]


def _read_back(head: Head, change: DiskChange, runs: Iterator[tuple[int, int]]) -> Generator[tuple[Leaves, Digests]]:
    """Numbers and digests of the leaves in `runs` that are inside the disk, a piece at a time, by several threads."""
    assert change.after is not None

    def look(leaves: Leaves, memory: Bytes) -> tuple[Leaves, Digests]:
        places = ranges_of(leaves, change.leaf_bytes, change.result_bytes)
        buffer = memory[: sum(length for _, length in places)]
        head.read_ranges(change.disk_id, places, buffer.data)
        return leaves, leaf_digests_at(buffer.data, leaves, change.leaf_bytes)

    gathered = _gathered(runs, change.after.count_leaves, PIECE_BYTES // change.leaf_bytes)
    return in_order(look, gathered, PIECE_BYTES, THREADS)


def _gathered(runs: Iterator[tuple[int, int]], stop_leaf: int, most: int) -> Iterator[Leaves]:
    """The numbers of the leaves in ascending runs, at most so many at a time."""
    parts: list[Leaves] = []
    room = most
    for first, stop in runs:
        at, stop = first, min(stop, stop_leaf)
        while at < stop:
            end = min(stop, at + room)
            parts.append(np.arange(at, end))
            room -= end - at
            at = end
            if not room:
                yield np.concatenate(parts)
                parts, room = [], most
    if parts:
        yield np.concatenate(parts)


def apply(head: MemoryHead, delta: Delta) -> MemoryDelta:
    """All passes on a head in memory; returns the inverse, under an id of its own. Raises as `prepare` does."""
    parts: list[Segment] = []
    prepare(head, delta, parts.append)
    inverse = MemoryDelta(DeltaId(random_id()), delta.result, delta.base, tuple(parts))
    write(head, delta)
    settle(head, delta, inverse)
    head.commit(delta.result)
    return inverse
