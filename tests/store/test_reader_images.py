"""Images of the head that are gone, removed or not made yet: which points need them, and how they are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from replica.durable import FileSystem
from replica.errors import StorageError
from replica.store import Layout, ReplicaReader, ReplicaStore
from replica.store.points import Link
from replica.store.reader import PointReader
from tests.store.small_primary import SmallPrimary, commit_until

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


def test_what_is_not_made_yet_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit that is cut before it makes the image of a disk that had been there before, and been removed."""
    primary, store = replica(tmp_path)
    removed = primary.content.pop("os")
    primary.sync(store)
    primary.content["os"] = removed
    commit_until("write", StorageError("the power is gone"), store, primary, monkeypatch)
    assert store.applying and not Layout(store.directory).image(primary.ids["os"]).exists()
    listed = {info.state.point for info in ReplicaReader(FS, store.directory).points() if info.restorable}
    assert listed == {1, 2, 3, 4}
    assert all(restores(store, primary, point) for point in listed)


@pytest.mark.parametrize("when", ["opened", "read", "listed"])
def test_a_disk_that_is_removed_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    primary, store = replica(tmp_path)
    left = [1]

    def remove() -> None:
        if left:
            left.clear()
            primary.content.pop("os")
            primary.sync(store)

    real_open, real_newer, real_exists = PointReader._open_images, PointReader._newer, FileSystem.exists

    def open_images(point: PointReader, links: tuple[Link, ...]) -> None:
        remove()
        real_open(point, links)

    def newer(point: PointReader, connection: object) -> object:
        remove()
        return real_newer(point, connection)

    def exists(fs: FileSystem, path: Path) -> bool:
        if path.suffix == ".img":
            remove()
        return real_exists(fs, path)

    if when == "listed":
        monkeypatch.setattr(FileSystem, "exists", exists)
    else:
        monkeypatch.setattr(PointReader, *(("_open_images", open_images) if when == "opened" else ("_newer", newer)))
    reader = ReplicaReader(FS, store.directory)
    assert all(info.restorable for info in reader.points())
    assert restores(store, primary, 3) and not left
