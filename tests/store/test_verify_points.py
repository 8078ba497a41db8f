"""verify of the points: damage is found, located, followed to the points it costs; cut and resumed; beside a writer."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from replica.delta import DeltaFileReader, Keyring
from replica.durable import FileSystem
from replica.errors import BusyError, DamageError
from replica.model import DiskId, random_id
from replica.store import Layout, ReplicaReader, ReplicaStore
from replica.store.pace import SAVE_SECONDS, Pace
from replica.store.retention import Policy
from replica.store.verdicts import (
    MAX_RANGES,
    FileMark,
    HeadRound,
    PointsRound,
    SegmentDamage,
    Verdicts,
    bounded,
    outside,
)
from replica.store.verify_points import PointsCheck
from replica.store.verify_round import Report, verify_replica
from tests.store.small_primary import SmallPrimary

FS = FileSystem()


def replica(tmp_path: Path, points: int = 5, sizes: dict[str, int] | None = None) -> tuple[SmallPrimary, ReplicaStore]:
    primary = SmallPrimary(sizes or {"os": 1_000_001, "data": 300_000}, seed=5)
    store = primary.enrol(FS, tmp_path)
    for _ in range(points):
        primary.scribble(count=6)
        primary.sync(store)
    return primary, store


def verify(store: ReplicaStore, **options: object) -> Report:
    return verify_replica(FS, Layout(store.directory), points=True, **options)  # type: ignore[arg-type]


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 16]))


def wrong_bytes(store: ReplicaStore, primary: SmallPrimary, point: int) -> dict[str, set[int]]:
    """Naive: which grains of a point cannot be read, or read wrong, asked grain by grain."""
    bad: dict[str, set[int]] = {}
    with ReplicaReader(FS, store.directory).open_point(point) as opened:
        for disk in opened.disks:
            for grain in range(disk.count_grains):
                buffer = bytearray(min(4096, disk.size_bytes - grain * 4096))
                try:
                    opened.read_into(disk.id, grain * 4096, buffer)
                except DamageError:
                    bad.setdefault(disk.name, set()).add(grain)
                    continue
                if buffer != primary.copies[point][disk.name][grain * 4096 :][: len(buffer)]:
                    bad.setdefault(disk.name, set()).add(grain)
    return bad


def test_a_replica_that_is_whole_is_said_to_be(tmp_path: Path) -> None:
    _primary, store = replica(tmp_path)
    moves: list[tuple[int, int]] = []
    report = verify(store, progress=lambda done, total: moves.append((done, total)))
    assert report.ok and not report.points and not report.resumed
    assert report.files is not None and len(report.files) == 5
    assert sorted(m.stored_bytes for m in report.files) == sorted(
        p.stat().st_size for p in Layout(store.directory).points.iterdir()
    )
    assert [done for done, _ in moves] == sorted(done for done, _ in moves)
    assert all(info.restorable for info in ReplicaReader(FS, store.directory).points())


@pytest.mark.parametrize("seed", range(12))
def test_what_is_damaged_is_what_cannot_be_read(tmp_path: Path, seed: int) -> None:
    """Any bit of any inverse's segments, or of the head: the report covers every grain that reads wrong, and little
    more: what a damaged chunk holds."""
    primary, store = replica(tmp_path)
    rng = random.Random(seed)
    inverses = sorted(path for path in Layout(store.directory).points.iterdir() if path.stat().st_size > 8000)
    for _ in range(rng.choice((1, 3))):
        if seed % 4 == 0:
            image = Layout(store.directory).image(primary.ids["os"])
            data = np.flatnonzero(np.frombuffer(image.read_bytes(), np.uint8))
            flip(image, int(rng.choice(data.tolist())))
        else:
            path = rng.choice(inverses)
            with DeltaFileReader(FS.open(path), Keyring(FS, Layout(store.directory).keys)) as reader:
                entry = reader.manifest.entry(rng.randrange(len(reader)))
            flip(path, entry.offset + rng.randrange(entry.length))
    report = verify(store)
    assert not report.ok
    named: dict[int, dict[str, set[int]]] = {}
    for p in report.points:
        grains = range(p.offset // 4096, -(-(p.offset + p.length) // 4096))
        named.setdefault(p.state.point, {}).setdefault(p.disk, set()).update(grains)
    for point in primary.copies:
        bad = wrong_bytes(store, primary, point)
        for disk, grains in bad.items():
            assert grains <= named[point][disk], (point, disk)
        assert seed % 4 == 0 or bad.keys() == named.get(point, {}).keys()  # of the head, whole leaves are named
    listed = ReplicaReader(FS, store.directory).points()
    assert {info.state.point for info in listed if not info.restorable} == set(named)
    assert seed % 4 == 0 or all(bool(info.reason) != info.restorable for info in listed)


@pytest.mark.parametrize("nearer", ["all", "half"])
def test_a_damaged_table_costs_only_what_no_nearer_inverse_has(tmp_path: Path, nearer: str) -> None:
    """Whoever reads none of its grains does not meet it, in one region of the disk or not."""
    size = 64 * 4096
    primary = SmallPrimary({"os": size})
    store = primary.enrol(FS, tmp_path)
    for point in range(1, 6):
        whole = point != 3 or nearer == "all"  # what the inverse has that leads to the point before
        primary.content["os"][: size if whole else size // 2] = primary.random.randbytes(size if whole else size // 2)
        primary.sync(store)
    layout = Layout(store.directory)
    victim = layout.point(primary.made[3].delta_id)  # leads to point 3
    with DeltaFileReader(FS.open(victim), Keyring(FS, layout.keys)) as reader:
        flip(victim, reader.manifest.entry(0).offset + 9)
        with pytest.raises(DamageError):
            reader.table(0)
    half = set(range(32, 64))
    lost = {3: set(range(64))} | ({} if nearer == "all" else {2: half})
    report = verify(store)
    assert {p.state.point for p in report.points} == set(lost)
    assert {i.state.point for i in ReplicaReader(FS, store.directory).points() if not i.restorable} == set(lost)
    for point in range(1, 6):
        assert wrong_bytes(store, primary, point) == ({"os": lost[point]} if point in lost else {})


def test_damage_of_the_head_is_marked_for_repair(tmp_path: Path) -> None:
    primary, store = replica(tmp_path, points=2)
    image = Layout(store.directory).image(primary.ids["os"])
    at = int(np.flatnonzero(np.frombuffer(image.read_bytes(), np.uint8))[0])
    flip(image, at)
    assert not verify_replica(FS, Layout(store.directory)).ok
    assert [(d.disk_id, d.first) for d in store.damaged] == [(primary.ids["os"], at // 16384)]
    assert not ReplicaReader(FS, store.directory).points()[-1].restorable
    flip(image, at)
    assert verify(store).ok


def test_it_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    """Cut after every piece of work in turn: together the runs read everything once, and damage found stays known."""
    primary, store = replica(tmp_path, points=4, sizes={"os": 9_000_000, "data": 300_000})
    victim = Layout(store.directory).point(primary.made[3].delta_id)
    flip(victim, 400)
    whole: list[int] = []
    verify(store, restart=True, progress=lambda done, _total: whole.append(done))
    verdicts = Verdicts(FS, Layout(store.directory))
    assert verdicts.load(HeadRound) is not None
    calls, reached = 0, [0]
    while True:
        calls += 1

        def cut(done: int, _total: int) -> None:
            if done > reached[0]:
                reached[0] = done
                raise KeyboardInterrupt

        try:
            report = verify(store, progress=cut)
            break
        except KeyboardInterrupt:
            assert calls < 100
            assert not ReplicaReader(FS, store.directory).points()[0].restorable, "what was known stays known"
    assert report.resumed and calls > 3 and not report.ok
    assert {p.state.point for p in report.points} >= {3}
    assert report.files is not None and len(report.files) == 4
    again = verify(store)
    assert not again.resumed, "a finished one is followed by a new one"
    assert [p.state.point for p in again.points] == [p.state.point for p in report.points]


@pytest.mark.parametrize("how", ["rotated out", "thinned", "damaged"])
def test_files_that_go_or_are_replaced_meanwhile_are_no_damage(tmp_path: Path, how: str) -> None:
    """The second segment of a file that is being read does not open: is it still what anybody would meet?"""
    primary = SmallPrimary({"os": 9_000_000})
    store = primary.enrol(FS, tmp_path)
    for _ in range(3):
        primary.content["os"][:] = primary.random.randbytes(9_000_000)
        primary.sync(store)
    layout = Layout(store.directory)
    path, other = (layout.point(primary.made[n].delta_id) for n in (1, 2))
    with DeltaFileReader(FS.open(path), Keyring(FS, layout.keys)) as reader:
        flip(path, reader.manifest.entry(1).offset + 300)

    def meanwhile(mark: FileMark) -> None:
        if mark.position == 1 and how == "rotated out":
            assert store.rotate(Policy(keep_last=1, hourly=0)).dropped == (1, 2)
        if mark.position == 1 and how == "thinned":
            copy = layout.points / ".copy"
            copy.write_bytes(other.read_bytes())
            FS.publish(copy, path)

    check = PointsCheck(FS, layout, Keyring(FS, layout.keys), Pace())
    found = check.run(path.name, None, meanwhile)
    if how == "damaged":
        assert found is not None and [d.segment for d in found.found] == [1] and found.done
    else:
        assert found is None


def test_what_is_remembered_of_many_files_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, store = replica(tmp_path, points=1)
    layout = Layout(store.directory)
    verdicts = Verdicts(FS, layout)
    good = tuple(FileMark(str(x := random_id()), x, 123_456_789, 3, done=True, checked_at_ns=1) for _ in range(21_000))
    disk = DiskId(random_id())
    bad = FileMark(str(x := random_id()), x, 1, 3, (SegmentDamage(1, disk, "os", 4096, 8192, "rot"),), done=True)
    under_way = FileMark(str(x := random_id()), x, 2, 1)
    verdicts.save(PointsRound(1, None, (*good, bad, under_way)))
    found = verdicts.load(PointsRound)
    assert found is not None and {m.name: (m.stored_bytes, m.done) for m in found.files} == {
        m.name: (m.stored_bytes, m.done) for m in (*good, bad, under_way)
    }
    assert bad in found.files and under_way in found.files
    verdicts.save(PointsRound(1, 2, (*good, bad)))
    assert verdicts.load(PointsRound) == PointsRound(1, 2, (bad,))

    parts = tuple(SegmentDamage(n, disk, "os", n * 8192, 4096, "rot") for n in range(100))
    monkeypatch.setattr("replica.documents.MAX_DOCUMENT_BYTES", 2000)
    verdicts.save(PointsRound(1, 2, (FileMark(bad.name, None, 1, 3, parts, done=True),)))
    found = verdicts.load(PointsRound)
    assert found is not None
    assert [(d.offset, d.length) for d in found.files[0].found] == [(0, 99 * 8192 + 4096)], "all that is damaged, still"
    (layout.marks / "verify-points").write_bytes(b"x" * 2001)
    assert verdicts.load(PointsRound) is None
    assert verify(store, restart=True).ok


def test_one_at_a_time_and_a_restart_forgets(tmp_path: Path) -> None:
    _primary, store = replica(tmp_path, points=2)
    with (
        FS.lock(Layout(store.directory).marks / "verify.lock") if verify(store).ok else pytest.fail(),
        pytest.raises(BusyError, match="another process verifies"),
    ):
        verify(store)
    with pytest.raises(KeyboardInterrupt):
        verify(store, progress=_interrupt)
    assert not verify(store, restart=True).resumed


def _interrupt(_done: int, _total: int) -> None:
    raise KeyboardInterrupt


def test_a_damaged_receipt_and_a_file_that_does_not_open_are_reported(tmp_path: Path) -> None:
    primary, store = replica(tmp_path, points=4)
    layout = Layout(store.directory)
    flip(layout.receipt(primary.made[3].delta_id), 50)
    flip(layout.point(primary.made[2].delta_id), 40)
    report = verify(store)
    assert not report.ok and report.receipts == [4]
    assert report.files is not None
    assert [mark.name for mark in report.files if mark.problem] == [str(primary.made[2].delta_id)]


def test_a_pace_keeps_its_rate_and_saves() -> None:
    now, slept, saved = [0.0], [0.0], [0]

    def sleep(seconds: float) -> None:
        now[0] += seconds
        slept[0] += seconds

    def save() -> None:
        saved[0] += 1

    pace = Pace(1000, save, clock=lambda: now[0], sleep=sleep)
    for _ in range(100):
        pace.take(500)
    assert now[0] == pytest.approx(50) and saved[0] == 50 // SAVE_SECONDS
    now[0] += 1000  # whatever it did meanwhile, it makes up for nothing
    before = slept[0]
    pace.take(500)
    assert slept[0] == pytest.approx(before + 0.5)


@pytest.mark.parametrize(("rate", "pieces"), [(None, 4), (1 << 40, 4), (6000, 3), (100, 1)])
def test_under_a_rate_no_more_is_read_ahead_than_it_lets_in_a_moment(rate: float | None, pieces: int) -> None:
    assert Pace(rate).ahead(1000, 4) == pieces


def test_ranges_are_bounded_and_cover_what_they_did() -> None:
    ranges = [(n * 10, 5) for n in range(3 * MAX_RANGES)]
    found = bounded(ranges)
    assert len(found) == MAX_RANGES and found[0] == (0, 5) and sum(found[-1]) == sum(ranges[-1])
    assert bounded([(10, 5), (0, 10), (12, 10)]) == ((0, 22),)
    assert outside(((0, 100), (200, 50)), 50, 220) == [(0, 50), (220, 30)]


def test_verify_works_where_nothing_can_be_remembered(tmp_path: Path) -> None:
    _primary, store = replica(tmp_path, points=2)
    layout = Layout(store.directory)
    layout.marks.rename(tmp_path / "away")
    assert verify(store).ok
    assert not layout.marks.exists(), "a directory without point locks would pass for one that lost them"
    assert Verdicts(FS, layout).load(HeadRound) is None
