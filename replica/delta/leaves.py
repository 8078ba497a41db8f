"""A delta seen from the tree: which leaves it touches, in pieces of bounded memory.

Deltas speak of grains, the tree of leaves, which are several grains. Whoever
computes new leaf digests needs all grains of a leaf at once, and needs the
leaves in ascending order. `pieces` turns one disk's segments into that: each
leaf lies in exactly one piece, a piece touches at most 4 MiB of leaves, and a
zero extent of any length costs no more than the leaves in it that are not zero.

`leaf_runs` is the same for whoever needs no payload: the leaves that a delta's
DATA and LOST extents touch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from replica.delta.change import DiskChange
from replica.delta.extents import ZERO, Rows, clip, empty_rows, rows_of, stop_of
from replica.errors import FormatError
from replica.merkle import FAN_OUT, Leaves, MerkleTree

if TYPE_CHECKING:
    from typing_extensions import Buffer

PIECE_BYTES = 4 << 20
"""Of leaves that are looked at together."""
LONG_LEAVES = 32
"""A zero extent over at least as many whole leaves is looked up in the tree before its leaves are."""


T = TypeVar("T")


class ByDisk(Generic[T]):
    """A stream of (disk index, item) that goes disk by disk, taken apart without holding it.

    FormatError if it goes back to an earlier disk.
    """

    def __init__(self, stream: Iterable[tuple[int, T]]) -> None:
        self._stream = iter(stream)
        self._held: tuple[int, T] | None = None
        self._reached = 0

    def take(self, disk: int) -> Iterator[T]:
        """The items of `disk`. What was left of the disks before it is skipped."""
        while (held := self._peek()) is not None and held[0] <= disk:
            self._held = None
            if held[0] == disk:
                yield held[1]

    def finish(self) -> None:
        """FormatError if something is left, of a disk that nobody asked for."""
        if self._peek() is not None:
            raise FormatError("a delta has segments of a disk that it does not list")

    def _peek(self) -> tuple[int, T] | None:
        if self._held is None:
            self._held = next(self._stream, None)
            if self._held is not None and self._held[0] < self._reached:
                raise FormatError("a delta's segments go back to an earlier disk")
            self._reached = self._held[0] if self._held is not None else self._reached
        return self._held


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows with their payload, and all the leaves they touch, ascending."""

    rows: Rows
    payload: memoryview
    leaves: Leaves


@dataclass(frozen=True, eq=False)
class Blank:
    """Grains [first, stop), whole leaves, that a ZERO extent covers and that the tree says are zero already."""

    first: int
    stop: int


def runs_of(leaves: Leaves) -> Iterator[tuple[int, int]]:
    """Index ranges [begin, end) of consecutive leaves."""
    cuts = np.flatnonzero(np.diff(leaves) != 1) + 1
    bounds = [0, *cuts.tolist(), len(leaves)]
    return ((a, b) for a, b in itertools.pairwise(bounds) if a < b)


def ranges_of(leaves: Leaves, leaf_bytes: int, size_bytes: int) -> list[tuple[int, int]]:
    """Where leaves lie on a disk of that size, as (offset, length) of each run, inside of it."""
    found = []
    for begin, end in runs_of(leaves):
        offset = int(leaves[begin]) * leaf_bytes
        found.append((offset, min((end - begin) * leaf_bytes, size_bytes - offset)))
    return found


def aligned(
    parts: Iterable[tuple[Rows, Buffer]], grains_per_leaf: int, grain_bytes: int
) -> Iterator[tuple[Rows, memoryview]]:
    """The same rows and payloads, cut so that no leaf is in two of them. FormatError if rows do not ascend.

    A part's last leaf is held back, unless it is covered to its end, until it is known that no more comes for it.
    """
    rows, payload, stop = empty_rows(), memoryview(b""), 0
    for new_rows, buffer in parts:
        if int(new_rows["first"][0]) < stop:
            raise FormatError("a delta's extents do not ascend")
        if len(rows) and int(new_rows["first"][0]) // grains_per_leaf == (stop - 1) // grains_per_leaf:
            rows, payload = np.concatenate((rows, new_rows)), memoryview(b"".join((payload, buffer)))
        else:
            if len(rows):
                yield rows, payload
            rows, payload = new_rows, memoryview(buffer)
        stop = stop_of(rows)
        last = stop // grains_per_leaf * grains_per_leaf
        whole, _, count = clip(rows, 0, last)
        if len(whole):
            yield whole, payload[: count * grain_bytes]
        rows, payload = clip(rows, last, stop)[0], payload[count * grain_bytes :]
    if len(rows):
        yield rows, payload


def pieces(rows: Rows, payload: memoryview, change: DiskChange, tree: MerkleTree) -> Iterator[Piece | Blank]:
    """What `aligned` yields, cut to bounded pieces, in ascending order. `tree` is that of the state before."""
    per_leaf, grain_bytes = change.leaf_bytes // change.grain_bytes, change.grain_bytes
    begin = -(-rows["first"].astype(np.int64) // per_leaf)
    end = (rows["first"] + rows["count"]).astype(np.int64) // per_leaf
    long = np.flatnonzero((rows["data"] == ZERO) & (end - begin >= LONG_LEAVES))
    at = 0
    for low, high in zip(begin[long].tolist(), end[long].tolist(), strict=True):
        part, skipped, count = clip(rows, at, low * per_leaf)
        yield from _bounded(part, payload[skipped * grain_bytes : (skipped + count) * grain_bytes], change)
        yield from _long(low, high, change, tree)
        at = high * per_leaf
    part, skipped, _ = clip(rows, at, stop_of(rows))
    yield from _bounded(part, payload[skipped * grain_bytes :], change)


def _bounded(rows: Rows, payload: memoryview, change: DiskChange) -> Iterator[Piece]:
    """Cut where the touched leaves reach `PIECE_BYTES`. Rows may share leaves; each leaf counts once."""
    if not len(rows):
        return
    per_leaf, grain_bytes = change.leaf_bytes // change.grain_bytes, change.grain_bytes
    last = ((rows["first"] + rows["count"]).astype(np.int64) - 1) // per_leaf
    first = rows["first"].astype(np.int64) // per_leaf
    first[1:] = np.maximum(first[1:], last[:-1] + 1)
    touched = np.cumsum(last - first + 1)
    step = PIECE_BYTES // change.leaf_bytes
    for start in range(0, int(touched[-1]), step):
        index = np.arange(start, min(start + step, int(touched[-1])))
        row = np.searchsorted(touched, index, "right")
        leaves = last[row] - (touched[row] - 1 - index)
        part, skipped, count = clip(rows, int(leaves[0]) * per_leaf, int(leaves[-1] + 1) * per_leaf)
        yield Piece(part, payload[skipped * grain_bytes : (skipped + count) * grain_bytes], leaves)


def _long(low: int, high: int, change: DiskChange, tree: MerkleTree) -> Iterator[Piece | Blank]:
    """A ZERO extent over the whole leaves [low, high): pieces for what the tree says is not zero, blanks between."""
    per_leaf = change.leaf_bytes // change.grain_bytes
    at = low
    for first, stop in stored_runs(tree, low, high):
        if at < first:
            yield Blank(at * per_leaf, first * per_leaf)
        rows = rows_of([(first * per_leaf, (stop - first) * per_leaf, ZERO)])
        yield from _bounded(rows, memoryview(b""), change)
        at = stop
    if at < high:
        yield Blank(at * per_leaf, high * per_leaf)


def stored_runs(tree: MerkleTree, low: int, high: int, level: int = 2) -> Iterator[tuple[int, int]]:
    """Ascending runs [first, stop) of leaves in [low, high) that are not zero, found from the tree's upper levels.

    Only for a tree that is known to be whole: in one that a crash left half written, a node's zero proves nothing.
    """
    span = FAN_OUT**level
    for block in range(low // span, -(-high // span), FAN_OUT):
        count = min(FAN_OUT, -(-high // span) - block)
        used = block + np.flatnonzero(tree.level(level, block, count).any(axis=1))
        for begin, end in runs_of(used):
            first, stop = max(low, int(used[begin]) * span), min(high, (int(used[end - 1]) + 1) * span)
            if level:
                yield from stored_runs(tree, first, stop, level - 1)
            else:
                yield first, stop


def leaf_runs(parts: Iterable[Rows], grains_per_leaf: int) -> Iterator[tuple[int, int]]:
    """Leaves [first, stop) that DATA or LOST extents touch: ascending, though neighbours may overlap by one leaf."""
    for rows in parts:
        data = rows[rows["data"] != ZERO]
        first = data["first"].astype(np.int64) // grains_per_leaf
        stop = -(-(data["first"] + data["count"]).astype(np.int64) // grains_per_leaf)
        yield from zip(first.tolist(), stop.tolist(), strict=True)
