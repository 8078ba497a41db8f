"""A Merkle tree of which some digests rotted, at any level: the next commits heal it, and no point is ever wrong."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from replica.durable import FileSystem
from replica.merkle import _OFFSETS, DEPTH, FAN_OUT
from replica.model import DIGEST_BYTES, Disk
from replica.store import Layout, ReplicaReader, ReplicaStore
from tests.store.small_primary import SmallPrimary

SMALL = 512
FS = FileSystem()


class SmallLeaves(SmallPrimary):
    """Leaves of 512 bytes, so that a small disk has a tree of three levels."""

    def disk(self, name: str) -> Disk:
        return Disk(self.ids[name], name, len(self.content[name]), SMALL, SMALL, SMALL)


def rot(store: ReplicaStore, primary: SmallPrimary, level: int, first: int, digests: bytes) -> None:
    with Layout(store.directory).tree(primary.ids["os"]).open("r+b") as file:
        file.seek(_OFFSETS[level] + DIGEST_BYTES * first)
        file.write(digests)


def check(store: ReplicaStore, primary: SmallPrimary, points: int) -> None:
    infos = ReplicaReader(FS, store.directory).points()
    assert [info.restorable for info in infos] == [True] * points
    for info in infos:
        with ReplicaReader(FS, store.directory).open_point(info.state.point) as point:
            found = {disk.name: bytearray(disk.size_bytes) for disk in point.disks}
            for disk in point.disks:
                point.read_into(disk.id, 0, found[disk.name])
            assert found == primary.copies[info.state.point]


@pytest.mark.parametrize("what", ["shrink", "remove", "zero"])
def test_a_lost_write_on_a_node_loses_nothing_that_lies_below(tmp_path: Path, what: str) -> None:
    primary = SmallLeaves({"os": 512 * SMALL, "data": SMALL})
    store = primary.enrol(FS, tmp_path)
    os = primary.content["os"]
    os[:SMALL] = primary.random.randbytes(SMALL)
    os[300 * SMALL : 320 * SMALL] = primary.random.randbytes(20 * SMALL)  # the first and the last leaf below are zero
    primary.sync(store)
    rot(store, primary, 1, 1, bytes(DIGEST_BYTES))
    if what == "shrink":
        del os[256 * SMALL :]
    elif what == "remove":
        del primary.content["os"]
    else:
        os[256 * SMALL :] = bytes(256 * SMALL)
    primary.sync(store)
    check(store, primary, 2)


@pytest.mark.parametrize("seed", range(60))
def test_whatever_rots_the_next_commit_heals(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    primary = SmallLeaves({"os": rng.choice([70_000, 300_000, 600_000])}, seed=seed)
    store = primary.enrol(FS, tmp_path)
    content = primary.content["os"]

    def write() -> None:
        for _ in range(rng.choice([1, 3, 6])):
            at = rng.randrange(len(content))
            length = min(rng.choice([1, 512, 5_000, 60_000, 150_000]), len(content) - at)
            content[at : at + length] = bytes(length) if rng.random() < 0.5 else rng.randbytes(length)

    for _ in range(2):
        write()
        primary.sync(store)
    level = rng.choice([0, 0, 1, 1, *range(2, DEPTH + 1)])
    first = rng.randrange(-(-len(content) // SMALL // FAN_OUT**level) or 1)
    count = rng.choice([1, 1, 16, 128])
    rot(
        store, primary, level, first, bytes(DIGEST_BYTES * count) if rng.random() < 0.8 else rng.randbytes(DIGEST_BYTES)
    )
    change = rng.random()
    if change < 0.4:
        del content[rng.randrange(len(content)) + 1 :]
    elif change < 0.6:
        content.extend(bytes(rng.randrange(1, 50_000)))
    if change > 0.2:
        write()
    primary.sync(store)
    check(store, primary, 3)
