"""A tracker that is made to miss: how it is found, and that the point is right all the same."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from primary_lab import KiB, Lab, MiB

from replica.bitmap import DirtyBitmap
from replica.errors import TransportError
from replica.model import DeltaId, Disk, DiskState
from replica.plan import Mode
from replica.primary import audits
from replica.primary.record import MachineDirectory, MachineRecord
from replica.primary.status import machine_status
from replica.store import read_files

G, W = 4096, 4 << 20


class Rct:
    """Knows what the guest wrote since each mark, but for the grains in `blind`."""

    name = "rct"

    def __init__(self, lab: Lab) -> None:
        self.lab, self.marks = lab, dict[DeltaId, dict[str, np.ndarray]]()
        self.blind: set[tuple[str, int]] = set()
        self.asked = list[DeltaId]()

    def dirty(self, since: DeltaId, mark: DeltaId, disks: Sequence[Disk]) -> Mapping[str, DirtyBitmap | None]:
        self.asked.append(since)
        before, now = self.marks.get(since), self.lab.copy()
        self.marks[mark] = now
        if before is None:
            return {}
        return {disk.name: self._bitmap(disk, before[disk.name], now[disk.name]) for disk in disks}

    def _bitmap(self, disk: Disk, old: np.ndarray, new: np.ndarray) -> DirtyBitmap:
        bitmap = DirtyBitmap(disk.count_grains)
        for grain in range(disk.count_grains):
            at = slice(grain * G, (grain + 1) * G)
            if not np.array_equal(old[at], new[at]) and (disk.name, grain) not in self.blind:
                bitmap.set(grain)
        return bitmap


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    (tmp_path / "lab").mkdir()
    lab = Lab(tmp_path / "lab", {"os": 6 * W, "data": 2 * W})
    lab.scribble("os", 0, 6 * W)
    lab.scribble("data", 0, W)
    yield lab
    lab.site.close()


@pytest.fixture
def rct(lab: Lab) -> Rct:
    tracker = Rct(lab)
    # by default the rolling pass is slow and no sample is drawn: what a test is about, it turns on
    lab.machine = replace(lab.machine, tracker=tracker, audit_sample=0, audit_period_seconds=1e12)
    return tracker


def record(lab: Lab) -> MachineRecord:
    found = MachineDirectory(lab.fs, lab.spec.machine_directory("web-1")).load()
    assert found is not None
    return found


def state(lab: Lab, name: str = "os") -> DiskState:
    return next(entry for entry in lab.head.disks if entry.disk.name == name)


def test_the_hash_tracker_trusts_nobody(lab: Lab) -> None:
    for point in (1, 2, 3):
        assert lab.sync().point == point
        assert {(s.read_point, s.trusted) for s in lab.head.disks} == {(point, ())}


def test_a_trusted_tracker_is_named_and_only_what_it_names_is_read(lab: Lab, rct: Rct) -> None:
    lab.sync()
    assert (state(lab).read_point, state(lab).trusted) == (1, ())
    lab.scribble("os", 5 * W + 100, 10)
    result = lab.sync()
    assert (result.mode, result.bytes_changed) == (Mode.INCREMENTAL, G)
    assert result.bytes_scanned <= 3 * W, "the window that changed, and one of each disk for the rolling pass"
    assert (state(lab).read_point, state(lab).trusted) == (1, ("rct",))
    lab.assert_equal()
    assert lab.head.notes == ()


def test_a_tracker_that_lost_its_mark_is_not_asked_to_guess(lab: Lab, rct: Rct) -> None:
    lab.sync()
    rct.marks.clear()
    lab.scribble("os", 0, 10)
    assert lab.sync().point == 2
    assert (state(lab).read_point, state(lab).trusted) == (2, ())
    lab.assert_equal()


def assert_found(lab: Lab, point: int, since: int) -> None:
    """The point is right, says what happened, and the operator is told."""
    lab.assert_equal(point)
    assert lab.head.point == point
    (note,) = lab.head.notes
    assert "'rct' missed a change of disk 'os'" in note and f"points after {since} and before {point}" in note
    assert (state(lab).read_point, state(lab).trusted) == (point, ())
    (alert,) = machine_status(lab.fs, lab.spec, lab.machine).alerts
    assert (alert.disk, alert.tracker, alert.point, alert.message) == ("os", "rct", point, note)


def test_the_sample_finds_a_miss(lab: Lab, rct: Rct) -> None:
    lab.sync()
    lab.sync()
    rct.blind = {("os", 5 * W // G + 3)}
    lab.scribble("os", 5 * W + 3 * G, G)
    lab.sync()
    with pytest.raises(AssertionError, match="differs"):
        lab.assert_equal(3)
    lab.machine = replace(lab.machine, audit_sample=1 << 20)
    result = lab.sync()
    assert (result.point, result.mode, result.bytes_changed) == (4, Mode.INCREMENTAL, G)
    assert_found(lab, 4, since=1)
    rct.blind = set()
    lab.sync()
    assert state(lab).trusted == ("rct",), "believed again after a whole pass"
    assert lab.head.notes == () and len(record(lab).alerts) == 1


def test_the_rolling_pass_finds_a_miss_within_the_period(lab: Lab, rct: Rct, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10**18]
    monkeypatch.setattr(audits, "time", SimpleNamespace(time_ns=lambda: now[0]))
    lab.machine = replace(lab.machine, audit_period_seconds=7 * 300.0)
    lab.sync()
    rct.blind = {("os", 3 * W // G + 7)}
    lab.scribble("os", 3 * W + 7 * G, 1)
    for _ in range(7):
        now[0] += 300 * 10**9
        point = lab.sync().point
        if lab.head.notes:
            break
    assert_found(lab, point, since=1)
    assert (now[0] - 10**18) / 1e9 <= 7 * 300


def test_read_point_moves_on_when_the_pass_has_gone_round(lab: Lab, rct: Rct, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10**18]
    monkeypatch.setattr(audits, "time", SimpleNamespace(time_ns=lambda: now[0]))
    lab.machine = replace(lab.machine, audit_period_seconds=7 * 300.0)
    for point in range(1, 14):
        lab.sync()
        now[0] += 300 * 10**9
        # point 1 read all; the first round of six windows began with it and ended with point 6; the second one is
        # due from then on, so it takes two windows first, and ends with point 11
        expected = 1 if point < 11 else 7
        assert (state(lab).read_point, state(lab).trusted) == (expected, () if point == 1 else ("rct",))


def test_a_round_begun_by_a_clock_that_was_ahead_goes_on(lab: Lab, rct: Rct, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [2 * 10**18]
    monkeypatch.setattr(audits, "time", SimpleNamespace(time_ns=lambda: now[0]))
    lab.machine = replace(lab.machine, audit_period_seconds=7 * 300.0)
    lab.sync()
    now[0] = 10**18
    for _ in range(12):
        lab.sync()
        now[0] += 300 * 10**9
    assert state(lab).read_point > 1, "two rounds ended"


def test_a_miss_is_remembered_if_the_cycle_dies(lab: Lab, rct: Rct) -> None:
    lab.sync()
    rct.blind = {("os", 9)}
    lab.scribble("os", 9 * G, G)
    lab.machine = replace(lab.machine, audit_sample=1 << 20)
    link = lab.link()

    def before(name: str, _arguments: object) -> None:
        if name == "begin" and link.calls.count("begin") == 2:
            raise TransportError("cut")

    link.before = before
    with pytest.raises(TransportError):
        lab.sync(link, retry_seconds=0)
    lab.machine = replace(lab.machine, audit_sample=0)
    assert lab.sync().point == 2
    lab.assert_equal(2)
    assert (state(lab).read_point, state(lab, "data").trusted) == (2, ("rct",))
    assert len(record(lab).alerts) == 1


def test_two_disks_whose_tracker_misses_are_found_in_one_cycle(lab: Lab, rct: Rct) -> None:
    lab.sync()
    rct.blind = {("os", 9), ("data", 4)}
    lab.scribble("os", 9 * G, G)
    lab.scribble("data", 4 * G, G)
    lab.machine = replace(lab.machine, audit_sample=1 << 20)
    assert lab.sync().point == 2
    lab.assert_equal()
    assert len(lab.head.notes) == 2 and {alert.disk for alert in record(lab).alerts} == {"os", "data"}


def test_a_rotten_leaf_is_found_by_the_hash_trackers_own_pass(lab: Lab) -> None:
    lab.machine = replace(lab.machine, audit_period_seconds=1.0)
    lab.sync()
    directory = lab.spec.machine_directory("web-1") / "disks" / str(state(lab).disk.id)
    with (directory / "leaves").open("r+b") as file:
        file.seek(538984448 + 32 * 300)
        file.write(b"x")
    assert lab.sync().mode is Mode.RESYNC
    lab.assert_equal()
    (note,) = lab.head.notes
    assert "'hash' of disk 'os' is wrong" in note
    assert (lab.sync().mode, lab.head.notes) == (Mode.INCREMENTAL, ())


def test_a_resized_disk_with_a_tracker(lab: Lab, rct: Rct) -> None:
    lab.sync()
    lab.data["os"] = np.concatenate([lab.data["os"][: 5 * W + 1000], np.zeros(3 * W, np.uint8)])
    lab.images["os"].write_bytes(lab.data["os"].tobytes())
    rct.marks = {mark: {**held, "os": np.resize(held["os"], len(lab.data["os"]))} for mark, held in rct.marks.items()}
    lab.machine = replace(lab.machine, audit_sample=1 << 20)
    lab.sync()
    lab.assert_equal()
    assert (state(lab).trusted, lab.head.notes) == (("rct",), ())


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("freezing", [False, True], ids=["still", "freezing"])
def test_a_replaced_disk_is_read_whole(lab: Lab, rct: Rct, freezing: bool, cut: bool) -> None:
    """Its name is that of the disk before, of which the tracker knows what was written."""
    if freezing:
        lab.machine = replace(lab.machine, freeze="true", thaw="true")
    lab.sync()
    lab.sync()
    other = lab.images["os"] = lab.root / "other.raw"
    lab.data["os"] = lab.rng.integers(1, 256, 6 * W, np.uint8)
    other.write_bytes(lab.data["os"].tobytes())
    rct.blind = {("os", grain) for grain in range(6 * W // G)}
    disks = tuple(replace(disk, image=lab.images[disk.name]) for disk in lab.machine.disks)
    lab.machine = replace(lab.machine, disks=disks)
    if cut:
        link = lab.link()

        def before(name: str, _arguments: object) -> None:
            if name == "commit":
                raise TransportError("cut")

        link.before = before
        with pytest.raises(TransportError):
            lab.sync(link, retry_seconds=0)
    lab.sync()
    lab.assert_equal()
    assert (state(lab).trusted, state(lab, "data").trusted) == ((), ("rct",))
    assert record(lab).alerts == (), "it missed nothing: it was not asked"
    rct.blind = set()
    lab.scribble("os", 9 * G, 1)
    assert lab.sync().bytes_changed == G
    assert state(lab).trusted == ("rct",)
    lab.assert_equal()


def test_disks_that_swap_their_names_are_read_whole(lab: Lab, rct: Rct) -> None:
    lab.sync()
    lab.sync()
    names = {"os": "data", "data": "os"}
    disks = tuple(replace(disk, name=names[disk.name]) for disk in lab.machine.disks)
    lab.machine = replace(lab.machine, disks=disks)
    lab.images = {names[name]: path for name, path in lab.images.items()}
    lab.data = {names[name]: array for name, array in lab.data.items()}
    rct.marks = {m: {names[name]: array for name, array in held.items()} for m, held in rct.marks.items()}
    rct.blind = {(name, grain) for name in names for grain in range(6 * W // G)}
    for name in names:
        lab.scribble(name, W + 100, 10)
    lab.sync()
    lab.assert_equal()
    assert {s.trusted for s in lab.head.disks} == {()} and record(lab).alerts == ()


def test_a_tracker_knows_nothing_of_the_machines_files(lab: Lab, rct: Rct, monkeypatch: pytest.MonkeyPatch) -> None:
    file = lab.root / "web-1.xml"
    file.write_bytes(b"<domain/>")
    lab.machine = replace(lab.machine, files=(file,))
    clean = lambda _since, _mark, disks: {disk.name: DirtyBitmap(disk.count_grains) for disk in disks}  # noqa: E731
    monkeypatch.setattr(rct, "dirty", clean)
    lab.sync()
    file.write_bytes(b"<another/>")
    lab.sync()
    with lab.reader().open_point(2) as opened:
        assert list(read_files(opened).values()) == [b"<another/>"]
    assert record(lab).alerts == ()


@pytest.mark.parametrize("freezing", [False, True], ids=["still", "freezing"])
def test_a_lost_state_directory_believes_no_tracker_until_all_was_read(lab: Lab, rct: Rct, freezing: bool) -> None:
    if freezing:
        lab.machine = replace(lab.machine, freeze="true", thaw="true")
    lab.sync()
    shutil.rmtree(lab.spec.state)
    rct.blind = {("os", 9)}
    link = lab.link()

    def after(name: str, _arguments: object) -> None:
        if name == "adopt":
            lab.scribble("os", 9 * G, G)

    link.after = after
    assert lab.sync(link).mode is Mode.RESYNC
    lab.assert_equal()
    assert {s.trusted for s in lab.head.disks} == {()} and record(lab).alerts == ()


def test_a_lost_state_directory_asks_no_tracker(lab: Lab, rct: Rct) -> None:
    lab.sync()
    shutil.rmtree(lab.spec.state)
    lab.scribble("os", 64 * KiB, MiB)
    assert lab.sync().mode is Mode.RESYNC
    assert state(lab).trusted == ()
    lab.assert_equal()


@pytest.mark.parametrize("freezing", [False, True], ids=["still", "freezing"])
@pytest.mark.parametrize(
    ("when", "name", "time"), [("before", "begin", 2), ("after", "commit", 1), ("after", "commit", 2)]
)
def test_a_tracker_is_not_asked_what_changed_since_a_part(
    lab: Lab, rct: Rct, freezing: bool, when: str, name: str, time: int
) -> None:
    """A delta that was to be the point is cut into a part after the tracker gave the instant its id."""
    lab.sync()
    if freezing:
        lab.machine = replace(lab.machine, freeze="true", thaw="true")
    lab.spec = replace(lab.spec, part_bytes=W)
    lab.scribble("os", 0, 2 * W)
    for window in range(2, 6):
        lab.scribble("os", window * W + 100, 5000)
    lab.scribble("data", 100, 5000)
    link = lab.link()

    def cut(called: str, _arguments: object) -> None:
        if called == name and link.calls.count(name) == time:
            raise TransportError("cut")

    setattr(link, when, cut)
    with pytest.raises(TransportError):
        lab.sync(link, retry_seconds=0)
    assert lab.head.partial
    parts = {lab.head.delta_id}
    lab.spec = replace(lab.spec, part_bytes=1 << 30)
    assert lab.sync().point == 2
    lab.assert_equal()
    assert not parts & set(rct.asked), "the mark is of an instant that the part does not hold"
    assert {(s.read_point, s.trusted) for s in lab.head.disks} == {(2, ())}
    lab.scribble("os", 3 * W, 10)
    assert lab.sync().bytes_changed == G
    lab.assert_equal()
    assert state(lab).trusted == ("rct",), "believed again since a point"
