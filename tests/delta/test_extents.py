"""Row sets: clipping, coalescing and omitting, against sets of grains."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from replica.delta.extents import (
    EXTENT,
    Rows,
    clip,
    coalesce,
    count_data,
    grains_of,
    omit_zero_from,
    rows_of,
    rows_of_grains,
    rows_of_kinds,
    stop_of,
)

KINDS = st.lists(st.sampled_from((0, 1, 2)), max_size=40)


def grains(rows: Rows) -> dict[int, int]:
    return {g: data for first, count, data in rows.tolist() for g in range(first, first + count)}


def expected(first: int, kinds: list[int]) -> dict[int, int]:
    return {first + i: kind - 1 for i, kind in enumerate(kinds) if kind}


@given(st.integers(0, 1 << 40), KINDS)
def test_rows_of_kinds(first: int, kinds: list[int]) -> None:
    rows = rows_of_kinds(first, np.array(kinds, dtype=np.uint8))
    assert rows.dtype == EXTENT
    assert grains(rows) == expected(first, kinds)
    assert coalesce(rows).tolist() == rows.tolist()
    assert grains_of(rows).tolist() == sorted(expected(first, kinds))
    assert count_data(rows) == kinds.count(2)


@given(KINDS)
def test_rows_of_grains(kinds: list[int]) -> None:
    chosen = expected(7, kinds)
    numbers, data = np.array(list(chosen), dtype=np.uint64), np.array(list(chosen.values()), dtype=bool)
    assert rows_of_grains(numbers, data).tolist() == rows_of_kinds(7, np.array(kinds, dtype=np.uint8)).tolist()


@given(KINDS, st.integers(0, 50), st.integers(0, 50))
def test_clip(kinds: list[int], first: int, stop: int) -> None:
    rows = rows_of_kinds(0, np.array(kinds, dtype=np.uint8))
    part, skipped, count = clip(rows, first, stop)
    inside = {g: d for g, d in grains(rows).items() if first <= g < stop}
    assert grains(part) == inside
    assert count == sum(inside.values())
    if count:
        assert skipped == sum(d for g, d in grains(rows).items() if g < first)


@given(KINDS, st.integers(0, 50))
def test_omit_zero_from(kinds: list[int], base: int) -> None:
    rows = rows_of_kinds(0, np.array(kinds, dtype=np.uint8))
    assert grains(omit_zero_from(rows, base)) == {g: d for g, d in grains(rows).items() if d or g < base}


def test_stop_of_nothing_is_zero() -> None:
    assert stop_of(rows_of([])) == 0
    assert stop_of(rows_of([(3, 4, 0)])) == 7
