"""Upkeep: points that go, and space that must stay, while replicas are at work.

With every commit a replica drops what goes from the old end. All that takes longer (composing a bucket that closed,
giving points up because space is short) is done behind, by one thread for the whole site, one replica after the other:
those that just committed, and every few minutes all, so that buckets close without commits as well.

A storage that is short of space (`min_free`) is asked again before each replica, so that no more is given up than is
missing. As long as it is short, nothing is taken in it. A commit that would make it short gives up what it needs of its
own replica's points, and is tried once more.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from replica.errors import ReplicaError
from replica.receiver.spec import SiteSpec
from replica.receiver.stores import Store, Stores
from replica.store import Policy, Rotated
from replica.store.space import Space, full

log = logging.getLogger(__name__)

EVERY_SECONDS = 300.0
WANTED_SECONDS = 900.0
"""So long a refused commit's need is believed to be the next one's, too."""


class Upkeep:
    """The upkeep of one replica. Thread-safe as its store is."""

    def __init__(
        self,
        stores: Stores,
        spec: SiteSpec,
        directory: Path,
        wake: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`wake` has the rest done behind."""
        self._stores = stores
        self._spec = spec
        self._directory = directory
        self._wake = wake
        self._clock = clock
        self._wanted_bytes, self._wanted_until = 0, 0.0

    @property
    def max_points_per_hour(self) -> int:
        return self._spec.max_points_per_hour

    def space(self) -> Space:
        return self._stores.space(self._directory, self._spec.limits(self._directory))

    def refused(self, need_bytes: int) -> None:
        """What takes so much had no room. What comes next will hardly take less, so room is made for that much, and
        nothing is taken until it is there, or for `WANTED_SECONDS`: it would be sent in vain."""
        self._wanted_bytes, self._wanted_until = need_bytes, self._clock() + WANTED_SECONDS

    def _wanted(self) -> int:
        return self._wanted_bytes if self._clock() < self._wanted_until else 0

    def _space_wanted(self) -> Space:
        space = self.space()
        return replace(space, min_bytes=space.min_bytes + self._wanted())

    def check_room(self) -> None:
        """StorageFullError while the storage is short; what can be given up is given up behind meanwhile."""
        space, wanted = self._space_wanted(), self._wanted()
        if space.short_bytes:
            self._wake()
            raise full(self._directory, space.free_bytes, wanted, space.min_bytes - wanted)

    def after_commit(self, store: Store) -> None:
        """A point that could not be dropped harms nobody; the next commit tries again."""
        self._wanted_bytes = 0
        try:
            _say(store, store.rotate(self._policy(store), brief=True))
        except ReplicaError as error:
            log.warning("replica %s: cannot rotate points: %s", store.identity.replica_id, error)
        self._wake()

    def tidy(self, store: Store) -> None:
        """Everything that is due: drop, compose, and give up what space needs."""
        policy, space = self._policy(store), self._space_wanted()
        try:
            _say(store, store.rotate(policy, shed_bytes=space.short_bytes))
            if space.short_bytes:
                space = self._space_wanted()
            _say(store, store.thin(policy, at_once=space.short_bytes > 0, shed_bytes=space.short_bytes))
        except ReplicaError as error:
            log.warning("replica %s: cannot rotate points: %s", store.identity.replica_id, error)

    def _policy(self, store: Store) -> Policy:
        return self._spec.policy(store.identity.owner, store.identity.machine)


def _say(store: Store, rotated: Rotated) -> None:
    for what, numbers in (("rotated out", rotated.dropped), ("composed away", rotated.composed)):
        if numbers:
            log.info("replica %s: %s %s", store.identity.replica_id, what, ", ".join(map(str, numbers)))


class Tidy(Protocol):
    """A replica's place in the site, as far as upkeep is concerned (`Slot`)."""

    def tidy(self) -> None:
        """Do what is due, if the store is open. Raises nothing."""


class Housekeeper:
    """The thread that does what is due behind. Started by `start`, ended by `stop`."""

    def __init__(
        self,
        everything: Callable[[], Iterable[Tidy]],
        storages: Callable[[], Iterable[tuple[str, Space]]],
        every_seconds: float = EVERY_SECONDS,
    ) -> None:
        """`storages` tells how each storage stands, by name."""
        self._everything = everything
        self._storages = storages
        self._every_seconds = every_seconds
        self._waiting: dict[Tidy, None] = {}
        self._changed = threading.Condition()
        self._stopping = False
        self._low: set[str] = set()
        self._due = time.monotonic() + every_seconds
        self._thread = threading.Thread(target=self._run, name="housekeeping", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self, slot: Tidy) -> None:
        """Have this one looked after soon."""
        with self._changed:
            self._waiting[slot] = None
            self._changed.notify()

    def stop(self) -> None:
        """Begin nothing more. What it does now ends with its store."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def _run(self) -> None:
        while (slots := self._next()) is not None:
            self._warn()
            for slot in slots:
                if self._stopping:
                    return
                slot.tidy()

    def _next(self) -> list[Tidy] | None:
        with self._changed:
            left = max(0.0, self._due - time.monotonic())
            self._changed.wait_for(lambda: self._stopping or self._waiting, timeout=left)
            if self._stopping:
                return None
            slots, self._waiting = list(self._waiting), {}
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + self._every_seconds
            return list(self._everything())
        return slots

    def _warn(self) -> None:
        """Once for each storage that has become low."""
        for name, space in self._storages():
            if not space.is_low:
                self._low.discard(name)
            elif name not in self._low:
                self._low.add(name)
                log.warning(
                    "storage %s has %d MiB of %d MiB free: below warn_free (%d MiB); points are given up below %d MiB",
                    name,
                    space.free_bytes >> 20,
                    space.total_bytes >> 20,
                    space.warn_bytes >> 20,
                    space.min_bytes >> 20,
                )


__all__ = ["EVERY_SECONDS", "Housekeeper", "Upkeep"]
