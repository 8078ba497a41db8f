"""Whole cycles against a real replica site in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
from primary_lab import Lab, MiB

from replica.plan import Mode


def test_points_of_a_machine_restore_exactly(lab: Lab) -> None:
    lab.scribble("os", 0, 5 * MiB)
    lab.scribble("os", 21 * MiB, 1234)
    lab.scribble("data", 3 * MiB + 5, 100_000)
    first = lab.sync()
    assert (first.machine, first.point, first.mode) == ("web-1", 1, Mode.INITIAL)
    assert first.roots == lab.head.roots and set(first.roots) == {"os", "data"}
    assert first.frozen_at_ns == lab.head.frozen_at_ns
    lab.assert_equal()
    versions = {1: lab.copy()}
    for point in range(2, 6):
        lab.scribble("os", point * 3 * MiB + 77, 10_000)
        lab.scribble("data", point * 12345, 3)
        lab.discard("os", point * MiB, 8192)
        result = lab.sync()
        assert (result.point, result.mode) == (point, Mode.INCREMENTAL)
        versions[point] = lab.copy()
    for point, data in versions.items():
        lab.assert_equal(point, data)
