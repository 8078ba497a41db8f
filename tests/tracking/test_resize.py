"""A disk that grows and is cut: scan and fold against the plain definition, grain by grain."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tracking_machine import Machine, MemoryImage, root_of

from replica.errors import TrackerDamageError
from replica.tracking.hash import Window

W, G, L = 4 << 20, 4096, 16384
SIZES = (0, 1, G - 1, G, L + 1, W - L, W - 1, W, W + 1, W + G, 2 * W - G + 7, 2 * W, 2 * W + 3 * L + 100)
content = st.lists(st.tuples(st.integers(0, 2 * W + 4 * L), st.integers(0, 255)), max_size=6)


def expected_dirty(old: np.ndarray, new: np.ndarray) -> set[int]:
    """Grains below the new end whose zero-padded content differs."""
    size = -(-max(len(old), len(new)) // G) * G
    before, after = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    before[: len(old)], after[: len(new)] = old, new
    different = np.flatnonzero((before != after).reshape(-1, G).any(axis=1))
    return {int(grain) for grain in different if grain < -(-len(new) // G)}


@given(st.lists(st.tuples(st.sampled_from(SIZES), content), min_size=2, max_size=5))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_resize_is_what_the_definition_says(
    machine: Callable[..., Machine], steps: list[tuple[int, list[tuple[int, int]]]]
) -> None:
    m = machine(steps[0][0])
    m.head = None
    old = np.zeros(0, np.uint8)
    for number, (size, writes) in enumerate(steps):
        new = np.zeros(size, np.uint8)
        new[: len(old)] = old[:size]
        for at, value in writes:
            new[at : at + 100] = value
        m.resize(size)
        pieces, result = m.cycle(MemoryImage(new), fresh=number == 0)
        if number:
            found = {int(g) + p.first_grain for p in pieces if isinstance(p, Window) for g in np.flatnonzero(p.dirty)}
            assert found == expected_dirty(old, new)
        assert result.disks[0].root == root_of(new, m.disk)
        old = new
    assert m.dirty(MemoryImage(old)) == set(), "the trackers describe what is there"


def test_growing_reads_and_reports_what_is_new_only(machine: Callable[..., Machine]) -> None:
    m = machine(2 * W + 5)
    data = np.random.default_rng(1).integers(1, 256, 2 * W + 5, np.uint8)
    m.cycle(MemoryImage(data))
    m.resize(50 * W)
    grown = np.concatenate([data, np.zeros(48 * W - 5, np.uint8)])
    image = MemoryImage(grown, [(0, len(data))])
    assert m.dirty(image) == set()
    assert max(stop for _, stop in image.reads) == len(data)


def test_digests_lost_at_the_cut_are_noticed_before_they_are_blessed(machine: Callable[..., Machine]) -> None:
    m = machine(2 * W)
    data = np.random.default_rng(1).integers(1, 256, 2 * W, np.uint8)
    m.cycle(MemoryImage(data))
    m.resize(W + L)
    m.scan(MemoryImage(data[: W + L]))
    path = m.directory / "disks" / str(m.disk.id) / "digests"
    with path.open("r+b") as file:
        file.seek(W // G * 8)
        file.write(bytes(8))
    with pytest.raises(TrackerDamageError, match="'os'"):
        m.fold()


def test_a_cut_between_two_leaves_leaves_a_window_that_proves_itself(machine: Callable[..., Machine]) -> None:
    """No leaf changes and no grain does, so the journal has nothing for the window: its hash changes all the same."""
    m = machine(2 * W)
    data = np.random.default_rng(1).integers(1, 256, 2 * W, np.uint8)
    m.cycle(MemoryImage(data))
    m.resize(W + L)
    m.cycle(MemoryImage(data[: W + L]))
    assert m.dirty(MemoryImage(data[: W + L])) == set()
