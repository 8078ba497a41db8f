"""A mark is no proof: what is marked and good is read, and restored, and what is rotten is refused, leaf by leaf."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from replica.durable import FileSystem
from replica.errors import LostError
from replica.model import DamagedLeaves
from replica.store import Layout, ReplicaReader, ReplicaStore, damage, restore_point
from replica.store.reader import PointReader
from replica.store.verify_round import verify_replica
from tests.damage.damage_lab import flip
from tests.store.small_primary import SmallPrimary

FS = FileSystem()
LEAF = 16384
LEAVES = 90
ROTTEN = {*range(0, 60, 2), 89}


@pytest.fixture
def rotten(tmp_path: Path) -> tuple[SmallPrimary, ReplicaStore]:
    """One point of random bytes; leaves ROTTEN of it are."""
    primary = SmallPrimary({"os": LEAVES * LEAF - 100})
    store = primary.enrol(FS, tmp_path / "replicas")
    primary.content["os"][:] = primary.random.randbytes(LEAVES * LEAF - 100)
    primary.sync(store)
    for leaf in ROTTEN:
        flip(Layout(store.directory).image(primary.ids["os"]), leaf * LEAF + 7)
    return primary, store


def lost_leaves(point: PointReader) -> set[int]:
    disk = point.disks[0]
    return {n for a, b in point.lost(disk.id) for n in range(a // LEAF, -(-b // LEAF))}


def test_where_there_is_no_room_for_every_mark_good_leaves_are_read_and_restored(
    tmp_path: Path, rotten: tuple[SmallPrimary, ReplicaStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    primary, store = rotten
    monkeypatch.setattr(damage, "MAX_RANGES", 8)
    verify_replica(FS, Layout(store.directory))
    assert sum(d.stop - d.first for d in store.damaged) == LEAVES, "one range holds them all"
    content = primary.copies[1]["os"]
    with ReplicaReader(FS, store.directory).open_point() as point:
        assert lost_leaves(point) == ROTTEN
        for leaf in range(LEAVES):
            buffer = bytearray(len(content[leaf * LEAF :][:LEAF]) - 10)
            if leaf not in ROTTEN:
                point.read_into(point.disks[0].id, leaf * LEAF + 5, buffer)
                assert bytes(buffer) == content[leaf * LEAF + 5 :][: len(buffer)]
                continue
            with pytest.raises(LostError) as caught:
                point.read_into(point.disks[0].id, leaf * LEAF + 5, buffer)
            assert caught.value.offset // LEAF == leaf
        with pytest.raises(LostError):
            restore_point(FS, point, tmp_path / "refused", "raw")
        files = restore_point(FS, point, tmp_path / "out", "raw", missing={})
    expected = bytearray(content)
    for leaf in ROTTEN:
        expected[leaf * LEAF : (leaf + 1) * LEAF] = bytes(len(expected[leaf * LEAF : (leaf + 1) * LEAF]))
    assert files["os"].read_bytes() == expected


@pytest.mark.parametrize("how", ["mark", "missing"])
def test_a_tree_that_is_in_doubt_speaks_for_nothing(rotten: tuple[SmallPrimary, ReplicaStore], how: str) -> None:
    primary, store = rotten
    layout, disk_id = Layout(store.directory), primary.ids["os"]
    damage.note(FS, layout, [DamagedLeaves(disk_id, 0, LEAVES)], [disk_id] if how == "mark" else ())
    if how == "missing":
        layout.tree(disk_id).unlink()
    with ReplicaReader(FS, store.directory).open_point() as point:
        assert lost_leaves(point) == set(range(LEAVES))


@pytest.mark.parametrize("ask", ["read", "lost"])
def test_a_marked_leaf_that_a_commit_is_replacing_is_not_lost(
    rotten: tuple[SmallPrimary, ReplicaStore], monkeypatch: pytest.MonkeyPatch, ask: str
) -> None:
    """It differs from its tree then, and its inverse is there."""
    primary, store = rotten
    layout, disk_id = Layout(store.directory), primary.ids["os"]
    good = 61
    damage.note(FS, layout, [DamagedLeaves(disk_id, good, good + 1)])
    with ReplicaReader(FS, store.directory).open_point(1) as point:
        image = point._images[disk_id]
        read: Callable[[int, memoryview], None] = image.read_into
        left = [1]

        def while_it_is_rewritten(offset: int, buffer: memoryview) -> None:
            if left:
                left.clear()
                primary.content["os"][good * LEAF : 80 * LEAF] = bytes((80 - good) * LEAF)
                primary.sync(store)
                read(offset, buffer)
                np.frombuffer(buffer, np.uint8)[:] ^= 1  # written, and its tree is not
            else:
                read(offset, buffer)

        monkeypatch.setattr(image, "read_into", while_it_is_rewritten)
        if ask == "lost":
            assert not lost_leaves(point)
        else:
            buffer = bytearray(LEAF)
            point.read_into(disk_id, good * LEAF, buffer)
            assert bytes(buffer) == primary.copies[1]["os"][good * LEAF :][:LEAF]
        assert not left
