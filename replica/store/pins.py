"""Pins: how a reader in any process keeps its point from being rotated out.

A reader of state S holds a shared kernel lock on `pins/S`. Rotation takes the
exclusive one, without waiting, before it unlinks the inverse that leads to S;
points are dropped from the oldest on and the first pinned one stops it, so a
pin on S keeps every inverse between S and the head as well, also those that
are written later. The lock dies with its process: a killed reader pins nothing.

A reader looks at the list of points again *after* it has the pin: if S is gone
by then, rotation was faster.
"""

from __future__ import annotations

from replica.durable import FileSystem, Lock
from replica.errors import BusyError
from replica.model import DeltaId
from replica.store.layout import Layout


def pin(fs: FileSystem, layout: Layout, state: DeltaId) -> Lock:
    """Take a shared pin on a state; waits for a rotation that is just dropping it."""
    fs.make_directory(layout.pins)
    return fs.lock(layout.pin(state), shared=True, wait=True)


def try_unpin_all(fs: FileSystem, layout: Layout, state: DeltaId) -> Lock | None:
    """The exclusive lock on a state's pin, or None while somebody reads it."""
    fs.make_directory(layout.pins)
    try:
        return fs.lock(layout.pin(state))
    except BusyError:
        return None
