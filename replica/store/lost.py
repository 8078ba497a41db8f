"""What is lost of the points that are listed: one walk along the chain, from the head to the oldest.

At the head it is what the marks say (`damage`; nobody looks at those leaves here). Each inverse on the way takes away
what it has itself, and adds what it names as LOST. What of it does not open cannot be read at the point that it leads
to, nor at older ones that read it through that one; nearer inverses shadow it like everything else (`owners`).

    ranges at the newer state  −  the inverse's extents  +  its LOST ones  =  ranges at the older state

An inverse is opened only if there is anything to follow, and once for all the points behind it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

from replica.delta import DeltaFileReader, Keyring
from replica.delta.change import DiskChange
from replica.delta.extents import LOST
from replica.delta.ranges import Range, difference, union
from replica.durable import FileSystem
from replica.errors import DamageError, StorageError
from replica.model import DeltaId, DiskId, State
from replica.store import damage
from replica.store.damage import Marks
from replica.store.layers import MovedError
from replica.store.points import Chain, Link


@dataclass(frozen=True, slots=True)
class Losses:
    """Of one disk at one state, bytes, ascending: what nobody has any more, and what is in a damaged segment."""

    gone: tuple[Range, ...] = ()
    unreadable: tuple[Range, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.gone or self.unreadable)


Found = dict[DiskId, Losses]


def losses(fs: FileSystem, keyring: Keyring, chain: Chain, marks: Marks) -> dict[DeltaId, Found]:
    """For the head's state and every one on the way: the disks with losses. MovedError: look for the chain anew."""
    found: Found = {}
    for entry in chain.top.disks:
        size = entry.disk.size_bytes
        ranges = ((start, min(stop, size)) for start, stop in damage.overlapping(marks, entry.disk, 0, size))
        found[entry.disk.id] = Losses(tuple(union(ranges)))
    found = _some(found)
    states = {chain.top.delta_id: found}
    for link in chain.links:
        if found or link.lost:
            found = _some(_behind(fs, keyring, link, found))
        states[link.result.delta_id] = found
    return states


def _some(found: Found) -> Found:
    return {disk_id: losses for disk_id, losses in found.items() if losses}


def _behind(fs: FileSystem, keyring: Keyring, link: Link, found: Found) -> Found:
    """The losses of the state that the inverse leads to."""
    try:
        with DeltaFileReader(fs.open(link.path), keyring) as reader:
            if (reader.base, reader.result) != (link.base, link.result):
                raise MovedError
            return {
                change.disk_id: _of_disk(reader, place, change, found.get(change.disk_id, Losses()))
                for place, change in enumerate(reader.disks)
                if change.after is not None
            }
    except (DamageError, StorageError):
        if not fs.exists(link.path):
            raise MovedError from None
        return _all_of(link.result)


def _all_of(state: State) -> Found:
    return {d.disk.id: Losses((), ((0, d.disk.size_bytes),)) for d in state.disks if d.disk.size_bytes}


def _of_disk(reader: DeltaFileReader, place: int, change: DiskChange, newer: Losses) -> Losses:
    grain, size = change.grain_bytes, change.result_bytes
    before = newer if change.before is not None else Losses()
    followed = list(union(before.gone, before.unreadable))
    own: list[Range] = []
    gone: list[Range] = []
    broken: list[Range] = []
    for number in reader.overlapping(place, 0, change.result_grains):
        first, stop = (edge * grain for edge in reader.span(number))
        if not (reader.marks_lost or _touches(followed, first, stop)):
            continue
        try:
            rows = reader.table(number).extents
        except DamageError:
            own.append((first, stop))
            broken.append((first, stop))
            continue
        for start, count, kind in rows.tolist():
            own.append((start * grain, (start + count) * grain))
            if kind == LOST:
                gone.append(own[-1])
    held = list(union(own))
    return Losses(
        _cut(union(difference(before.gone, held), gone), size),
        _cut(union(difference(before.unreadable, held), broken), size),
    )


def _touches(ranges: list[Range], start: int, stop: int) -> bool:
    """Whether any of the ascending ranges does."""
    at = bisect_right(ranges, (start, start))
    return any(a < stop and start < b for a, b in ranges[max(0, at - 1) : at + 1])


def _cut(ranges: Iterable[Range], size: int) -> tuple[Range, ...]:
    return tuple((start, min(stop, size)) for start, stop in ranges if start < size)
