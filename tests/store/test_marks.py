"""Point locks and the observed time: nothing shortens a lock, whatever happens to the clocks."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replica.durable import FileSystem
from replica.errors import ConfigError, DamageError
from replica.model import DeltaId, random_id
from replica.store import Layout
from replica.store.clock import Observed, Reading, advance, first, read_clocks
from replica.store.marks import Marks

DAY_NS = 86400 * 10**9
NOW_NS = 20_000 * DAY_NS


class Host:
    """Clocks that are set, and reboots."""

    def __init__(self) -> None:
        self.wall_ns, self.boot_ns, self.boots = NOW_NS, 5 * DAY_NS, 0

    def __call__(self) -> Reading:
        return Reading(self.wall_ns, self.boot_ns, f"boot {self.boots}")

    def run(self, ns: int) -> None:
        self.wall_ns += ns
        self.boot_ns += ns

    def reboot(self, off_ns: int) -> None:
        self.wall_ns += off_ns
        self.boot_ns, self.boots = 0, self.boots + 1


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def marks(fs: FileSystem, tmp_path: Path, host: Host) -> Marks:
    marks = Marks(fs, Layout(tmp_path), host)
    marks.ensure()
    return marks


def holds(marks: Marks) -> bool:
    return bool(marks.locked(marks.now()))


def test_a_lock_ends_at_its_date(marks: Marks, host: Host) -> None:
    made = marks.lock(DeltaId(random_id()), 3, NOW_NS + 7 * DAY_NS, "audit")
    host.run(7 * DAY_NS - 1)
    assert list(marks.locked(marks.now()).values()) == ["locked until 2024-10-11T00:00:00.000000Z (audit)"]
    host.run(1)
    assert not holds(marks)
    marks.keep_time()
    host.wall_ns -= DAY_NS
    assert holds(marks), "one of the two clocks says that the date is not reached"
    host.wall_ns += DAY_NS
    marks.forget(set())
    assert marks.load().locks == (made,), "what ended is still listed while the point is there"
    marks.forget({made.delta_id})
    assert marks.load().locks == ()


def test_a_clock_set_ahead_ends_no_lock(marks: Marks, host: Host) -> None:
    marks.lock(DeltaId(random_id()), 3, NOW_NS + 7 * DAY_NS)
    host.wall_ns += 3650 * DAY_NS
    assert holds(marks)
    marks.keep_time()
    host.reboot(0)
    assert holds(marks)
    marks.keep_time()
    host.run(7 * DAY_NS - 1)
    assert holds(marks)
    host.run(1)
    assert not holds(marks)


def test_a_lock_made_while_the_clock_was_ahead_holds_until_its_date(marks: Marks, host: Host) -> None:
    host.wall_ns += 180 * DAY_NS
    marks.lock(DeltaId(random_id()), 3, NOW_NS + 365 * DAY_NS)
    host.run(185 * DAY_NS)
    assert holds(marks), "the wall clock is at the date, but it was set wrong all the time"
    host.wall_ns -= 180 * DAY_NS
    host.run(179 * DAY_NS)
    assert holds(marks)
    host.run(2 * DAY_NS)
    assert not holds(marks)


def test_a_lock_made_while_the_clock_was_behind_lasts_longer(marks: Marks, host: Host) -> None:
    host.wall_ns -= 100 * DAY_NS
    marks.lock(DeltaId(random_id()), 3, NOW_NS + 10 * DAY_NS)
    host.wall_ns += 100 * DAY_NS
    host.run(50 * DAY_NS)
    assert holds(marks)
    host.run(61 * DAY_NS)
    assert not holds(marks)


def test_time_off_makes_locks_last_longer(marks: Marks, host: Host) -> None:
    marks.lock(DeltaId(random_id()), 3, NOW_NS + 7 * DAY_NS)
    host.run(2 * DAY_NS)
    marks.keep_time()
    host.reboot(off_ns=5 * DAY_NS)
    assert holds(marks)
    host.run(4 * DAY_NS)
    assert holds(marks)
    host.run(DAY_NS)
    assert not holds(marks)


def test_observed_time_stands_still_while_the_wall_clock_is_behind() -> None:
    host = Host()
    seen = first(host())
    host.wall_ns -= 3 * DAY_NS
    host.run(2 * DAY_NS)
    assert advance(seen, host()).time_ns == seen.time_ns
    host.run(2 * DAY_NS)
    assert advance(seen, host()).time_ns == NOW_NS + DAY_NS


def test_a_lock_is_extended_and_never_shortened(marks: Marks, host: Host) -> None:
    point = DeltaId(random_id())
    marks.lock(point, 3, NOW_NS + 7 * DAY_NS, "audit")
    with pytest.raises(ConfigError, match="nobody can shorten"):
        marks.lock(point, 3, NOW_NS + 6 * DAY_NS)
    with pytest.raises(ConfigError, match="not ahead of now"):
        marks.lock(point, 3, NOW_NS - 1)
    marks.lock(point, 3, NOW_NS + 9 * DAY_NS)
    host.run(8 * DAY_NS)
    (mark,) = marks.load().locks
    assert mark.reason == "audit" and holds(marks)
    before = mark.until_observed_ns
    host.wall_ns += 500 * DAY_NS  # extended while the clock is wrong: the observed date may not come nearer
    marks.lock(point, 3, host.wall_ns + DAY_NS)
    assert marks.load().locks[0].until_observed_ns >= before


def test_a_missing_or_damaged_document_is_not_one_without_locks(fs: FileSystem, marks: Marks, tmp_path: Path) -> None:
    marks.lock(DeltaId(random_id()), 3, NOW_NS + 7 * DAY_NS)
    path = tmp_path / "marks" / "retention"
    whole = path.read_bytes()
    path.write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
    for call in (marks.load, marks.keep_time, lambda: marks.locked(marks.now())):
        with pytest.raises(DamageError, match="every point is kept"):
            call()
    with pytest.raises(DamageError):
        marks.lock(DeltaId(random_id()), 4, NOW_NS + 7 * DAY_NS)
    path.unlink()
    marks.ensure()
    with pytest.raises(DamageError, match="is gone"):
        marks.load()
    path.write_bytes(whole)
    assert holds(marks)


def test_locks_never_outgrow_their_document(
    fs: FileSystem, marks: Marks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replica.store.marks.MAX_MARKS_BYTES", 3200)
    points = [DeltaId(random_id()) for _ in range(6)]
    until_ns = NOW_NS + DAY_NS
    for point in points[:4]:
        made = marks.lock(point, 3, until_ns, "aг" * 250)
        assert made.reason == "aг" * 166 + "a", "500 bytes, and no half letter"
    with pytest.raises(ConfigError, match="no room"):
        marks.lock(points[4], 3, until_ns, "г" * 500)
    marks.lock(points[0], 3, until_ns + 1)
    assert len(marks.load().locks) == 4 and holds(marks)


def test_an_operator_may_begin_anew_where_locks_are_damaged(fs: FileSystem, marks: Marks, tmp_path: Path) -> None:
    marks.lock(DeltaId(random_id()), 3, NOW_NS + 7 * DAY_NS, "audit")
    with pytest.raises(ConfigError, match="hold until their dates"):
        marks.begin_anew()
    assert holds(marks)
    path = tmp_path / "marks" / "retention"
    rotten = path.read_bytes()[:-1]
    path.write_bytes(rotten)
    marks.begin_anew()
    assert marks.load().locks == ()
    assert path.with_suffix(".damaged").read_bytes() == rotten, "what was locked may still be legible"


def test_locks_of_several_threads_are_all_kept(marks: Marks) -> None:
    threads = [
        threading.Thread(target=marks.lock, args=(DeltaId(random_id()), n, NOW_NS + DAY_NS)) for n in range(1, 9)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(mark.point for mark in marks.load().locks) == list(range(1, 9))


def test_the_clocks_of_this_host_can_be_read() -> None:
    one, two = read_clocks(), read_clocks()
    assert one.boot_id == two.boot_id != "" and 0 < one.boot_ns <= two.boot_ns and one.wall_ns > NOW_NS


events = st.lists(
    st.tuples(st.sampled_from(["run", "set", "reboot", "save"]), st.integers(-30 * DAY_NS, 30 * DAY_NS)), max_size=30
)


@given(events)
def test_observed_time_never_runs_ahead_of_real_time(history: list[tuple[str, int]]) -> None:
    """However the wall clock is set, whenever it is looked at."""
    host, real = Host(), 0
    seen: Observed = first(host())
    last = seen.time_ns
    for what, ns in history:
        if what == "run":
            host.run(abs(ns))
            real += abs(ns)
        elif what == "set":
            host.wall_ns = max(0, host.wall_ns + ns)
        elif what == "reboot":
            host.reboot(abs(ns))
            real += abs(ns)
        now = advance(seen, host())
        assert now.time_ns >= seen.time_ns
        assert now.time_ns - NOW_NS <= real
        if what in ("save", "reboot"):
            seen = now
            assert now.time_ns >= last or what == "reboot"
            last = now.time_ns
