"""The marks against a set of leaves, and a document that is damaged."""

from __future__ import annotations

import itertools
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replica.durable import File, FileSystem
from replica.model import DamagedLeaves, DiskId
from replica.store import ReplicaReader, damage
from replica.store.layout import Layout
from replica.store.marks import Marks
from tests.damage.damage_lab import flip
from tests.store.small_primary import SmallPrimary

DISKS = [DiskId(UUID(int=1)), DiskId(UUID(int=2))]
RANGES = st.lists(
    st.builds(
        lambda disk, first, count: DamagedLeaves(disk, first, first + count),
        st.sampled_from(DISKS),
        st.integers(0, 40),
        st.integers(1, 9),
    ),
    max_size=12,
)


def leaves_of(ranges: object) -> set[tuple[DiskId, int]]:
    return {(r.disk_id, leaf) for r in ranges for leaf in range(r.first, r.stop)}  # type: ignore[attr-defined]


@given(RANGES, RANGES, st.integers(0, 30))
def test_marks_are_a_set_of_leaves(noted: list[DamagedLeaves], gone: list[DamagedLeaves], limit: int) -> None:
    joined = damage.joined(noted)
    assert leaves_of(joined) == leaves_of(noted)
    for a, b in itertools.pairwise(joined):
        assert (a.disk_id.bytes, a.stop) < (b.disk_id.bytes, b.first), "sorted, and what touches is one"
    left = damage.without(joined, gone)
    assert leaves_of(left) == leaves_of(noted) - leaves_of(gone)
    some = damage.first_of(left, limit)
    assert leaves_of(some) <= leaves_of(left)
    assert len(leaves_of(some)) == min(limit, len(leaves_of(left)))


def test_too_many_ranges_become_one_that_holds_them_all() -> None:
    many = [DamagedLeaves(DISKS[n % 2], 2 * n, 2 * n + 1) for n in range(2 * damage.MAX_RANGES)]
    joined = damage.joined(many)
    assert len(joined) == 2
    assert leaves_of(many) <= leaves_of(joined)


def test_the_document_is_kept_and_goes_with_the_last_mark(tmp_path: Path) -> None:
    fs, layout = FileSystem(), Layout(tmp_path)
    one, two = DamagedLeaves(DISKS[0], 3, 5), DamagedLeaves(DISKS[1], 0, 1)
    damage.note(fs, layout, [one], [DISKS[1]])
    damage.note(fs, layout, [two])
    assert damage.load(fs, layout) == damage.Marks((one, two), (DISKS[1],))
    damage.clear(fs, layout, [DamagedLeaves(DISKS[0], 0, 4)], [DISKS[1]])
    assert damage.load(fs, layout) == damage.Marks((DamagedLeaves(DISKS[0], 4, 5), two))
    layout.damage.write_bytes(b"rot")
    assert damage.load(fs, layout) == damage.Marks()
    damage.note(fs, layout, [one])
    assert damage.load(fs, layout).leaves == (one,)
    damage.clear(fs, layout, [one])
    assert not layout.damage.exists()


def test_the_first_mark_of_a_replica_locks_nothing(tmp_path: Path) -> None:
    fs, layout = FileSystem(), Layout(tmp_path)
    damage.note(fs, layout, [DamagedLeaves(DISKS[0], 3, 5)])
    marks = Marks(fs, layout)
    assert marks.locked(marks.now()) == {}, "a directory without its document would count every point as locked"


def test_points_look_at_every_inverse_once_whatever_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is listed of a point is what can be had of it."""
    fs = FileSystem()
    primary = SmallPrimary({"os": 8 * 16384, "data": 16384})
    store = primary.enrol(fs, tmp_path)
    for _ in range(30):
        primary.scribble(count=1)
        primary.sync(store)
    os = primary.ids["os"]
    damage.note(fs, Layout(store.directory), [DamagedLeaves(os, 1, 4), DamagedLeaves(os, 7, 8)])
    for leaf in (1, 2, 3, 7):
        flip(Layout(store.directory).image(os), leaf * 16384)
    reader = ReplicaReader(fs, store.directory)
    reader.points()
    opened: list[str] = []
    real = FileSystem.open

    def counted(fs: FileSystem, path: Path, **options: bool) -> File:
        opened.append(path.parent.name)
        return real(fs, path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(FileSystem, "open", counted)
        infos = reader.points()
    assert opened.count("points") <= 30 and len(infos) == 30
    for info in infos:
        with reader.open_point(info.state.point) as point:
            lost = [(disk.name, a, b - a) for disk in point.disks for a, b in point.lost(disk.id)]
        assert list(info.lost) == lost and info.restorable == (not lost)
    assert len({info.lost for info in infos}) > 3
