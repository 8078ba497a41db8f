"""The audit's arithmetic, and what a scan does about a tracker that misses."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tracking_machine import Machine, MemoryImage

from replica.bitmap import DirtyBitmap
from replica.errors import AuditMissError
from replica.model import Disk, DiskId, DiskState
from replica.tracking.audit import (
    DEFAULT_SAMPLE,
    AuditPlan,
    DiskAudit,
    advanced,
    odds,
    on_clock,
    plan_windows,
    read_state,
    sample_clean,
    sample_for,
)
from replica.tracking.external import ask
from replica.tracking.journal import WINDOW_BYTES

W, G = WINDOW_BYTES, 4096
SECOND = 1_000_000_000
ID = DiskId(UUID(int=3))


# --- the rolling pass ---


@given(
    st.integers(1, 3000),
    st.integers(1, 100_000),
    st.floats(10, 1e6),
    st.lists(st.floats(0.01, 1), min_size=1, max_size=30),
)
@settings(deadline=None)
def test_every_window_is_read_within_the_period(windows: int, every: int, period: float, early: list[float]) -> None:
    """Also where cycles come sooner than they are due, now and then."""
    disk, start = Disk(ID, "os", windows * W), 1_000 * SECOND
    audit, now = DiskAudit(ID), start
    last = np.full(windows, start)
    for cycle in range(200):
        found = plan_windows(audit, disk, now, every, period)
        assert found.start == audit.cursor
        last[found.start : found.stop] = now
        audit = advanced(audit, disk, found, cycle + 1, now, full=False)
        next_cycle = now + int(every * early[cycle % len(early)] * SECOND)
        assert (next_cycle - last).max() <= (max(period, 2 * every) + 2) * SECOND
        now = next_cycle


def test_a_round_takes_the_period_and_no_longer() -> None:
    disk = Disk(ID, "os", 4 * 2015 * W)
    audit, now, sizes = DiskAudit(ID), SECOND, []
    while not sizes or audit.cursor:
        windows = plan_windows(audit, disk, now, 300, 7 * 86400)
        sizes.append(len(windows))
        audit = advanced(audit, disk, windows, len(sizes), now, full=False)
        now += 300 * SECOND
    assert len(sizes) == 2015 and set(sizes) <= {3, 4, 5}, "every cycle reads as much, but for rounding"


@pytest.mark.parametrize("back", [1, 3600, 10 * 366 * 86400])
@pytest.mark.parametrize("cursor", [0, 700, 2000])
def test_a_clock_that_was_set_back_stops_no_round(back: int, cursor: int) -> None:
    disk, period, every = Disk(ID, "os", 2015 * W), 7 * 86400.0, 300
    now = 10**18
    audit = DiskAudit(ID, cursor, now + back * SECOND, 1)
    read = []
    for cycle in range(2016):
        audit = on_clock(audit, disk, now, every, period)
        windows = plan_windows(audit, disk, now, every, period)
        read += list(windows)
        assert len(windows) <= 2
        audit = advanced(audit, disk, windows, cycle + 2, now, full=False)
        now += every * SECOND
    assert set(read) == set(range(2015))


def test_read_point_follows_the_round() -> None:
    disk = Disk(ID, "os", 3 * W)
    root = bytes(32)
    state = read_state(disk, root, None, DiskAudit(ID), range(1), 1, None)
    assert state == DiskState(disk, root, 1)
    audit = advanced(DiskAudit(ID), disk, range(3), 1, 5, full=True)
    for point, window in ((2, 0), (3, 1), (4, 2)):
        windows = range(window, window + 1)
        state = read_state(disk, root, state, audit, windows, point, "rct")
        assert (state.read_point, state.trusted) == (1 if point < 4 else 2, ("rct",))
        audit = advanced(audit, disk, windows, point, 5, full=False)
    state = read_state(disk, root, state, audit, range(1), 5, None)
    assert (state.read_point, state.trusted) == (5, ())


# --- the sample ---


@given(st.sets(st.integers(0, 299)), st.integers(0, 400), st.integers())
def test_a_sample_is_of_clean_grains_each_once(dirty: set[int], count: int, seed: int) -> None:
    bitmap = DirtyBitmap(300)
    for grain in dirty:
        bitmap.set(grain)
    found = sample_clean(bitmap, count, random.Random(seed))
    clean = set(range(300)) - dirty
    assert found == sorted(set(found)) and set(found) <= clean
    assert len(found) == min(count, len(clean))


def test_a_sample_is_found_where_hardly_anything_is_clean() -> None:
    bitmap = DirtyBitmap(100_000)
    bitmap.set(0, 100_000)
    bitmap.clear(70_000, 20)
    assert set(sample_clean(bitmap, 10, random.Random(1))) <= set(range(70_000, 70_020))


@pytest.mark.parametrize(("missed", "sample", "cycles"), [(1, 100, 1), (5, 20, 3), (50, 4, 1)])
def test_odds_are_those_of_the_experiment(missed: int, sample: int, cycles: int) -> None:
    source, grains, runs = random.Random(7), 500, 4000
    hits = sum(
        any(grain < missed for _ in range(cycles) for grain in source.sample(range(grains), sample))
        for _ in range(runs)
    )
    assert abs(hits / runs - odds(grains, missed, sample, cycles)) < 0.04


@given(st.integers(2, 1 << 34), st.floats(0.001, 0.999), st.integers(1, 5000), st.data())
def test_the_sample_that_is_asked_for_suffices(grains: int, certainty: float, cycles: int, data: st.DataObject) -> None:
    missed = data.draw(st.integers(1, grains - 1))
    sample = sample_for(grains, missed, certainty, cycles)
    assert odds(grains, missed, sample, cycles) >= certainty - 1e-9
    if sample > 1:
        assert odds(grains, missed, sample - 1, cycles) < certainty + 1e-9


def test_the_documented_odds_are_computed() -> None:
    """docs/AUDIT.md says how likely the default finds what on a disk of 100 GiB."""
    text = (Path(__file__).parents[2] / "docs" / "AUDIT.md").read_text()
    grains = (100 << 30) // G
    rows = re.findall(r"^\| ([\d,]+) \| [^|]+ \| ([\d.]+) % \| ([\d.]+) % \| ([\d.]+) % \|$", text, re.MULTILINE)
    assert len(rows) >= 5
    for missed, *said in rows:
        number = int(missed.replace(",", ""))
        for value, cycles in zip(said, (1, 288, 2016), strict=True):
            assert f"{100 * odds(grains, number, DEFAULT_SAMPLE, cycles):.3g}" == f"{float(value):.3g}", missed
    needed = re.findall(r"^\| (\d+) GiB \| ([\d,]+) \| (\d+) \| ([\d.]+) % \| ([\d,]+) \|$", text, re.MULTILINE)
    assert len(needed) >= 4
    for size, missed, cycles, certainty, sample in needed:
        wanted = sample_for((int(size) << 30) // G, int(missed.replace(",", "")), float(certainty) / 100, int(cycles))
        assert int(sample.replace(",", "")) == wanted


# --- a scan with a tracker that misses ---


def liar(m: Machine, reported: list[int]) -> DirtyBitmap:
    bitmap = DirtyBitmap(m.disk.count_grains)
    for grain in reported:
        bitmap.set(grain)
    return bitmap


@pytest.fixture
def changed(machine: Callable[..., Machine]) -> tuple[Machine, np.ndarray]:
    """Six windows; grain 5 of window 2 changed, and nobody says so."""
    m = machine(6 * W + 100)
    data = np.random.default_rng(1).integers(1, 256, 6 * W + 100, np.uint8)
    m.cycle(MemoryImage(data))
    data[2 * W + 5 * G] ^= 1
    return m, data


def test_without_an_audit_a_miss_goes_unnoticed(changed: tuple[Machine, np.ndarray]) -> None:
    m, data = changed
    assert m.dirty(MemoryImage(data), candidates=liar(m, [0])) == set()


def test_a_sample_of_all_finds_every_miss(changed: tuple[Machine, np.ndarray]) -> None:
    m, data = changed
    plan = AuditPlan(sample=m.disk.count_grains, tracker="rct")
    with pytest.raises(AuditMissError, match=f"'rct' missed a change of disk 'os' at byte {2 * W + 5 * G}") as caught:
        m.scan(MemoryImage(data), candidates=liar(m, [0]), audit=plan)
    assert (caught.value.disk, caught.value.tracker) == ("os", "rct")
    data[2 * W + 5 * G] ^= 1
    m.scan(MemoryImage(data), candidates=liar(m, [0]), audit=plan)


def test_the_rolling_pass_finds_it_when_it_comes_there(changed: tuple[Machine, np.ndarray]) -> None:
    m, data = changed
    for window in (0, 1, 3, 4, 5, 6):
        m.scan(MemoryImage(data), candidates=liar(m, []), audit=AuditPlan(range(window, window + 1), tracker="rct"))
    with pytest.raises(AuditMissError, match="'rct' missed"):
        m.scan(MemoryImage(data), candidates=liar(m, []), audit=AuditPlan(range(2, 3), tracker="rct"))


def test_a_miss_beside_a_reported_change_is_noticed(changed: tuple[Machine, np.ndarray]) -> None:
    m, data = changed
    data[2 * W] ^= 1
    with pytest.raises(AuditMissError, match="'rct' missed"):
        m.scan(MemoryImage(data), candidates=liar(m, [2 * W // G]), audit=AuditPlan(tracker="rct"))


def test_a_leaf_that_rotted_is_found_by_the_rolling_pass(machine: Callable[..., Machine]) -> None:
    m = machine(3 * W)
    data = np.random.default_rng(1).integers(1, 256, 3 * W, np.uint8)
    m.cycle(MemoryImage(data))
    with (m.directory / "disks" / str(m.disk.id) / "leaves").open("r+b") as file:
        file.seek(538984448 + 32 * (256 + 9))
        file.write(b"x")
    m.scan(MemoryImage(data), audit=AuditPlan(range(1)))
    with pytest.raises(AuditMissError, match=f"'hash' of disk 'os' is wrong: the leaf at byte {W + 9 * 16384}"):
        m.scan(MemoryImage(data), audit=AuditPlan(range(1, 2)))


def test_changes_resizes_and_zeros_are_no_misses(machine: Callable[..., Machine]) -> None:
    m = machine(4 * W)
    data = np.random.default_rng(1).integers(1, 256, 4 * W, np.uint8)
    m.cycle(MemoryImage(data))
    data[W : 2 * W] = 0
    data[77] ^= 1
    for size in (4 * W, 3 * W + 5000, 2 * W, 4 * W + 3):
        m.resize(size)
        new = np.zeros(size, np.uint8)
        new[: min(size, len(data))] = data[:size]
        m.cycle(MemoryImage(new, [(0, W), (2 * W, size)]), audit=AuditPlan(range(9)))


# --- asking a tracker ---


class Told:
    name = "told"

    def __init__(self, answer: object) -> None:
        self.answer = answer

    def dirty(self, *_: object) -> object:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize("answer", [RuntimeError("no"), None, {}, {"os": None}, {"os": DirtyBitmap(9)}, {"os": b"x"}])
def test_whatever_a_tracker_does_wrong_means_hash_all(answer: object) -> None:
    disk = Disk(ID, "os", 8 * G)
    assert ask(Told(answer), UUID(int=1), UUID(int=2), [disk], [disk]) == [None]  # type: ignore[arg-type]


@pytest.mark.parametrize(("before", "after", "marked"), [(8, 10, {7, 8, 9}), (10, 8, {7}), (8, 8, set())])
def test_a_change_of_size_is_a_candidate(before: int, after: int, marked: set[int]) -> None:
    disk = Disk(ID, "os", after * G)
    found = ask(
        Told({"os": DirtyBitmap(after)}),  # type: ignore[arg-type]
        UUID(int=1),  # type: ignore[arg-type]
        UUID(int=2),  # type: ignore[arg-type]
        [disk],
        [Disk(ID, "os", before * G)],
    )
    assert found[0] is not None
    assert {grain for first, count in found[0].runs() for grain in range(first, first + count)} == marked
