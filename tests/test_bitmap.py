"""bitmap: every operation against a plain Python set of grains."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replica import bitmap
from replica.bitmap import DirtyBitmap
from replica.errors import FormatError

COUNT = 83  # no multiple of 8

grain_sets = st.sets(st.integers(0, COUNT - 1))
ranges = st.tuples(st.integers(0, COUNT), st.integers(0, COUNT)).map(lambda p: (min(p), max(p) - min(p)))


def bitmap_of(grains: set[int], count: int = COUNT) -> DirtyBitmap:
    made = DirtyBitmap(count)
    for grain in grains:
        made.set(grain)
    return made


def grains_of(dirty: DirtyBitmap) -> set[int]:
    return {g for g in range(dirty.count_grains) if g in dirty}


def naive_runs(grains: set[int]) -> list[tuple[int, int]]:
    groups = (list(g) for _, g in groupby(enumerate(sorted(grains)), lambda pair: pair[1] - pair[0]))
    return [(g[0][1], len(g)) for g in groups]


@given(grains=grain_sets, where=ranges)
def test_set_and_clear_touch_the_range_and_nothing_else(grains: set[int], where: tuple[int, int]) -> None:
    inside = set(range(where[0], sum(where)))
    dirty = bitmap_of(grains)
    dirty.set(*where)
    assert grains_of(dirty) == grains | inside
    dirty = bitmap_of(grains)
    dirty.clear(*where)
    assert grains_of(dirty) == grains - inside
    assert dirty.count_dirty == len(grains - inside)
    assert bool(dirty) == bool(grains - inside)


@given(a=grain_sets, b=grain_sets)
def test_set_algebra(a: set[int], b: set[int]) -> None:
    for name, wanted in [("union", a | b), ("intersect", a & b), ("subtract", a - b)]:
        dirty, other = bitmap_of(a), bitmap_of(b)
        getattr(dirty, name)(other)
        assert grains_of(dirty) == wanted, name
        assert other == bitmap_of(b)
        assert DirtyBitmap.from_bytes(dirty.to_bytes()) == dirty, "a bit past the end was set"


@given(grains=grain_sets, where=ranges, window_bytes=st.sampled_from([1, 2, 3, 1 << 17]))
def test_runs_are_ascending_coalesced_and_clipped(grains: set[int], where: tuple[int, int], window_bytes: int) -> None:
    dirty = bitmap_of(grains)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bitmap, "_WINDOW_BYTES", window_bytes)
        assert list(dirty.runs()) == naive_runs(grains)
        assert list(dirty.runs(*where)) == naive_runs(grains & set(range(where[0], sum(where))))
        assert dirty.count_dirty == len(grains)


@given(grains=grain_sets, mask=st.lists(st.integers(0, 255), max_size=COUNT), data=st.data())
def test_a_mask_is_merged_at_its_place(grains: set[int], mask: list[int], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, COUNT - len(mask)))
    dirty = bitmap_of(grains)
    dirty.set_mask(first, np.array(mask, np.uint8))
    wanted = grains | {first + i for i, value in enumerate(mask) if value}
    assert grains_of(dirty) == wanted
    assert dirty.mask(first, len(mask)).tolist() == [int(first + i in wanted) for i in range(len(mask))]


@given(grains=st.sets(st.integers(0, 19)), count=st.integers(20, 40), data=st.data())
def test_storing_returns_the_same_or_refuses(grains: set[int], count: int, data: st.DataObject) -> None:
    stored = bitmap_of(grains, count).to_bytes()
    assert grains_of(DirtyBitmap.from_bytes(stored)) == grains
    broken = bytearray(stored)
    broken[data.draw(st.integers(0, len(stored) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(FormatError):
        DirtyBitmap.from_bytes(broken)
    with pytest.raises(FormatError):
        DirtyBitmap.from_bytes(stored[: data.draw(st.integers(0, len(stored) - 1))])


def test_a_well_checked_but_invalid_bitmap_is_refused() -> None:
    """Right checksums over wrong content: what a faulty writer would leave."""
    import xxhash

    for count, bits in [(9, b"\xff"), (4, b"\x1f"), (0, b"\x00"), (2**63, b"")]:
        body = bitmap.MAGIC + count.to_bytes(8, "little") + bits
        with pytest.raises(FormatError):
            DirtyBitmap.from_bytes(body + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little"))


def test_it_works_on_the_memory_it_is_given() -> None:
    memory = np.zeros(2, np.uint8)
    dirty = DirtyBitmap(10, memory)
    dirty.set(8, 2)
    assert memory.tolist() == [0, 3]
    assert dirty.copy() == dirty
    dirty.copy().set(0)
    assert 0 not in dirty
    with pytest.raises(ValueError, match="past the last"):
        DirtyBitmap(10, np.array([0, 4], np.uint8))


@pytest.mark.parametrize(("first", "count"), [(-1, 1), (0, 11), (10, 1), (3, -1)])
def test_outside_is_refused(first: int, count: int) -> None:
    dirty = DirtyBitmap(10)
    for action in (dirty.set, dirty.clear, dirty.mask, lambda f, c: list(dirty.runs(f, c))):
        with pytest.raises(ValueError, match="bitmap of 10"):
            action(first, count)
    with pytest.raises(ValueError, match="and 11 grains"):
        dirty.union(DirtyBitmap(11))


def test_a_disk_of_terabytes_costs_its_bits_only() -> None:
    count = 1 << 30  # 4 TiB of 4 KiB grains, 128 MiB of bits, untouched pages
    dirty = DirtyBitmap(count)
    dirty.set(count - 1)
    dirty.set((1 << 20) - 3, 7)
    assert list(dirty.runs()) == [((1 << 20) - 3, 7), (count - 1, 1)]
    assert dirty.count_dirty == 8
