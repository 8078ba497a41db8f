"""What a delta is, seen from outside: two states, the disks it touches, segments in order.

A delta leads from the state `base` to the state `result`. Its *disk table* is
the sorted union of both states' disk ids; a segment names its disk by the
index in that table. A disk only in `result` was added (its base is empty,
size 0), one only in `base` was removed (its result is empty).

The canonical form, on which the laws hold (docs/FORMAT.md, "Canonical form").
For a disk that goes from `base_grains` to `result_grains`:

- extents lie inside `result_grains`, ascending, coalesced across the whole
  delta, and cut into segments by the one greedy rule in `pack`;
- an all-zero grain is a ZERO extent, never DATA;
- a grain at or after `base_grains` reads as zero by itself: ZERO extents
  there are omitted;
- LOST extents say that nobody has the content any more; only inverses have them,
  anywhere in `result_grains`, and `marks_lost` says that there are some;
- content is compared by whole, zero-padded grains. So bytes past the disk's
  end are zero in its last grain, and a delta that cuts a disk *inside* a grain
  carries that grain unless its cut-off part was zero already. This is what
  lets `compose` work without ever looking at a payload.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np

from replica import _native
from replica.delta.extents import DATA, LOST, ZERO, Rows, as_bytes, count_data, stop_of
from replica.delta.segment import MAX_EXTENTS, SEGMENT_RAW_BYTES, Segment
from replica.errors import FormatError, RootMismatchError
from replica.model import DeltaId, Disk, DiskId, DiskState, State
from replica.progress import Progress, silent


@dataclass(frozen=True)
class DiskChange:
    """One row of a delta's disk table: the disk before and after."""

    disk_id: DiskId
    before: Disk | None
    after: Disk | None

    @property
    def disk(self) -> Disk:
        """The newer description of the two."""
        disk = self.after or self.before
        assert disk is not None
        return disk

    @property
    def grain_bytes(self) -> int:
        return self.disk.grain_bytes

    @property
    def leaf_bytes(self) -> int:
        return self.disk.leaf_bytes

    @property
    def base_bytes(self) -> int:
        return self.before.size_bytes if self.before else 0

    @property
    def result_bytes(self) -> int:
        return self.after.size_bytes if self.after else 0

    @property
    def base_grains(self) -> int:
        return self.before.count_grains if self.before else 0

    @property
    def result_grains(self) -> int:
        return self.after.count_grains if self.after else 0


def disk_changes(base: State, result: State) -> tuple[DiskChange, ...]:
    """The disk table. FormatError if a disk changed its grain or leaf, or the replica is not the same one."""
    if base.replica_id != result.replica_id:
        raise FormatError("a delta leads from one replica's state to another replica's")
    before = {d.disk.id: d.disk for d in base.disks}
    after = {d.disk.id: d.disk for d in result.disks}
    changes = tuple(DiskChange(i, before.get(i), after.get(i)) for i in sorted(before.keys() | after.keys()))
    for c in changes:
        if c.before and c.after and (c.before.grain_bytes, c.before.leaf_bytes) != (c.grain_bytes, c.leaf_bytes):
            raise FormatError(f"disk {c.disk.name!r} changes its grain or leaf size, which no delta can express")
    return changes


class Delta(Protocol):
    """A delta that can be walked as often as needed. `DeltaFileReader` and `MemoryDelta` are ones."""

    @property
    def delta_id(self) -> DeltaId: ...
    @property
    def base(self) -> State: ...
    @property
    def result(self) -> State: ...
    @property
    def disks(self) -> tuple[DiskChange, ...]: ...
    @property
    def marks_lost(self) -> bool:
        """Whether there may be LOST extents in it; where this is not said, they are refused."""
        ...

    def segments(self) -> Iterator[Segment]:
        """Every segment in number order, whole and checked."""
        ...

    def extents(self) -> Iterator[tuple[int, Rows]]:
        """(disk index, rows) of every segment in number order, without its payload."""
        ...


@dataclass(frozen=True)
class MemoryDelta:
    """A delta held in memory. Equal when everything in it is equal."""

    delta_id: DeltaId
    base: State
    result: State
    parts: tuple[Segment, ...] = field(default=())

    @cached_property
    def disks(self) -> tuple[DiskChange, ...]:
        return disk_changes(self.base, self.result)

    @cached_property
    def marks_lost(self) -> bool:
        return any((s.extents["data"] == LOST).any() for s in self.parts)

    def segments(self) -> Iterator[Segment]:
        return iter(self.parts)

    def extents(self) -> Iterator[tuple[int, Rows]]:
        return ((s.disk, s.extents) for s in self.parts)

    @classmethod
    def of(cls, delta: Delta) -> MemoryDelta:
        return cls(delta.delta_id, delta.base, delta.result, tuple(delta.segments()))


def check_rows(change: DiskChange, rows: Rows, *, lost: bool = False) -> None:
    """FormatError unless the rows of one segment are canonical for this disk. `lost`: whether LOST may be there."""
    name = change.disk.name
    if not 0 < len(rows) <= MAX_EXTENTS or (rows["count"] == 0).any():
        raise FormatError(f"a segment of disk {name!r} has a bad number of extents or an empty extent")
    if (rows["data"] > (LOST if lost else DATA)).any():
        raise FormatError(f"a segment of disk {name!r} has lost extents, which only a replica's own inverses may have")
    ends = rows["first"] + rows["count"]
    if (ends < rows["first"]).any() or (ends[:-1] > rows["first"][1:]).any():
        raise FormatError(f"extents of disk {name!r} are not ascending")
    if ((ends[:-1] == rows["first"][1:]) & (rows["data"][:-1] == rows["data"][1:])).any():
        raise FormatError(f"extents of disk {name!r} touch and are not one")
    if stop_of(rows) > change.result_grains:
        raise FormatError(f"extents of disk {name!r} reach past its end")
    if (ends[rows["data"] == ZERO] > change.base_grains).any():
        raise FormatError(f"zero extents of disk {name!r} reach past the base's end")


def check_segment(change: DiskChange, segment: Segment, *, lost: bool = False) -> None:
    """FormatError unless rows and payload of a segment are canonical for this disk. `lost` as in `check_rows`."""
    check_rows(change, segment.extents, lost=lost)
    grain, name = change.grain_bytes, change.disk.name
    payload = as_bytes(segment.payload)
    if len(payload) != count_data(segment.extents) * grain or len(payload) > SEGMENT_RAW_BYTES:
        raise FormatError(f"a segment of disk {name!r} has {len(payload)} bytes of data, not what its extents say")
    if not len(payload):
        return
    zero = np.empty(len(payload) // grain, dtype=np.uint8)
    _native.zeros(payload.data, grain, zero.data)
    if zero.any():
        raise FormatError(f"a segment of disk {name!r} carries a grain of zeros as data")
    tail = change.result_grains * grain - change.result_bytes
    last = segment.extents[-1]
    if tail and last["data"] == DATA and stop_of(segment.extents) == change.result_grains and payload[-tail:].any():
        raise FormatError(f"disk {name!r} has content past its end")


def check_roots(roots: tuple[DiskState, ...], result: State) -> tuple[DiskState, ...]:
    """The roots, if they are those that `result` names. RootMismatchError."""
    for found, named in zip(roots, result.disks, strict=True):
        if found.root != named.root:
            raise RootMismatchError(
                f"disk {named.disk.name!r} would not be what delta {result.delta_id} promises: its Merkle root is "
                f"{found.root.hex()[:16]}… and not {named.root.hex()[:16]}…"
            )
    return roots


def total_bytes(delta: Delta, progress: Progress) -> int:
    """Bytes of data in the delta, for the progress; not worth opening every table when nobody watches."""
    if progress is silent:
        return 0
    return sum(count_data(rows) * delta.disks[disk].grain_bytes for disk, rows in delta.extents())
