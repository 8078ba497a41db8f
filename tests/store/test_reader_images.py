"""Images of the head that are gone, removed or not made yet: which points need them, and how they are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from replica.durable import FileSystem
from replica.errors import StorageError
from replica.store import Layout, ReplicaReader, ReplicaStore
from tests.store.small_primary import SmallPrimary

FS = FileSystem()


def replica(tmp_path: Path) -> tuple[SmallPrimary, ReplicaStore]:
    """Three points: `data` is in all of them, `os` is removed with the second and comes again with the third."""
    primary = SmallPrimary({"os": 70_000, "data": 50_000})
    store = primary.enrol(FS, tmp_path)
    primary.scribble()
    primary.sync(store)
    removed = primary.content.pop("os")
    primary.sync(store)
    primary.content["os"] = removed
    primary.scribble("os")
    primary.sync(store)
    return primary, store


def restores(store: ReplicaStore, primary: SmallPrimary, number: int) -> bool:
    try:
        with ReplicaReader(FS, store.directory).open_point(number) as point:
            for disk in point.disks:
                buffer = bytearray(disk.size_bytes)
                point.read_into(disk.id, 0, buffer)
                assert bytes(buffer) == primary.copies[number][disk.name]
    except StorageError:
        return False
    return True


@pytest.mark.parametrize(("disk", "left"), [("data", set()), ("os", {1, 2})])
def test_a_point_is_restorable_if_the_images_are_there_that_it_reads(tmp_path: Path, disk: str, left: set[int]) -> None:
    primary, store = replica(tmp_path)
    Layout(store.directory).image(primary.ids[disk]).unlink()
    infos = ReplicaReader(FS, store.directory).points()
    assert {info.state.point for info in infos if info.restorable} == left
