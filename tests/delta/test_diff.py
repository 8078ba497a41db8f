"""From a tracker's window to rows and payload."""

from __future__ import annotations

import os

import numpy as np
import pytest

from replica import _native
from replica.delta import hole_rows, window_rows

GRAIN = 4096


def masks(window: bytes, dirty: list[int]) -> tuple[np.ndarray, np.ndarray]:
    zero = np.empty(-(-len(window) // GRAIN), dtype=np.uint8)
    _native.zeros(window, GRAIN, zero)
    return np.array(dirty, dtype=np.uint8), zero


def test_dirty_grains_become_extents() -> None:
    a, b, c = (os.urandom(GRAIN) for _ in range(3))
    window = a + bytes(GRAIN) + b + c + bytes(GRAIN)
    rows, payload = window_rows(10, window, GRAIN, *masks(window, [0, 1, 1, 1, 1]), base_grains=100)
    assert rows.tolist() == [(11, 1, 0), (12, 2, 1), (14, 1, 0)]
    assert payload == b + c


def test_the_last_grain_may_be_short() -> None:
    window = os.urandom(GRAIN) + b"end"
    rows, payload = window_rows(0, window, GRAIN, *masks(window, [0, 1]), base_grains=2)
    assert rows.tolist() == [(1, 1, 1)]
    assert payload == b"end" + bytes(GRAIN - 3)
    rows, payload = window_rows(0, window, GRAIN, *masks(window, [1, 1]), base_grains=2)
    assert payload == window + bytes(GRAIN - 3)
    rows, payload = window_rows(0, b"end", GRAIN, *masks(b"end", [1]), base_grains=0)
    assert payload == b"end" + bytes(GRAIN - 3)


def test_zeros_behind_the_base_are_left_out() -> None:
    window = bytes(4 * GRAIN) + os.urandom(GRAIN)
    rows, _ = window_rows(10, window, GRAIN, *masks(window, [1] * 5), base_grains=12)
    assert rows.tolist() == [(10, 2, 0), (14, 1, 1)]


def test_nothing_known_means_everything() -> None:
    data = os.urandom(GRAIN)
    window = bytes(GRAIN) + data
    _, zero = masks(window, [])
    rows, payload = window_rows(0, window, GRAIN, None, zero, base_grains=2)
    assert rows.tolist() == [(0, 1, 0), (1, 1, 1)]
    assert payload == data


def test_nothing_dirty_is_nothing() -> None:
    window = os.urandom(3 * GRAIN)
    rows, payload = window_rows(0, window, GRAIN, *masks(window, [0, 0, 0]), base_grains=3)
    assert len(rows) == 0 == len(payload)


def test_the_payload_is_a_copy() -> None:
    window = bytearray(os.urandom(2 * GRAIN))
    before = bytes(window)
    _, payload = window_rows(0, window, GRAIN, *masks(bytes(window), [1, 1]), base_grains=2)
    window[:] = bytes(2 * GRAIN)
    assert payload == before


@pytest.mark.parametrize(
    ("stop", "base", "expected"), [(9, 20, [(5, 4, 0)]), (9, 7, [(5, 2, 0)]), (9, 5, []), (5, 9, [])]
)
def test_holes(stop: int, base: int, expected: list[tuple[int, int, int]]) -> None:
    assert hole_rows(5, stop, base).tolist() == expected
