"""What verify says of a head, and which marks come of it: rot of the image, and of nothing but the tree."""

from __future__ import annotations

from pathlib import Path

import pytest

from replica.durable import FileSystem
from replica.model import DamagedLeaves
from replica.store import Layout, ReplicaReader, ReplicaStore, damage
from replica.store.verify_round import verify_replica
from tests.damage.damage_lab import flip
from tests.store.small_primary import SmallPrimary

FS = FileSystem()
LEAF = 16384


def replica(tmp_path: Path, sizes: dict[str, int]) -> tuple[SmallPrimary, ReplicaStore, Layout]:
    """One point, every leaf of it random."""
    primary = SmallPrimary(sizes)
    store = primary.enrol(FS, tmp_path)
    rewrite(primary)
    primary.sync(store)
    return primary, store, Layout(store.directory)


def rewrite(primary: SmallPrimary) -> None:
    for data in primary.content.values():
        data[:] = primary.random.randbytes(len(data))


def test_a_disk_whose_every_leaf_is_rotten_is_no_rotten_tree(tmp_path: Path) -> None:
    primary, store, layout = replica(tmp_path, {"os": 4 * LEAF, "data": 4 * LEAF})
    layout.image(primary.ids["os"]).write_bytes(primary.random.randbytes(4 * LEAF))
    report = verify_replica(FS, layout)
    assert [(v.mismatches, v.tree_unfit) for v in report.disks if not v.ok] == [(((0, 4 * LEAF),), False)]
    for _ in range(2):  # a commit of another disk changes nothing of it
        assert [(d.disk_id, d.first, d.stop) for d in store.damaged] == [(primary.ids["os"], 0, 4)]
        assert not ReplicaReader(FS, store.directory).points()[-1].restorable
        primary.content["data"][5] ^= 1
        primary.sync(store)


def test_a_tree_that_is_gone_costs_no_byte_of_its_disk(tmp_path: Path) -> None:
    primary, store, layout = replica(tmp_path, {"os": 300 * LEAF, "data": LEAF})
    primary.content["os"][9 * LEAF : 20 * LEAF] = bytes(11 * LEAF)
    primary.sync(store)
    layout.tree(primary.ids["os"]).write_bytes(b"")
    report = verify_replica(FS, layout)
    assert not report.ok and not report.points
    assert [(v.mismatches, v.tree_unfit) for v in report.disks if not v.ok] == [((), True)]
    assert ReplicaReader(FS, store.directory).marks.trees == (primary.ids["os"],) and not store.damaged
    assert all(info.restorable for info in ReplicaReader(FS, store.directory).points())
    primary.content["os"][5] ^= 1
    primary.sync(store)
    assert verify_replica(FS, layout).ok


def test_a_disk_of_no_bytes_may_have_a_damaged_tree(tmp_path: Path) -> None:
    primary, store, layout = replica(tmp_path, {"os": 0, "data": LEAF})
    layout.tree(primary.ids["os"]).write_bytes(b"x" * 32)
    assert [v.disk.name for v in verify_replica(FS, layout).disks if v.tree_unfit] == ["os"]
    primary.content["data"][5] ^= 1
    primary.sync(store)
    assert verify_replica(FS, layout).ok


@pytest.mark.parametrize("how", ["tree made anew", "disk removed and added again"])
def test_files_that_are_replaced_while_they_are_verified_are_no_damage(tmp_path: Path, how: str) -> None:
    primary, store, layout = replica(tmp_path, {"os": 700 * LEAF, "data": LEAF})
    done = [0]

    def replace_files(count: int, _total: int) -> None:
        if done[0] or not count:
            return
        done[0] = count
        if how == "tree made anew":
            damage.note(FS, layout, (), [primary.ids["os"]])
        else:
            content = primary.content.pop("os")
            primary.sync(store)
            primary.content["os"] = content
        rewrite(primary)
        primary.content["os"][600 * LEAF : 690 * LEAF] = bytes(90 * LEAF)
        primary.sync(store)
        rewrite(primary)
        primary.sync(store)

    report = verify_replica(FS, layout, replace_files)
    assert 0 < done[0] < 700 * LEAF
    assert report.ok and not ReplicaReader(FS, store.directory).marks.leaves
    read = next(v.checked_bytes for v in report.disks if v.disk.name == "os")
    assert read == 700 * LEAF


def test_what_was_found_is_marked_when_a_verification_is_cut(tmp_path: Path) -> None:
    primary, store, layout = replica(tmp_path, {"os": 700 * LEAF})
    for leaf in (3, 5, 600):
        flip(layout.image(primary.ids["os"]), leaf * LEAF)

    def cut(done: int, _total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify_replica(FS, layout, cut)
    os = primary.ids["os"]
    assert store.damaged == (DamagedLeaves(os, 3, 4), DamagedLeaves(os, 5, 6))
    assert not ReplicaReader(FS, store.directory).points()[-1].restorable
    flip(layout.image(os), 5 * LEAF)  # repaired meanwhile, and its mark is taken away
    damage.clear(FS, layout, [DamagedLeaves(os, 5, 6)])
    verify_replica(FS, layout)
    assert store.damaged == (DamagedLeaves(os, 3, 4), DamagedLeaves(os, 600, 601))
