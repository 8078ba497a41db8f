"""Which points stay: a pure function of the points, the policy, the locks and the receiver's time.

    decision = decide(points, policy, now, locked)
    decision.verdicts           every point, oldest first: keep, compose or drop, and why
    decision.drops              states whose inverses go from the old end, oldest first
    decision.runs               runs of states between two that stay; each is composed away at once

Buckets are by the receiver's time at which a point was committed; what the sender calls its freeze time decides
nothing. Of a bucket the *first* point is kept: later ones cannot take its place, however many arrive, and the first of
a day is the first of its first hour, so that the kinds nest. The `n` buckets that count are the last ones that have a
point; an outage costs none.

Points that follow each other and have equal disks and roots are one group: it counts once, its first and its newest
point stay, those between go. Where points that go had parted two groups of equal content, these become one; so the
rules are applied to what stays until nothing changes any more, and a second decision drops nothing that the first kept.

`min_count` and `min_age_seconds` are floors: no shortage of space goes below them, nor below a lock or the newest
point. What time buckets hold is given up for space only where the policy says `shed_buckets`; else a sender could push
good points out by filling the storage.

A run is composed once its bucket is *closed*: when no point that newer ones will push out soon is left in it. Composing
point by point would write what remains of the bucket again for each of them.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from replica.model import DeltaId, Frozen, Stamp

DEFAULT_KEEP_LAST = 24
DEFAULT_HOURLY = 24
MAX_KEPT = 100_000
MAX_WAITING = 256
"""States that wait for their bucket to close, or steps for their point, at most: a chain must not grow without bound
because a clock stands or a sender makes no point."""
KINDS = ("hourly", "daily", "weekly", "monthly", "yearly")
FLOODABLE = (
    "it has no time buckets and no min_age, so enough new points push out all others but locked ones; "
    "add `hourly` or `min_age`"
)
_SECOND_NS = 1_000_000_000


class Policy(Frozen, frozen=True):
    """How many points of which kind stay. Zero: none for that reason."""

    keep_last: int = DEFAULT_KEEP_LAST
    hourly: int = DEFAULT_HOURLY
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    min_count: int = 1
    min_age_seconds: float = 0
    shed_buckets: bool = False

    def __post_init__(self) -> None:
        for name in ("keep_last", "min_count", *KINDS):
            least = 0 if name in KINDS else 1  # the newest point always stays
            if not least <= getattr(self, name) <= MAX_KEPT:
                raise ValueError(f"`{name}` must be {least} to {MAX_KEPT}")
        if not 0 <= self.min_age_seconds <= 100 * 366 * 86400:
            raise ValueError("`min_age` must be 0 to 100 years")

    @property
    def is_floodable(self) -> bool:
        """Whether enough new points push out all that were there before, but for locked ones."""
        return not any(getattr(self, kind) for kind in KINDS) and not self.min_age_seconds


DEFAULT_POLICY = Policy()


@dataclass(frozen=True, slots=True)
class Kept:
    """One state of the chain, as retention sees it.

    `content` is equal for states with equal disks and roots. `is_point` is false for steps of a long copy.
    `stored_bytes` is what its inverse takes. `committed` is when the receiver committed it.
    """

    delta_id: DeltaId
    number: int
    committed: Stamp
    content: Hashable = None
    stored_bytes: int = 0
    is_point: bool = True


class Action(StrEnum):
    """What happens to a point."""

    KEEP = "keep"
    COMPOSE = "compose"
    DROP = "drop"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What happens to one point and why. `waits`: no rule holds it, but its bucket is not closed yet."""

    delta_id: DeltaId
    number: int
    action: Action
    reason: str
    stored_bytes: int
    waits: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be done. The states of a run and of `drops` go oldest first."""

    verdicts: tuple[Verdict, ...]
    drops: tuple[DeltaId, ...]
    runs: tuple[tuple[DeltaId, ...], ...]


def bucket(kind: str, time_ns: int) -> str:
    """The bucket of a kind that a time (UTC) falls into: `2026-11-24 08`, `2026-11-24`, `2026-W48`, `2026-11`, `2026`.

    Weeks are those of ISO 8601: Monday to Sunday, the first has the year's first Thursday.
    """
    moment = datetime.fromtimestamp(time_ns // _SECOND_NS, UTC)
    if kind == "weekly":
        year, week, _ = moment.isocalendar()
        return f"{year:04}-W{week:02}"
    length = {"hourly": 13, "daily": 10, "monthly": 7, "yearly": 4}[kind]
    return moment.isoformat(sep=" ")[:length]


def decide(
    states: Sequence[Kept],
    policy: Policy,
    now: Stamp,
    locked: Mapping[DeltaId, str] | None = None,
    *,
    at_once: bool = False,
    shed_bytes: int = 0,
) -> Decision:
    """Decide about all states, oldest first; the last one is the head.

    `locked` are the points that a lock holds now, and how to call it. `at_once` composes what waits for its bucket.
    `shed_bytes`: space is short, give up points worth that much beyond what the policy would.
    """
    locked = locked or {}
    points = [state for state in states if state.is_point]
    gone: dict[DeltaId, str] = {}
    while True:
        kept = [point for point in points if point.delta_id not in gone]
        why = _hold(kept, policy, now, locked)
        unchanged = _unchanged(kept, why)
        lost = {p.delta_id: unchanged.get(p.delta_id, "no rule holds it") for p in kept if not why[p.delta_id]}
        if not lost:
            break
        gone |= lost
    if shed_bytes > 0:
        gone |= _shed([p for p in points if p.delta_id not in gone], why, policy, shed_bytes)
    return _plan(states, gone, why, at_once=at_once or shed_bytes > 0)


# --- what holds a point ---


@dataclass(frozen=True, slots=True)
class Reason:
    """One rule that holds a point. `kind` is a bucket's, or `lock`, `floor`, `last`."""

    kind: str
    text: str


def _groups(points: Sequence[Kept]) -> list[list[Kept]]:
    groups: list[list[Kept]] = []
    for point in points:
        if groups and point.content is not None and groups[-1][-1].content == point.content:
            groups[-1].append(point)
        else:
            groups.append([point])
    return groups


def _hold(
    points: Sequence[Kept], policy: Policy, now: Stamp, locked: Mapping[DeltaId, str]
) -> dict[DeltaId, list[Reason]]:
    """For every point the rules that hold it; none: it may go."""
    held: dict[DeltaId, list[Reason]] = {point.delta_id: [] for point in points}
    groups = _groups(points)
    buckets = _bucket_reasons(groups, policy)
    for index, group in enumerate(groups):
        reasons, place = held[group[0].delta_id], len(groups) - index
        reasons += buckets.get(index, ())
        if any(_is_young(point, policy, now) for point in group):
            reasons.append(Reason("floor", "younger than min_age"))
        if place <= policy.min_count:
            reasons.append(Reason("floor", f"one of {policy.min_count} at least (min_count)"))
        if place <= policy.keep_last:
            reasons.append(Reason("last", f"one of the last {policy.keep_last}"))
    for group in groups:
        first, newest = group[0], group[-1]
        if newest is not first and held[first.delta_id]:
            same = Reason("last", f"newest that is unchanged since point {first.number}")
            held[newest.delta_id] = [same, *held[first.delta_id]]
    for point in points:
        if point.delta_id in locked:
            held[point.delta_id].insert(0, Reason("lock", locked[point.delta_id]))
    if points:
        held[points[-1].delta_id].insert(0, Reason("floor", "newest"))
    return held


def _is_young(point: Kept, policy: Policy, now: Stamp) -> bool:
    """By either clock: one that was set wrong must not end a promise early."""
    age_ns = min(now.wall_ns - point.committed.wall_ns, now.observed_ns - point.committed.observed_ns)
    return age_ns < policy.min_age_seconds * _SECOND_NS


def _bucket_reasons(groups: Sequence[Sequence[Kept]], policy: Policy) -> dict[int, list[Reason]]:
    """Index of a group -> the buckets whose first it is, of those that count.

    A group lies in the bucket of its first point and in that of its newest: it was there first, if nothing changed
    since. It takes one place however many buckets it is the first of.
    """
    found: dict[int, list[Reason]] = {}
    for kind in KINDS:
        limit = getattr(policy, kind)
        if not limit:
            continue
        holder: dict[str, int] = {}
        for index, group in enumerate(groups):
            for point in (group[0], group[-1]):
                holder.setdefault(bucket(kind, point.committed.wall_ns), index)
        newest_first = (bucket(kind, p.committed.wall_ns) for group in reversed(groups) for p in (group[-1], group[0]))
        holders: set[int] = set()
        for key in dict.fromkeys(newest_first):
            if holder[key] not in holders and len(holders) == limit:
                break
            holders.add(holder[key])
            found.setdefault(holder[key], []).append(Reason(kind, f"{kind} {key}"))
    return found


def _unchanged(points: Sequence[Kept], held: Mapping[DeltaId, Sequence[Reason]]) -> dict[DeltaId, str]:
    """Those between the first and the newest of a group that stays."""
    return {
        point.delta_id: f"unchanged since point {group[0].number}"
        for group in _groups(points)
        if held[group[0].delta_id]
        for point in group[1:-1]
    }


# --- space ---


def _shed(
    points: Sequence[Kept], held: Mapping[DeltaId, Sequence[Reason]], policy: Policy, need_bytes: int
) -> dict[DeltaId, str]:
    """What goes because space is short: first what only `keep_last` holds, then what buckets hold; oldest first."""
    gone: dict[DeltaId, str] = {}
    for kinds in ({"last"}, {"last", *KINDS}) if policy.shed_buckets else ({"last"},):
        for point in points:
            if need_bytes <= 0:
                return gone
            if point.delta_id not in gone and {reason.kind for reason in held[point.delta_id]} <= kinds:
                gone[point.delta_id] = "space is short"
                need_bytes -= point.stored_bytes
    return gone


# --- how it goes ---


def _plan(
    states: Sequence[Kept], gone: Mapping[DeltaId, str], why: Mapping[DeltaId, Sequence[Reason]], *, at_once: bool
) -> Decision:
    stays = [index for index, s in enumerate(states) if (s.is_point and s.delta_id not in gone)]
    oldest = stays[0] if stays else max(0, len(states) - 1)
    going: set[int] = set()
    waiting: set[int] = set()
    for run in _runs(states, gone, oldest):
        if at_once or len(run) >= MAX_WAITING or _is_closed(states, gone, why, run):
            going.update(run)
        else:
            waiting.update(index for index in run if states[index].is_point)
            going.update(index for index in run if not states[index].is_point)
    verdicts = []
    for index, state in enumerate(states):
        if not state.is_point:
            continue
        if index < oldest or index in going:
            action = Action.DROP if index < oldest else Action.COMPOSE
            verdict = Verdict(state.delta_id, state.number, action, gone[state.delta_id], state.stored_bytes)
        elif index in waiting:
            text = f"{gone[state.delta_id]}; goes when its bucket is closed"
            verdict = Verdict(state.delta_id, state.number, Action.KEEP, text, state.stored_bytes, waits=True)
        else:
            text = ", ".join(dict.fromkeys(reason.text for reason in why[state.delta_id]))
            verdict = Verdict(state.delta_id, state.number, Action.KEEP, text, state.stored_bytes)
        verdicts.append(verdict)
    return Decision(
        tuple(verdicts),
        tuple(state.delta_id for state in states[:oldest]),
        tuple(tuple(states[index].delta_id for index in run) for run in _consecutive(sorted(going))),
    )


def _runs(states: Sequence[Kept], gone: Collection[DeltaId], oldest: int) -> Iterator[list[int]]:
    """Maximal runs of states between two points that stay, or between the newest point and the head.

    Steps after the newest point are a copy under way: they wait for its point, since whatever composes them now is
    written again then. But not without bound, because that point may never come.
    """
    newest = max((index for index, s in enumerate(states) if s.is_point), default=0)
    yield from _consecutive(
        index for index in range(oldest + 1, newest) if not states[index].is_point or states[index].delta_id in gone
    )
    under_way = list(range(max(oldest, newest) + 1, len(states) - 1))
    if len(under_way) >= MAX_WAITING:
        yield under_way


def _consecutive(indices: Iterable[int]) -> Iterator[list[int]]:
    run: list[int] = []
    for index in indices:
        if run and index != run[-1] + 1:
            yield run
            run = []
        run.append(index)
    if run:
        yield run


def _is_closed(
    states: Sequence[Kept], gone: Collection[DeltaId], why: Mapping[DeltaId, Sequence[Reason]], run: Sequence[int]
) -> bool:
    """Whether the run's bucket has in it nothing any more that newer points will push out soon.

    The bucket is that of the finest kind which holds the point below the run (an hour, if none does): that is the
    point it melts into.
    """
    kinds = [reason.kind for reason in why[states[run[0] - 1].delta_id]]
    level = next((n for n, kind in enumerate(KINDS) if kind in kinds), None)
    kind, lasting = KINDS[level or 0], {"lock", *KINDS[level or 0 :]}
    key = bucket(kind, states[run[-1]].committed.wall_ns)
    for state in states[run[-1] + 1 :]:
        if bucket(kind, state.committed.wall_ns) != key:
            break
        if state.is_point and state.delta_id not in gone and not lasting & {r.kind for r in why[state.delta_id]}:
            return False
    if level is not None:
        return True
    below = states[run[0] - 1].stored_bytes  # nothing but a lock below: written again only when it is worth it
    return 4 * sum(states[index].stored_bytes for index in run) >= below


__all__ = [
    "DEFAULT_HOURLY",
    "DEFAULT_KEEP_LAST",
    "DEFAULT_POLICY",
    "Action",
    "Decision",
    "Kept",
    "Policy",
    "Verdict",
    "bucket",
    "decide",
]
