"""The disk in memory is a disk: what a `FileSystem` on it answers is what one on the kernel's answers."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from replica.durable import FileSystem
from replica.errors import BusyError, ReplicaError, StorageError, TargetExistsError
from tests.crash.crash_states import CrashModel, digest
from tests.crash.memory_disk import MemoryDisk

Both = list[tuple[FileSystem, Path]]
Action = Callable[[FileSystem, Path], Any]


@pytest.fixture
def both(tmp_path: Path) -> Both:
    memory = FileSystem(MemoryDisk())
    memory.make_directory(Path("/nowhere/root"))
    return [(FileSystem(), tmp_path), (memory, Path("/nowhere/root"))]


def outcome(action: Action, fs: FileSystem, root: Path) -> object:
    try:
        return action(fs, root)
    except ReplicaError as error:
        return type(error)


def same(both: Both, action: Action) -> Any:
    real, memory = (outcome(action, fs, root) for fs, root in both)
    assert real == memory
    return real


def contents(fs: FileSystem, root: Path) -> object:
    return {name: fs.read_bytes(root / name, 1 << 20) for name in fs.list_names(root)}


def test_names(both: Both) -> None:
    actions: list[Action] = [
        lambda fs, root: fs.replace_bytes(root / "a", b"one"),
        lambda fs, root: fs.replace_bytes(root / "a", b"two"),
        lambda fs, root: fs.create(root / "a").close(),
        lambda fs, root: fs.open(root / "none").close(),
        lambda fs, root: fs.open(root / "a" / "b").close(),
        lambda fs, root: fs.create(root / "b").close(),
        lambda fs, root: fs.publish_new(root / "b", root / "a"),
        lambda fs, root: fs.publish_new(root / "b", root / "c"),
        lambda fs, root: fs.publish(root / "c", root / "a"),
        lambda fs, root: fs.copy(root / "a", root / "copy"),
        lambda fs, root: [fs.exists(root / name) for name in ("a", "b", "c", "a/b")],
        lambda fs, root: fs.unlink(root / "none"),
        contents,
        lambda fs, root: fs.unlink(root / "a"),
        contents,
    ]
    for action in actions:
        same(both, action)
    assert same(both, lambda fs, root: fs.publish_new(root / "copy", root / "copy")) is TargetExistsError


def test_directories_and_links(both: Both) -> None:
    actions: list[Action] = [
        lambda fs, root: fs.make_directory(root / "x" / "y"),
        lambda fs, root: fs.make_directory(root / "x" / "y"),
        lambda fs, root: fs.replace_bytes(root / "x" / "y" / "file", b"content"),
        lambda fs, root: fs.set_links(root / "x", {"l": "y", "m": "none"}),
        lambda fs, root: fs.list_names(root / "x"),
        lambda fs, root: [fs.exists(root / "x" / name) for name in ("l", "m", "y")],
        lambda fs, root: fs.set_links(root / "x", {"m": "y"}),
        lambda fs, root: fs.list_names(root / "x"),
        lambda fs, root: fs.unlink(root / "x"),
        lambda fs, root: fs.remove_tree(root / "x"),
        lambda fs, root: fs.list_names(root),
        lambda fs, root: fs.list_names(root / "none"),
    ]
    for action in actions:
        same(both, action)


def test_locks_and_handles_outlive_names(both: Both) -> None:
    def locks(fs: FileSystem, root: Path) -> list[bool]:
        taken = []
        with fs.lock(root / "lock", shared=True), fs.lock(root / "lock", shared=True):
            try:
                fs.lock(root / "lock").release()
            except BusyError:
                taken.append(True)
        fs.lock(root / "lock").release()
        return taken

    def orphan(fs: FileSystem, root: Path) -> bytes:
        with fs.create(root / "gone") as file, fs.create_anonymous(root) as scratch:
            fs.unlink(root / "gone")
            file.write(3, b"abc")
            scratch.write(0, file.read(0, 10))
            return scratch.read(0, 10)

    assert same(both, locks) == [True]
    assert same(both, orphan) == b"\0\0\0abc"


@pytest.mark.parametrize("seed", range(20))
def test_contents(both: Both, seed: int) -> None:
    def write(fs: FileSystem, root: Path) -> list[object]:
        rng, seen = random.Random(seed), list[object]()
        with fs.create(root / f"file-{seed}") as file:
            for _ in range(60):
                offset, length = rng.randrange(40_000), rng.choice([1, 511, 4096, 9000])
                kind = rng.randrange(5)
                if kind < 2:
                    file.write(offset, rng.randbytes(length))
                elif kind == 2:
                    file.zero(offset, length)
                elif kind == 3:
                    file.truncate(offset)
                else:
                    seen.append(file.read(offset, length))
                seen.append(file.size())
            data = file.read(0, 1 << 20)
            covered = bytearray(file.size())
            for start, count in file.data_runs(0, file.size()):
                covered[start : start + count] = b"\1" * count
            return [*seen, data, all(covered[n] for n, byte in enumerate(data) if byte)]

    assert same(both, write)[-1] is True


def test_stamps_change_with_every_write_and_lie_in_the_past() -> None:
    fs = FileSystem(MemoryDisk())
    with fs.create(Path("/file")) as file:
        before = file.stat()
        file.write(0, b"x")
        assert file.stat().st_mtime_ns > before.st_mtime_ns
        assert file.stat().st_mtime_ns % 10**9


def test_an_unsynced_write_is_lost_and_a_synced_one_is_not() -> None:
    disk, model, path = MemoryDisk(), CrashModel(), Path("/file")
    fs, disk.listener = FileSystem(disk), model.apply
    with fs.create(path) as file:
        file.write(0, b"synced")
        file.sync()
        fs.sync_directory(Path("/"))
        file.write(0, b"un")
    lost, kept = model.state((0,)), model.state((1,))
    assert FileSystem(MemoryDisk(lost)).read_bytes(path, 10) == b"synced"
    assert FileSystem(MemoryDisk(kept)).read_bytes(path, 10) == b"unnced"
    assert digest(kept) == digest(disk.tree()) != digest(lost)


def test_what_a_failed_sync_was_to_write_is_not_written_by_the_next() -> None:
    disk, model, path = MemoryDisk(), CrashModel(), Path("/file")
    fs, disk.listener = FileSystem(disk), model.apply

    def fault(_number: int, name: str, _path: str) -> None:
        if name == "sync":
            raise OSError(5, "Input/output error")

    with fs.create(path) as file:
        fs.sync_directory(Path("/"))
        file.write(0, b"lost")
        disk.fault = fault
        with pytest.raises(StorageError):
            file.sync()
        disk.fault = None
        file.sync()
        assert file.read(0, 4) == b"lost"
    assert FileSystem(MemoryDisk(model.state(()))).read_bytes(path, 10) == b""


def test_paths_of_the_disk_exist_nowhere_else() -> None:
    """So whatever in the engine goes round its file system fails."""
    assert not Path("/nowhere").exists()
