"""The audit: whether what was reported clean is clean.

A tracker that misses a write is worse than none: every later point lacks it, and
nothing looks wrong. So nobody is believed for ever.

- Of the grains that a tracker reports clean, a random *sample* is read and hashed
  in every cycle. It finds a tracker that misses much, soon.
- A *rolling pass* goes through all windows of a disk within a period: each is
  read, its grains compared with their digests, and its leaves hashed anew and
  compared with the tree. It finds everything, late. It also watches the hash
  tracker itself, whose unchanged leaves are otherwise never recomputed.

A miss is an `AuditMissError`: the cycle notes it durably, distrusts that tracker
for the disk, reads the disk whole, and the point it makes carries a note.

What a point says of itself (`model.DiskState`), and what *recomputed* means: a
leaf is recomputed at a point when every byte of it that the image has allocated
was read at that instant, and it was either hashed with BLAKE3 or every grain of
it had the keyed digest that was stored when that leaf was hashed. What the image
has not allocated is zero by the image's definition. So after a scan that hashed
all, `read_point` is the point itself and nothing was trusted but 64-bit keyed
digests; where a tracker's word was taken, it stays what it was until the rolling
pass has gone round, and then is the point at which that round began.

Pure: plans and odds are arithmetic on what is given.

    odds(grains, missed, sample, cycles)    1 - (1 - missed / grains) ^ (sample · cycles)
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from replica.bitmap import DirtyBitmap
from replica.model import MAX_TRACKERS, Disk, DiskId, DiskState, Frozen
from replica.tracking.digests import count_windows

HASH = "hash"
"""The name of the tracker that reads everything."""
ANYBODY = "*"
"""Among those that are distrusted: every integration's tracker."""
DEFAULT_PERIOD_SECONDS = 7 * 86400.0
DEFAULT_SAMPLE = 1024
MAX_ALERTS = 8


class DiskAudit(Frozen, frozen=True, omit_defaults=True):
    """How far the rolling pass over one disk has come; `started_point`: for which point its first window was read."""

    disk: DiskId
    cursor: int = 0
    started_ns: int = 0
    started_point: int = 0
    distrusted: tuple[str, ...] = ()


class AuditAlert(Frozen, frozen=True):
    """A miss that was found: of which disk, by whom, and in the cycle that made which point."""

    disk: str
    tracker: str
    point: int
    at_ns: int
    message: str


@dataclass(frozen=True)
class AuditPlan:
    """What one scan checks besides: the rolling pass's windows, and how many clean grains at random."""

    windows: range = range(0)
    sample: int = 0
    tracker: str = HASH
    random: random.Random = field(default_factory=random.SystemRandom)


def plan_windows(audit: DiskAudit, disk: Disk, now_ns: int, ahead_seconds: float, period_seconds: float) -> range:
    """The windows that are due now, if the next cycle comes `ahead_seconds` from now. Often none.

    A round takes the period less one cycle, and no window is read before it is due: so none waits longer than the
    period for its next turn, however fast or slowly cycles came in the rounds before.
    """
    total = count_windows(disk)
    first = min(audit.cursor, total)
    elapsed = max(0.0, (now_ns - audit.started_ns) / 1e9) if audit.started_ns else 0.0
    due = math.ceil(total * min(1.0, (elapsed + ahead_seconds) / _round_seconds(ahead_seconds, period_seconds)))
    return range(first, max(first, due))


def _round_seconds(ahead_seconds: float, period_seconds: float) -> float:
    return max(1.0, period_seconds - ahead_seconds)


def on_clock(audit: DiskAudit, disk: Disk, now_ns: int, ahead_seconds: float, period_seconds: float) -> DiskAudit:
    """The audit by a clock that may have been set back.

    A round that began in the future would wait until then, which may be years. It goes on where it is, as if it had
    begun so long ago as it takes to come there.
    """
    if audit.started_ns <= now_ns:
        return audit
    total = count_windows(disk)
    done = min(audit.cursor, total) / total if total else 0.0
    ago_ns = int(done * _round_seconds(ahead_seconds, period_seconds) * 1e9)
    return msgspec.structs.replace(audit, started_ns=max(1, now_ns - ago_ns))


def advanced(audit: DiskAudit, disk: Disk, windows: range, point: int, now_ns: int, *, full: bool) -> DiskAudit:
    """After the point was committed. `full`: all of the disk was read, so nobody is distrusted any more."""
    distrusted = () if full else audit.distrusted
    started_ns, started_point = audit.started_ns or now_ns, audit.started_point or point
    if goes_round(disk, windows):
        return DiskAudit(audit.disk, 0, now_ns, 0, distrusted)
    return DiskAudit(audit.disk, windows.stop, started_ns, started_point, distrusted)


def goes_round(disk: Disk, windows: range) -> bool:
    """Whether these windows end the round."""
    return windows.stop >= count_windows(disk)


def read_state(
    disk: Disk, root: bytes, base: DiskState | None, audit: DiskAudit, windows: range, point: int, tracker: str | None
) -> DiskState:
    """The disk's state, with how far it was read. `tracker`: whose word was taken in this cycle; None: all was read."""
    if tracker is None or base is None:
        return DiskState(disk, root, point)
    read_point = base.read_point
    if goes_round(disk, windows):
        read_point = max(read_point, audit.started_point or point)
    return DiskState(disk, root, read_point, tuple(sorted({*base.trusted, tracker})))


def can_name(base: DiskState | None, tracker: str) -> bool:
    """Whether a point may rely on this tracker: only so many can be named in it."""
    return base is not None and len({*base.trusted, tracker}) <= MAX_TRACKERS


def sample_clean(candidates: DirtyBitmap, count: int, source: random.Random) -> list[int]:
    """At most `count` distinct grains that are reported clean, ascending; all of them if there are no more."""
    clean = candidates.count_grains - candidates.count_dirty
    if clean <= count:
        return list(_clean(candidates))
    found: set[int] = set()
    while len(found) < count:
        grain = source.randrange(candidates.count_grains)
        if grain not in candidates:
            found.add(grain)
        elif clean < candidates.count_grains // 64:  # hardly any is clean: guessing would take for ever
            ranks = set(source.sample(range(clean), count))
            return [grain for rank, grain in enumerate(_clean(candidates)) if rank in ranks]
    return sorted(found)


def _clean(candidates: DirtyBitmap) -> Iterator[int]:
    at = 0
    for first, count in candidates.runs():
        yield from range(at, first)
        at = first + count
    yield from range(at, candidates.count_grains)


def odds(count_grains: int, missed: int, sample: int, cycles: int = 1) -> float:
    """How likely a sample finds a tracker that misses `missed` of the grains it reports clean, within some cycles.

    A sample without replacement is a little better than this; where it is small beside the disk, hardly.
    """
    if missed <= 0 or count_grains <= 0:
        return 0.0
    if missed >= count_grains or sample >= count_grains:
        return 1.0
    return -math.expm1(sample * cycles * math.log1p(-missed / count_grains))


def sample_for(count_grains: int, missed: int, certainty: float, cycles: int = 1) -> int:
    """How many grains a cycle must look at, so that `cycles` of them find such a tracker with that certainty."""
    if not 0 < certainty < 1 or not 0 < missed < count_grains:
        raise ValueError("a certainty lies between 0 and 1, and some but not all grains are missed")
    return min(count_grains, math.ceil(math.log1p(-certainty) / (cycles * math.log1p(-missed / count_grains))))


def find(audits: tuple[DiskAudit, ...], disk: DiskId) -> DiskAudit:
    return next((audit for audit in audits if audit.disk == disk), DiskAudit(disk))


def distrust(audits: tuple[DiskAudit, ...], disk: DiskId, tracker: str = ANYBODY) -> tuple[DiskAudit, ...]:
    """Note that this tracker is not to be believed of the disk until all of it was read."""
    audit = find(audits, disk)
    changed = msgspec.structs.replace(audit, distrusted=tuple(sorted({*audit.distrusted, tracker})))
    return (*(other for other in audits if other.disk != disk), changed)
