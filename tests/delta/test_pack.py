"""The packer: what goes in comes out, cut by one rule, however the stream was cut."""

from __future__ import annotations

import random
from importlib import import_module
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replica.delta import Packer, Segment, pack, rows_of
from replica.delta.extents import clip, rows_of_kinds

GRAIN = 512
module = import_module("replica.delta.pack")


@pytest.fixture(autouse=True, scope="module")
def tiny() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SEGMENT_RAW_BYTES", 8 * GRAIN)
        patch.setattr(module, "MAX_EXTENTS", 4)
        yield


KINDS = st.lists(st.tuples(st.sampled_from((0, 1, 2)), st.integers(1, 12)), max_size=30).map(
    lambda runs: [kind for kind, count in runs for _ in range(count)]
)


def payload_of(kinds: list[int]) -> bytes:
    return b"".join(bytes([i % 255 + 1]) * GRAIN for i, kind in enumerate(kinds) if kind == 2)


@given(KINDS, st.lists(st.integers(0, 400), max_size=10))
def test_segments_depend_on_the_extents_only(kinds: list[int], cuts: list[int]) -> None:
    rows, payload = rows_of_kinds(0, np.array(kinds, dtype=np.uint8)), payload_of(kinds)
    whole = list(pack(0, GRAIN, [(rows, payload)]))
    bounds = sorted({0, *cuts, 1000})
    parts = []
    for low, high in pairwise(bounds):
        part, skipped, count = clip(rows, low, high)
        parts.append((part, payload[skipped * GRAIN : (skipped + count) * GRAIN]))
    assert list(pack(0, GRAIN, parts)) == whole
    assert b"".join(bytes(s.payload) for s in whole) == payload


@given(KINDS)
def test_segments_are_as_full_as_can_be(kinds: list[int]) -> None:
    rows = rows_of_kinds(0, np.array(kinds, dtype=np.uint8))
    segments = list(pack(0, GRAIN, [(rows, payload_of(kinds))]))
    for segment in segments:
        assert 0 < len(segment.extents) <= 4 and segment.raw_bytes <= 8 * GRAIN
    for segment in segments[:-1]:
        assert len(segment.extents) == 4 or segment.raw_bytes == 8 * GRAIN


def test_every_disk_has_its_own_segments() -> None:
    found: list[Segment] = []
    packer = Packer(found.append)
    packer.add(0, 512, rows_of([(0, 1, 1)]), bytes(512))
    packer.add(2, 4096, rows_of([(1, 1, 1)]), bytes(4096))
    packer.flush()
    packer.flush()
    assert [(s.disk, s.raw_bytes) for s in found] == [(0, 512), (2, 4096)]


def test_a_zero_extent_is_never_split() -> None:
    (segment,) = pack(0, 512, [(rows_of([(0, 1 << 40, 0)]), b""), (rows_of([(1 << 40, 5, 0)]), b"")])
    assert segment.extents.tolist() == [(0, (1 << 40) + 5, 0)]


@pytest.mark.parametrize("fault", ["payload", "order", "disk"])
def test_misuse_is_noticed(fault: str) -> None:
    packer = Packer(lambda segment: None)
    packer.add(1, GRAIN, rows_of([(10, 1, 0)]), b"")
    with pytest.raises(AssertionError):
        if fault == "payload":
            packer.add(1, GRAIN, rows_of([(20, 1, 1)]), random.randbytes(GRAIN - 1))
        elif fault == "order":
            packer.add(1, GRAIN, rows_of([(9, 1, 0)]), b"")
        else:
            packer.add(0, GRAIN, rows_of([(20, 1, 0)]), b"")
