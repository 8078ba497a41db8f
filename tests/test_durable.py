"""durable: complete I/O, holes, atomic replacement in the right order, locks, errors with names."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replica import durable
from replica.durable import File, FileSystem, SystemCalls
from replica.errors import BusyError, StorageError, StorageFullError, TargetExistsError

PAGE = 4096


@pytest.fixture
def calls(tmp_path: Path) -> Iterator[list[str]]:
    """What reaches the kernel of fsync, rename and unlink, in order, by name; until `tmp_path` is removed."""
    seen: list[str] = []
    real = {name: getattr(os, name) for name in ("fsync", "rename", "unlink")}

    def fsync(fd: int) -> None:
        seen.append("fsync " + Path(f"/proc/self/fd/{fd}").readlink().name)
        real["fsync"](fd)

    def rename(source: Path, target: Path) -> None:
        seen.append(f"rename {source.name} {target.name}")
        real["rename"](source, target)

    def unlink(path: Path) -> None:
        seen.append(f"unlink {path.name}")
        real["unlink"](path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "rename", rename)
        patch.setattr(os, "unlink", unlink)
        yield seen


def fail(number: int) -> Any:
    def raises(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return raises


# Files.


def test_reads_and_writes_are_complete_also_where_the_kernel_is_short(
    fs: FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(100_000)
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, view, at: pwrite(fd, view[:777], at))
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:333]], at))
    with fs.create(tmp_path / "a") as file:
        file.write(5, data)
        assert file.read(5, len(data)) == data
        assert file.read(0, 5) == bytes(5)
        buffer = bytearray(200)
        assert file.read_into(len(data) - 95, buffer) == 100
        assert buffer == data[-100:] + bytes(100)
        assert file.size() == len(data) + 5


def test_a_file_is_created_once_and_private_when_asked(fs: FileSystem, tmp_path: Path) -> None:
    fs.create(tmp_path / "key", private=True).close()
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(StorageError, match="cannot create .*key"):
        fs.create(tmp_path / "key")


def test_opened_for_reading_nothing_can_be_written(fs: FileSystem, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    with fs.open(tmp_path / "a") as file, pytest.raises(StorageError, match="cannot write"):
        file.write(0, b"y")
    with fs.open(tmp_path / "a", write=True) as file:
        file.write(0, b"y")
    assert (tmp_path / "a").read_bytes() == b"y"


def test_closing_twice_closes_no_other_file(fs: FileSystem, tmp_path: Path) -> None:
    first = fs.create(tmp_path / "a")
    first.close()
    with fs.create(tmp_path / "b") as second:  # gets the same descriptor
        first.close()
        second.write(0, b"alive")


@pytest.mark.parametrize("punches", [True, False], ids=["punched", "written"])
@pytest.mark.parametrize(
    ("offset", "length"), [(0, PAGE), (PAGE, 2 * PAGE), (100, 50), (5000, 9000), (3 * PAGE, PAGE * 9)]
)
def test_zero_zeros_the_range_inside_the_size(
    fs: FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: int, length: int, punches: bool
) -> None:
    if not punches:

        class Libc:
            @staticmethod
            def fallocate(*_: object) -> int:
                ctypes.set_errno(errno.EOPNOTSUPP)
                return -1

        monkeypatch.setattr(durable, "_libc", Libc)
    data = os.urandom(4 * PAGE + 123)
    with fs.create(tmp_path / "a") as file:
        file.write(0, data)
        file.zero(offset, length)
        stop = min(offset + length, len(data))
        assert file.read(0, len(data)) == data[:offset] + bytes(stop - offset) + data[stop:]
        assert file.size() == len(data)
        file.zero(len(data) + 5, 10)
        assert file.size() == len(data)


class NoDirect(SystemCalls):
    """A file system without direct I/O, or with larger blocks than are usual, which only the first read tells."""

    def __init__(self, refuses: str) -> None:
        self.refuses, self.direct, self.dropped = refuses, False, list[tuple[int, int]]()

    def set_direct(self, fd: int, direct: bool) -> None:
        if self.refuses == "flag":
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self.direct = direct

    def preadv(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        if self.direct:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return super().preadv(fd, buffers, offset)

    def fadvise(self, fd: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        self.dropped.append((offset, length))


@pytest.mark.parametrize("refuses", ["", "flag", "read"])
@given(st.integers(0, 5 * PAGE), st.integers(0, 4 * PAGE), st.booleans(), st.integers(0, 600))
def test_what_the_device_has_is_what_was_written(refuses: str, offset: int, length: int, whole: bool, at: int) -> None:
    if whole:
        offset, at = offset // PAGE * PAGE, 0
    data, calls = os.urandom(4 * PAGE + 123), NoDirect(refuses) if refuses else SystemCalls()
    memory = np.frombuffer(mmap.mmap(-1, 5 * PAGE), np.uint8)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "a"
        path.write_bytes(data)
        with FileSystem(calls).open(path) as file:
            file.read_from_device()
            for _ in range(2):
                memory[:] = 0xA5
                count = file.read_into(offset, memory[at : at + length].data)
                assert count == len(data[offset : offset + length])
                assert memory[at : at + count].tobytes() == data[offset : offset + length]
                assert set(memory[:at]) | set(memory[at + length :]) <= {0xA5}
    if isinstance(calls, NoDirect) and length:
        assert set(calls.dropped) == {(offset, length)}


def test_reading_from_the_device_leaves_the_cache_alone(fs: FileSystem, tmp_path: Path) -> None:
    with fs.create(tmp_path / "a") as file, fs.open(tmp_path / "a") as other:
        file.write(0, os.urandom(64 * PAGE))
        file.sync()
        file.drop_cache()
        if cached(file):
            pytest.skip("this file system keeps what it has in memory")
        other.read_from_device()
        assert other.read(0, 64 * PAGE) == other.read(0, 64 * PAGE)
        assert not cached(file)
        file.read(0, PAGE)
        other.read(0, PAGE)
        assert cached(file)


@pytest.mark.parametrize("refuses", [False, True])
@given(st.integers(0, 3 * PAGE), st.integers(0, 4 * PAGE), st.booleans(), st.integers(0, 600))
def test_what_is_written_to_the_device_is_there(refuses: bool, offset: int, length: int, whole: bool, at: int) -> None:
    if whole:
        offset, at = offset // PAGE * PAGE, 0
    memory = np.frombuffer(mmap.mmap(-1, 5 * PAGE), np.uint8)
    memory[:] = np.frombuffer(os.urandom(5 * PAGE), np.uint8)
    direct: list[int] = []

    class Blocks(SystemCalls):
        def pwrite(self, fd: int, data: Any, offset: int) -> int:
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
                if refuses:
                    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
                direct.append(len(data))
            return super().pwrite(fd, data, offset)

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "a"
        with FileSystem(Blocks()).create(path) as file:
            file.truncate(7 * PAGE + 123)
            file.write_to_device()
            file.write(offset, memory[at : at + length].data)
            file.write(7 * PAGE, b"end")
            file.sync()
        data = memory[at : at + length].tobytes()
        assert path.read_bytes() == (bytes(offset) + data).ljust(7 * PAGE, b"\0") + b"end".ljust(123, b"\0")
    assert sum(direct) in (0, length // PAGE * PAGE if not (refuses or offset % PAGE or at % PAGE) else 0)


def cached(file: File) -> bool:
    """mincore(2) of the first page; asking does not read it."""
    with mmap.mmap(file.fileno(), PAGE) as mapped:
        there = ctypes.create_string_buffer(1)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(begin), ctypes.c_size_t(PAGE), there) == 0
        return bool(there.raw[0] & 1)


def test_a_file_is_cloned_or_nothing_happens(fs: FileSystem, tmp_path: Path) -> None:
    data = os.urandom(3 * PAGE)
    with fs.create(tmp_path / "a") as source, fs.create(tmp_path / "b") as target:
        source.write(0, data)
        assert target.read(0, len(data) + 1) == (data if target.clone_from(source) else b"")


def test_zero_gives_the_space_back(fs: FileSystem, tmp_path: Path) -> None:
    with fs.create(tmp_path / "a") as file:
        file.write(0, os.urandom(1 << 20))
        file.sync()
        before = file.allocated_bytes()
        file.zero(0, 1 << 19)
        assert file.allocated_bytes() <= before - (1 << 18)


def test_a_failing_punch_is_an_error(fs: FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Libc:
        @staticmethod
        def fallocate(*_: object) -> int:
            ctypes.set_errno(errno.EIO)
            return -1

    monkeypatch.setattr(durable, "_libc", Libc)
    with fs.create(tmp_path / "a") as file:
        file.write(0, b"data")
        with pytest.raises(StorageError, match="cannot punch a hole into"):
            file.zero(0, 4)


@given(pages=st.lists(st.booleans(), max_size=12), start=st.integers(0, 13 * PAGE), length=st.integers(0, 13 * PAGE))
def test_data_runs_leave_out_holes_and_nothing_else(pages: list[bool], start: int, length: int) -> None:
    fs = FileSystem()
    stop = start + length
    with fs.create_anonymous(Path(tempfile.gettempdir())) as file:
        file.truncate(len(pages) * PAGE)
        for number, used in enumerate(pages):
            if used:
                file.write(number * PAGE, b"\1" * PAGE)
        runs = list(file.data_runs(start, stop))
        covered = {i for offset, count in runs for i in range(offset, offset + count)}
        wanted = {i for i in range(start, min(stop, len(pages) * PAGE)) if pages[i // PAGE]}
        assert wanted <= covered
        assert all(start <= offset and count > 0 and offset + count <= stop for offset, count in runs)
        assert all(a + b <= c for (a, b), (c, _) in pairwise(runs))


def test_scratch_files_have_no_name(fs: FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fs.create_anonymous(tmp_path) as file:
        file.write(0, b"x")
        assert list(tmp_path.iterdir()) == []
    plain = os.open
    refused = fail(errno.EOPNOTSUPP)
    monkeypatch.setattr(
        os, "open", lambda p, flags, *m: refused() if flags & os.O_TMPFILE == os.O_TMPFILE else plain(p, flags, *m)
    )
    with fs.create_anonymous(tmp_path) as file:
        file.write(0, b"x")
        assert file.read(0, 1) == b"x"
        assert list(tmp_path.iterdir()) == []


# Names.


def test_replace_syncs_the_file_then_renames_then_syncs_the_directory(
    fs: FileSystem, tmp_path: Path, calls: list[str]
) -> None:
    fs.replace_bytes(tmp_path / "state", b"one")
    temporary = calls[0].removeprefix("fsync ")
    assert temporary != "state"
    assert calls == [f"fsync {temporary}", f"rename {temporary} state", f"fsync {tmp_path.name}"]
    fs.replace_bytes(tmp_path / "state", b"two", private=True)
    assert fs.read_bytes(tmp_path / "state", 3) == b"two"
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o600
    assert fs.list_names(tmp_path) == ["state"]


@pytest.mark.parametrize("step", ["pwrite", "fsync", "rename"])
@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, StorageFullError), (errno.EDQUOT, StorageFullError), (errno.EIO, StorageError)]
)
def test_a_failed_replace_leaves_the_old_content_and_no_rubbish(
    fs: FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int, kind: type[StorageError]
) -> None:
    fs.replace_bytes(tmp_path / "state", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail(number))
        with pytest.raises(StorageError) as caught:
            fs.replace_bytes(tmp_path / "state", b"new")
    assert type(caught.value) is kind
    assert "state" in str(caught.value)
    assert fs.read_bytes(tmp_path / "state", 3) == b"old"
    assert fs.list_names(tmp_path) == ["state"]


def test_publish_makes_both_directories_durable(fs: FileSystem, tmp_path: Path, calls: list[str]) -> None:
    for name in ("incoming", "points"):
        (tmp_path / name).mkdir()
    (tmp_path / "incoming/x").write_bytes(b"1")
    fs.publish(tmp_path / "incoming/x", tmp_path / "points/y")
    assert calls == ["rename x y", "fsync points", "fsync incoming"]
    assert fs.list_names(tmp_path / "points") == ["y"]


def test_publish_new_replaces_nothing(fs: FileSystem, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"1")
    fs.publish_new(tmp_path / "x", tmp_path / "y")
    assert fs.list_names(tmp_path) == ["y"]
    (tmp_path / "x").write_bytes(b"2")
    with pytest.raises(TargetExistsError, match="y already exists"):
        fs.publish_new(tmp_path / "x", tmp_path / "y")
    assert (tmp_path / "y").read_bytes() == b"1"


def test_unlink_is_durable_and_idempotent(fs: FileSystem, tmp_path: Path, calls: list[str]) -> None:
    (tmp_path / "x").write_bytes(b"1")
    fs.unlink(tmp_path / "x")
    assert calls == ["unlink x", f"fsync {tmp_path.name}"]
    fs.unlink(tmp_path / "x")
    assert not fs.exists(tmp_path / "x")


def test_directories_are_made_durable_in_their_parents(fs: FileSystem, tmp_path: Path, calls: list[str]) -> None:
    fs.make_directory(tmp_path / "a/b/c", private=True)
    assert calls == [f"fsync {tmp_path.name}", "fsync a", "fsync b"]
    assert (tmp_path / "a/b/c").stat().st_mode & 0o777 == 0o700
    fs.make_directory(tmp_path / "a/b/c")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="file"):
        fs.make_directory(tmp_path / "file/under")


def test_a_removed_tree_takes_links_but_not_their_targets(fs: FileSystem, tmp_path: Path) -> None:
    fs.make_directory(tmp_path / "tree/deep")
    (tmp_path / "tree/deep/file").write_bytes(b"1")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").write_bytes(b"1")
    (tmp_path / "tree/link").symlink_to(tmp_path / "kept")
    fs.remove_tree(tmp_path / "tree")
    assert fs.list_names(tmp_path) == ["kept"]
    assert fs.list_names(tmp_path / "kept") == ["file"]
    fs.remove_tree(tmp_path / "tree")


def test_links_become_what_they_should_be_and_files_stay(fs: FileSystem, tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"1")
    fs.set_links(tmp_path, {"a": "x", "b": "y", "real": "z"})
    fs.set_links(tmp_path, {"a": "x", "b": "w", "c": "v"})
    assert {p.name: str(p.readlink()) for p in tmp_path.iterdir() if p.is_symlink()} == {"a": "x", "b": "w", "c": "v"}
    assert (tmp_path / "real").read_bytes() == b"1"


def test_reading_is_bounded(fs: FileSystem, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    assert fs.read_bytes(tmp_path / "x", 5) == b"12345"
    with pytest.raises(StorageError, match="more than the 4"):
        fs.read_bytes(tmp_path / "x", 4)


def test_an_absent_directory_is_empty_and_an_unreadable_one_is_an_error(fs: FileSystem, tmp_path: Path) -> None:
    assert fs.list_names(tmp_path / "absent") == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot list"):
        fs.list_names(tmp_path / "file")


def test_errors_name_the_path_and_keep_the_cause(fs: FileSystem, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot open .*absent: No such file") as caught:
        fs.open(tmp_path / "absent")
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    assert fs.free_bytes(tmp_path) > 0


# Locks.


def test_an_exclusive_lock_excludes_and_says_what_it_was_told(fs: FileSystem, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with fs.lock(path):
        with pytest.raises(BusyError, match="somebody syncs"):
            fs.lock(path, busy="somebody syncs")
        with pytest.raises(BusyError, match="lock is locked"):
            fs.lock(path, shared=True)
    with fs.lock(path, shared=True), fs.lock(path, shared=True), pytest.raises(BusyError):
        fs.lock(path)
    fs.lock(path).release()


def test_a_lock_dies_with_its_process(fs: FileSystem, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    program = (
        "import sys, time; from pathlib import Path; from replica.durable import FileSystem\n"
        "held = FileSystem().lock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(BusyError):
            fs.lock(path)
        other.kill()
        other.wait()
    with fs.lock(path, wait=True):
        pass


def test_a_file_can_be_handed_over(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    with File(os.open(tmp_path / "x", os.O_RDONLY), tmp_path / "x") as file:
        assert file.read(1, 5) == b"bc"
        assert os.fstat(file.fileno()).st_size == 3
        file.drop_cache()


def test_only_an_empty_directory_is_removed_as_such(fs: FileSystem, tmp_path: Path) -> None:
    for name in ("empty", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "x").touch()
    for name in ("empty", "full"):
        fs.remove_empty(tmp_path / name)
    assert fs.list_names(tmp_path) == ["full"]


def test_a_link_that_leads_nowhere_takes_its_name_and_goes_as_a_link(fs: FileSystem, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "nowhere").symlink_to("missing")
    (tmp_path / "there").symlink_to("kept")
    assert fs.is_taken(tmp_path / "nowhere") and not fs.exists(tmp_path / "nowhere")
    assert fs.is_directory(tmp_path / "there") and not fs.is_directory(tmp_path / "nowhere")
    for name in ("nowhere", "there"):
        fs.remove_any(tmp_path / name)
    assert fs.list_names(tmp_path) == ["kept"]
    fs.remove_any(tmp_path / "kept")
    assert not fs.is_taken(tmp_path / "kept")
