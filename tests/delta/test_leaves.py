"""Leaves of a delta: runs of them, and those that the tree says are not zero."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replica.delta.extents import rows_of
from replica.delta.leaves import ByDisk, leaf_runs, runs_of, stored_runs
from replica.errors import FormatError
from replica.merkle import MAX_LEAVES, MemoryNodes, MerkleTree

LEAVES = st.sets(st.one_of(st.integers(0, 600), st.integers(65500, 65600), st.integers(0, MAX_LEAVES - 1)), max_size=12)


@given(LEAVES, st.integers(0, 700), st.one_of(st.integers(0, 70_000), st.just(MAX_LEAVES)))
def test_stored_runs_are_the_leaves_that_are_not_zero(leaves: set[int], low: int, high: int) -> None:
    tree = MerkleTree(MemoryNodes())
    update = tree.update(write=True)
    for leaf in sorted(leaves):
        update.put(leaf, np.full((1, 32), 7, dtype=np.uint8))
    update.root(0)
    runs = list(stored_runs(tree, low, high))
    assert [leaf for first, stop in runs for leaf in range(first, stop)] == sorted(x for x in leaves if low <= x < high)


def test_runs_of_consecutive_leaves() -> None:
    assert list(runs_of(np.array([1, 2, 3, 7, 9, 10]))) == [(0, 3), (3, 4), (4, 6)]
    assert list(runs_of(np.array([], dtype=np.int64))) == []


def test_only_data_touches_leaves() -> None:
    rows = rows_of([(0, 1, 1), (3, 2, 1), (8, 100, 0), (200, 4, 1)])
    assert list(leaf_runs([rows], 4)) == [(0, 1), (0, 2), (50, 51)]


def test_disks_are_taken_in_order() -> None:
    stream = ByDisk([(0, "a"), (0, "b"), (2, "c"), (3, "d")])
    assert list(stream.take(0)) == ["a", "b"]
    assert list(stream.take(1)) == []
    assert list(stream.take(3)) == ["d"]
    stream.finish()


def test_going_back_or_leaving_something_is_refused() -> None:
    stream = ByDisk([(1, "a"), (0, "b")])
    with pytest.raises(FormatError):
        list(stream.take(1))
    stream = ByDisk([(1, "a")])
    assert list(stream.take(0)) == []
    with pytest.raises(FormatError):
        stream.finish()
