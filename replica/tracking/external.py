"""Trackers that are not ours: a hypervisor knows what was written, and an integration hands it in.

Asked between freeze and thaw, a `Tracker` does two things at once: it says which
grains may have been written since an earlier state was read, and it remembers
this instant under the name that the next state will have.

    tracker.dirty(since, mark, disks)

There is no call that says whether the state became a point: the next question
does. Its `since` is the state that the replica really holds; a tracker that has no
mark of that name (it was lost, its log overflowed, it belongs to another host)
answers None, and the disk is hashed whole. Marks that are not `since` may be
forgotten when asked. So no answer of an earlier life can be taken for this one's.
Where what the replica holds is no instant (nothing, or a part of a copy), `since`
is `EMPTY_DELTA_ID`, which is nobody's mark: then the question is only to remember.

What is answered is believed only as far as the audit finds it true (`audit`).
And only of a disk that has the name, and is read from the image, that it had
when it was last read whole or believed: a tracker is asked by name, and what it
knows may be of the disk that had the name before.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Protocol

from replica.bitmap import DirtyBitmap
from replica.model import MAX_NAME_BYTES, DeltaId, Disk

_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """A source of dirty bitmaps for one machine. Called by one thread at a time."""

    @property
    def name(self) -> str:
        """What it is, such as `hyperv-rct`: named in every point that relies on it. 1 to 128 characters."""
        ...

    def dirty(self, since: DeltaId, mark: DeltaId, disks: Sequence[Disk]) -> Mapping[str, DirtyBitmap | None]:
        """Disk name -> grains that may have changed since the state `since` was read; remember now as `mark`.

        Over-reporting is allowed, under-reporting never. None, no entry, or an exception: not known, hash all.
        """
        ...


def ask(
    tracker: Tracker, since: DeltaId, mark: DeltaId, disks: Sequence[Disk], before: Sequence[Disk | None]
) -> list[DirtyBitmap | None]:
    """What the tracker says of each disk, never more than can be used. `before`: the disks as they were at `since`."""
    try:
        if not 0 < len(tracker.name) <= MAX_NAME_BYTES:
            raise ValueError("a tracker's name has 1 to 128 characters")
        answers = tracker.dirty(since, mark, tuple(disks))
        found = [answers.get(disk.name) for disk in disks]
    except Exception as error:  # noqa: BLE001 - whatever a foreign tracker does wrong costs a full hash, and no point
        _log.warning("tracker %r failed, every disk is hashed whole: %r", getattr(tracker, "name", tracker), error)
        return [None] * len(disks)
    return [_usable(bitmap, disk, old) for bitmap, disk, old in zip(found, disks, before, strict=True)]


def _usable(bitmap: DirtyBitmap | None, disk: Disk, before: Disk | None) -> DirtyBitmap | None:
    """The bitmap with what a change of size touches marked, too; None if it is not this disk's."""
    if bitmap is None or before is None or before.name != disk.name:
        return None
    if not isinstance(bitmap, DirtyBitmap) or bitmap.count_grains != disk.count_grains:
        _log.warning("a tracker's bitmap is not of disk %r as it is now; the disk is hashed whole", disk.name)
        return None
    if before.size_bytes != disk.size_bytes and disk.count_grains:
        bitmap = bitmap.copy()
        first = max(0, min(before.count_grains, disk.count_grains) - 1)
        bitmap.set(first, disk.count_grains - first)
    return bitmap
