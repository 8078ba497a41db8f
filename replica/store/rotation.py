"""Rotation: what `retention` decided, done to a replica's directory. And looking at what it would do.

Two parts. `drop` takes points from the old end and what is spare, a few unlinks; a receiver does it with every commit.
`thin` composes the runs between points that stay (`thin`); a receiver does it behind, while commits and readers go on.

Whatever is removed or replaced is removed in a *step*: a moment in which no commit goes on (`quiet`), nobody takes a
pin (`pins.removing`) and nobody sets a lock (`Marks.held`); pins and locks are looked at in there. A run is left alone
while a reader needs one of its inverses, or where one of them is damaged: nothing that can still be read is given up
for something that cannot.

A commit waits for a step, so a step removes a few files and no more. What a composition replaced is *spare* with the
first of them; the steps that remove the rest ask nobody. Nothing goes from the old end before it: with the way around
them gone, such links would lead somewhere again.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from replica.delta import Keyring
from replica.durable import FileSystem
from replica.errors import BusyError, DamageError, StorageError
from replica.model import NEVER, DeltaId, Stamp, State
from replica.store.layout import Layout
from replica.store.marks import Marks
from replica.store.pins import Removal, removing
from replica.store.points import Chain, Link, PointIndex
from replica.store.receipts import ReceiptBook
from replica.store.retention import Decision, Kept, Policy, decide
from replica.store.thin import FAN_IN, another_name, check, compose_links, final_name

log = logging.getLogger(__name__)

MOST_REMOVED = 8
"""Inverses removed in a step, and receipts: 3 to 4 ms each, for its name has to be gone for good."""

PAUSE_SECONDS = 0.005
"""Between two steps: who waits for the first gets its turn before the second."""

UNKNOWN_LOCKS = "which points are locked is not known: the marks are damaged"


@dataclass(frozen=True, slots=True)
class Rotated:
    """What went: numbers of points dropped from the old end and composed away, and the bytes that became free.

    `more`: there is more to remove that only waits for another step.
    """

    dropped: tuple[int, ...] = ()
    composed: tuple[int, ...] = ()
    freed_bytes: int = 0
    more: bool = False

    def __bool__(self) -> bool:
        return bool(self.dropped or self.composed)

    def __add__(self, other: Rotated) -> Rotated:
        return Rotated(
            self.dropped + other.dropped,
            self.composed + other.composed,
            self.freed_bytes + other.freed_bytes,
            other.more,
        )


class _Step(NamedTuple):
    """What is true while something is removed; `allowed`: whether anything may be."""

    allowed: bool
    chain: Chain
    states: list[Kept]
    now: Stamp
    removal: Removal


def kept_states(chain: Chain, now: Stamp) -> list[Kept]:
    """The chain as retention sees it, oldest first, the head last. The empty state is no part of it."""
    older = [link for link in reversed(chain.links) if link is not chain.undoing and not link.result.is_empty]
    states = [_kept(link.result, link.committed, link.stored_bytes, now) for link in older]
    if not chain.state.head.is_empty:
        states.append(_kept(chain.state.head, chain.state.committed, 0, now))
    return states


def _kept(state: State, committed: Stamp, stored_bytes: int, now: Stamp) -> Kept:
    """A point of before commit times were kept counts from its freeze time, but not from the future.

    One that was committed while observed time was not known (`Marks.now`) counts from the wall clock by both times:
    from 0 it would be old at once by the one, and its minimum age left to whoever sets the other.
    """
    if committed == NEVER:
        committed = Stamp(min(state.frozen_at_ns, now.wall_ns), min(state.frozen_at_ns, now.observed_ns))
    elif not committed.observed_ns:
        committed = Stamp(committed.wall_ns, committed.wall_ns)
    content = (tuple((entry.disk, entry.root) for entry in state.disks), state.files)
    return Kept(state.delta_id, state.point, committed, content, stored_bytes, state.is_point)


def locked_now(marks: Marks, states: Sequence[Kept], now: Stamp) -> Mapping[DeltaId, str]:
    """The points that must stay; all of them while nobody knows which."""
    try:
        return marks.locked(now)
    except DamageError:
        return {state.delta_id: UNKNOWN_LOCKS for state in states}


def look(fs: FileSystem, directory: Path, policy: Policy, *, at_once: bool = False) -> Decision:
    """What a rotation would do now. Changes nothing, from any process."""
    layout = Layout(directory)
    marks = Marks(fs, layout)
    chain, now = PointIndex(fs, layout, Keyring(fs, layout.keys)).chain(), marks.now()
    states = kept_states(chain, now)
    return decide(states, policy, now, locked_now(marks, states, now), at_once=at_once)


class Rotator:
    """Rotates one replica. Not thread-safe: its owner runs one call at a time, beside commits if it likes."""

    def __init__(
        self,
        fs: FileSystem,
        layout: Layout,
        keyring: Keyring,
        marks: Marks,
        receipts: ReceiptBook,
        quiet: Callable[[], AbstractContextManager[bool]],
        stopping: Callable[[], bool],
    ) -> None:
        """No commit goes on while `quiet` is held; it is False if nothing may be removed. `stopping` ends a long
        composition."""
        self._fs = fs
        self._layout = layout
        self._keyring = keyring
        self._marks = marks
        self._receipts = receipts
        self._quiet = quiet
        self._stopping = stopping
        self._index = PointIndex(fs, layout, keyring)
        self._damaged: set[tuple[Path, ...]] = set()

    def drop(self, policy: Policy, *, at_once: bool = False, shed_bytes: int = 0) -> Rotated:
        """One step: drop from the old end what the policy no longer keeps, up to a point that is being read.

        At most `MOST_REMOVED` files go, what is spare first. Raises BusyError (a reader is just opening a point),
        StorageError.
        """
        with self._step() as (allowed, chain, states, now, removal):
            if not allowed:
                return Rotated()
            decision = self._decide(states, policy, now, at_once=at_once, shed_bytes=shed_bytes)
            spare = self._not_wanted(chain, states, decision)
            for link in spare[:MOST_REMOVED]:
                self._fs.unlink(link.path)
            left = MOST_REMOVED - len(spare)
            if left <= 0:
                return Rotated(more=True)
            by_result = {link.result.delta_id: link for link in chain.links}
            first = chain.links[-1] if chain.links else None
            if first is not None and first.result.is_empty and first is not chain.undoing:
                self._fs.unlink(first.path)
            free = list(itertools.takewhile(lambda delta_id: delta_id not in removal.pinned, decision.drops))
            dropped, freed = free[:left], 0
            numbers = {state.delta_id: state.number for state in states if state.is_point}
            for delta_id in dropped:
                self._fs.unlink(by_result[delta_id].path)
                freed += by_result[delta_id].stored_bytes
            if dropped:
                self._receipts.forget(dropped)
                self._forget_locks(dropped)
            more = len(free) > len(dropped)
            if not self._index.damaged:  # what a crash left; a point behind a damaged inverse may come back
                kept = {state.delta_id for state in chain.named} - set(dropped)
                more = not self._receipts.keep_only(kept, left - len(dropped)) or more
            return Rotated(tuple(numbers[d] for d in dropped if d in numbers), (), freed, more)

    def _not_wanted(self, chain: Chain, states: Sequence[Kept], decision: Decision) -> list[Link]:
        """What is spare, farthest from the head first, but for compositions that only wait for their step."""
        wanted = {self._ends(states, run) for run in decision.runs}
        return [link for link in chain.spare if (link.base.delta_id, link.result.delta_id) not in wanted]

    def thin(self, policy: Policy, *, at_once: bool = False, shed_bytes: int = 0) -> Rotated:
        """Compose away what the policy no longer keeps between points that stay.

        Raises BusyError, StorageError. A run that is damaged is logged once and left alone.
        """
        total = Rotated()
        tried: set[tuple[DeltaId, ...]] = set()
        while not self._stopping():
            chain, now = self._index.chain(), self._marks.now()
            states = kept_states(chain, now)
            decision = self._decide(states, policy, now, at_once=at_once, shed_bytes=shed_bytes - total.freed_bytes)
            runs = [run[: FAN_IN - 1] for run in decision.runs]
            run = next((run for run in runs if run not in tried), None)
            if run is None:
                break
            tried.add(run)
            total += self._compose(chain, states, run)
        return total

    def _decide(
        self, states: Sequence[Kept], policy: Policy, now: Stamp, *, at_once: bool, shed_bytes: int
    ) -> Decision:
        locked = locked_now(self._marks, states, now)
        return decide(states, policy, now, locked, at_once=at_once, shed_bytes=shed_bytes)

    @contextmanager
    def _step(self) -> Iterator[_Step]:
        """While this is held the chain, the pins and the locks are as they are now."""
        with self._quiet() as allowed, removing(self._fs, self._layout) as removal, self._marks.held():
            now = self._marks.now()
            chain = self._index.chain()
            yield _Step(allowed and not chain.torn, chain, kept_states(chain, now), now, removal)

    @staticmethod
    def _ends(states: Sequence[Kept], run: Sequence[DeltaId]) -> tuple[DeltaId, DeltaId]:
        """The states that a run lies between: (newer, older)."""
        index = next(index for index, state in enumerate(states) if state.delta_id == run[0])
        return states[index + len(run)].delta_id, states[index - 1].delta_id

    def _compose(self, chain: Chain, states: Sequence[Kept], run: tuple[DeltaId, ...]) -> Rotated:
        links = self._links(chain, run)
        paths = tuple(link.path for link in links)
        if links == () or paths in self._damaged:
            return Rotated()
        newer, older = self._ends(states, run)
        ready = next((s.path for s in chain.spare if (s.base.delta_id, s.result.delta_id) == (newer, older)), None)
        try:
            if ready is not None:
                # It was cut between its name and the last unlink, maybe by a sync that failed: it gets its name anew.
                temporary = another_name(self._layout, ready)
                self._copy(ready, temporary)
            else:
                temporary = compose_links(self._fs, self._layout, self._keyring, links, self._stopping)
        except DamageError as error:
            self._damaged.add(paths)
            log.error("%s: points are not thinned, an inverse is damaged: %s", self._layout.root, error)
            return Rotated()
        try:
            return self._replace(temporary, run, links)
        except BaseException:
            with suppress(StorageError):
                self._fs.unlink(temporary)
            raise

    def _copy(self, ready: Path, temporary: Path) -> None:
        try:
            self._fs.copy(ready, temporary)
            check(self._fs, self._keyring, temporary)
        except BaseException:
            with suppress(StorageError):
                self._fs.unlink(temporary)
            raise

    @staticmethod
    def _links(chain: Chain, run: Sequence[DeltaId]) -> tuple[Link, ...]:
        """The links around a run, nearest the head first; none if the run is not there any more."""
        results = [link.result.delta_id for link in chain.links]
        if run[0] not in results:
            return ()
        last = results.index(run[0])
        first = last - len(run) + 1
        if first < 0 or results[first : last + 1] != list(reversed(run)) or last + 1 >= len(results):
            return ()
        return chain.links[first : last + 2]

    def _replace(self, temporary: Path, run: tuple[DeltaId, ...], links: tuple[Link, ...]) -> Rotated:
        with self._step() as (allowed, chain, states, now, removal):
            locked = locked_now(self._marks, states, now)
            busy = self._pinned_below(states, run, removal)
            moved = not allowed or self._links(chain, run) != links
            if moved or busy or any(delta_id in locked for delta_id in run):
                self._fs.unlink(temporary)
                return Rotated()
            before = sum(link.stored_bytes for link in links)
            with self._fs.open(temporary) as file:
                after = file.size()
            self._fs.publish(temporary, final_name(self._layout, temporary))
            for link in links[: -MOST_REMOVED - 1 : -1]:
                self._fs.unlink(link.path)
            self._receipts.forget(run[:MOST_REMOVED])
            self._forget_locks(run)
            numbers = tuple(state.number for state in states if state.delta_id in run and state.is_point)
        for start in range(MOST_REMOVED, len(links), MOST_REMOVED):
            if not self._remove_spare(links, run[start : start + MOST_REMOVED]):
                break  # a later `drop` does it
        return Rotated((), numbers, before - after)

    def _remove_spare(self, links: Sequence[Link], gone: Sequence[DeltaId]) -> bool:
        """One more step of a replacement: the farthest links of what is left. False: nothing is, or not now."""
        time.sleep(PAUSE_SECONDS)
        with suppress(BusyError), self._step() as (allowed, chain, _states, _now, _removal):
            spare = {link.path for link in chain.spare}
            left = [link for link in reversed(links) if link.path in spare]
            if allowed and left:
                for link in left[:MOST_REMOVED]:
                    self._fs.unlink(link.path)
                self._receipts.forget(gone)
                return True
        return False

    @staticmethod
    def _pinned_below(states: Sequence[Kept], run: Sequence[DeltaId], removal: Removal) -> bool:
        """Whether a reader needs an inverse of the run: its point is in it or older."""
        newest = next((n for n, state in enumerate(states) if state.delta_id == run[-1]), -1)
        return any(state.delta_id in removal.pinned for state in states[: newest + 1])

    def _forget_locks(self, gone: Collection[DeltaId]) -> None:
        with suppress(DamageError, StorageError):  # locks that ended: they hold nothing, and may stay listed
            self._marks.forget(set(gone))


__all__ = ["PAUSE_SECONDS", "Rotated", "Rotator", "kept_states", "locked_now", "look"]
