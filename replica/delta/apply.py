"""apply: three streaming passes over a delta.

    prepare(head, delta, sink)       reads only: checks the old leaves, computes the result's roots, emits the inverse
    write(head, delta)               idempotent
    settle(head, delta, inverse)     idempotent: re-reads the changed leaves, rewrites the tree

skeleton
"""

from __future__ import annotations

from replica.delta.change import Delta, MemoryDelta
from replica.delta.head import Head
from replica.delta.pack import Sink
from replica.model import DiskState
from replica.progress import Progress, silent


def prepare(head: Head, delta: Delta, sink: Sink, progress: Progress = silent) -> tuple[DiskState, ...]:
    """Pass 1, touches nothing. The inverse's segments go to `sink` in order (its base is delta.result, its result
    delta.base, same disk table). Returns the result's disks with their roots.

    BaseMismatchError (head is not delta.base), FormatError (not canonical), DamageError (an old leaf is not what
    the tree says: fields disk, offset, length), RootMismatchError (result's roots are not the manifest's).
    """
    raise NotImplementedError


def write(head: Head, delta: Delta, progress: Progress = silent) -> None:
    """Pass 2: set_disks, then every extent. Idempotent; does not read the head or its trees."""
    raise NotImplementedError


def settle(head: Head, delta: Delta, inverse: Delta, progress: Progress = silent) -> tuple[DiskState, ...]:
    """Pass 3, after the head was synced: re-read what changed and rewrite the tree. Idempotent, also over a tree that
    an interrupted pass left half written: what changed is taken from the DATA extents of `delta` and of `inverse`,
    never from the tree. RootMismatchError if a root is not the manifest's."""
    raise NotImplementedError


def apply(head: Head, delta: Delta) -> MemoryDelta:
    """All three in memory; returns the inverse. For tests, examples and small heads."""
    raise NotImplementedError
