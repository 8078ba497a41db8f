"""Pins: how a reader in any process keeps its point, and all that leads to it, as it is.

A reader of state S holds a shared kernel lock on `pins/S`: neither S nor an inverse between S and the head is removed
or composed away, those that are written later included. Readers open files by name whenever they follow the head. The
lock dies with its process: a killed reader pins nothing.

`pins.lock` closes the race: a reader takes its pin under the shared lock; whoever removes inverses holds the exclusive
one from asking what is pinned to the last unlink. It never waits for it: a removal that comes too early comes later.
A reader looks at the list of points again *after* it has the pin: if S is gone by then, rotation was faster.

A file in `pins/` that nobody has locked says nothing, and is removed by the next rotation. Pins that outlive a process
would be one more way in which `Removal.pinned` finds a state.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

from replica.durable import FileSystem, Lock
from replica.errors import BusyError
from replica.model import DeltaId
from replica.store.layout import Layout

TRIES, TRY_SECONDS = 20, 0.005
MAX_CLEANED = 64
"""Files of readers that are gone, removed at a time: who wants to read waits meanwhile."""


def pin(fs: FileSystem, layout: Layout, state: DeltaId) -> Lock:
    """Take a shared pin on a state; waits for a removal that is just going on."""
    fs.make_directory(layout.pins)
    with fs.lock(layout.pins_lock, shared=True, wait=True):
        return fs.lock(layout.pin(state), shared=True, wait=True)


class Removal:
    """What is pinned, while nobody can take a pin."""

    def __init__(self, pinned: frozenset[DeltaId]) -> None:
        self.pinned = pinned


@contextmanager
def removing(fs: FileSystem, layout: Layout) -> Iterator[Removal]:
    """While this is held nobody takes a pin. BusyError if somebody is just doing so.

    Pins that nobody holds are removed on the way.
    """
    with _exclusive(fs, layout):
        pinned, left = set(), MAX_CLEANED
        for name in fs.list_names(layout.pins):
            try:
                state = DeltaId(UUID(name))
            except ValueError:
                continue
            try:
                with fs.lock(layout.pins / name):
                    if left > 0:
                        fs.unlink(layout.pins / name)
                        left -= 1
            except BusyError:
                pinned.add(state)
        yield Removal(frozenset(pinned))


def _exclusive(fs: FileSystem, layout: Layout) -> Lock:
    """Readers have it for an instant each; one that was stopped in it must not stop replication."""
    for _ in range(TRIES - 1):
        try:
            return fs.lock(layout.pins_lock)
        except BusyError:
            time.sleep(TRY_SECONDS)
    return fs.lock(layout.pins_lock, busy="a reader is just opening a point")


__all__ = ["Removal", "pin", "removing"]
