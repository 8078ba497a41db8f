"""Ranges, against sets."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from replica.delta.ranges import Range, difference, intersection, union

ASCENDING = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9)), max_size=8).map(
    lambda pairs: sorted((start, start + count) for start, count in pairs)
)


def members(ranges: list[Range]) -> set[int]:
    return {i for start, stop in ranges for i in range(start, stop)}


def check_joined(ranges: list[Range]) -> None:
    assert all(start < stop for start, stop in ranges)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(ranges))


@given(ASCENDING, ASCENDING)
def test_union(one: list[Range], other: list[Range]) -> None:
    joined = list(union(one, other))
    check_joined(joined)
    assert members(joined) == members(one) | members(other)


@given(ASCENDING, ASCENDING)
def test_difference(one: list[Range], other: list[Range]) -> None:
    left = list(difference(union(one), union(other)))
    check_joined(left)
    assert members(left) == members(one) - members(other)


@given(ASCENDING, ASCENDING)
def test_intersection(one: list[Range], other: list[Range]) -> None:
    common = list(intersection(union(one), union(other)))
    check_joined(common)
    assert members(common) == members(one) & members(other)
