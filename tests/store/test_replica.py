"""The store's life: receive, commit, recover, read, rotate, verify, restore."""

from __future__ import annotations

import errno
import os
import threading
import tracemalloc
from pathlib import Path

import pytest
from blake3 import blake3

from replica.delta.manifest import MAX_SEGMENTS
from replica.delta.segment import MIN_BLOB_BYTES
from replica.durable import File, FileSystem, SystemCalls
from replica.errors import (
    BaseMismatchError,
    BusyError,
    ConflictError,
    DamageError,
    FencedError,
    FormatError,
    KeyMissingError,
    PointGoneError,
    ProtocolError,
    ReplicaError,
    RootMismatchError,
    StorageError,
    StorageFullError,
    TargetExistsError,
)
from replica.images.flat import FlatImage
from replica.model import EMPTY_DELTA_ID, DeltaId, DiskId, Epoch, random_id
from replica.store import Layout, Policy, ReplicaReader, ReplicaStore, StoreState, incoming, restore_point
from replica.store.layout import HeadFormat, load_state, save_state
from replica.store.marks import Marks
from tests.store.small_primary import SmallPrimary

SIZES = {"os": 3_000_001, "data": 9_437_184}


@pytest.fixture
def fs() -> FileSystem:
    return FileSystem()


def check_points(fs: FileSystem, directory: Path, primary: SmallPrimary, expected: list[int]) -> None:
    """Every listed point is exactly one of `expected`, and reads back byte for byte."""
    reader = ReplicaReader(fs, directory)
    infos = reader.points()
    assert [info.state.point for info in infos] == expected
    assert all(info.restorable for info in infos)
    for number in expected:
        with reader.open_point(number) as point:
            for disk in point.disks:
                buffer = bytearray(disk.size_bytes)
                point.read_into(disk.id, 0, buffer)
                assert buffer == primary.copies[number][disk.name], (number, disk.name)


@pytest.mark.parametrize("head_format", ["raw", "vhd"])
def test_points_restore_exactly_and_rotate(fs: FileSystem, tmp_path: Path, head_format: str) -> None:
    primary = SmallPrimary(SIZES)
    store = primary.enrol(fs, tmp_path, head_format)
    for _ in range(6):
        primary.scribble()
        primary.sync(store)
    primary.sync(store)  # nothing changed: a point all the same
    check_points(fs, store.directory, primary, [1, 2, 3, 4, 5, 6, 7])
    assert list(store.rotate(Policy(keep_last=3, hourly=0)).dropped) == [1, 2, 3]
    check_points(fs, store.directory, primary, [4, 5, 6, 7])  # 6 and 7 are equal and count as one
    assert list(store.rotate(Policy(keep_last=3, hourly=0)).dropped) == []
    assert all(not v.mismatches for v in ReplicaReader(fs, store.directory).verify())
    store.close()
    assert not fs.list_names(store.directory / "incoming")
    assert len(fs.list_names(store.directory / "points")) == 3


def test_disks_grow_shrink_come_and_go(fs: FileSystem, tmp_path: Path) -> None:
    primary = SmallPrimary(SIZES)
    store = primary.enrol(fs, tmp_path)
    primary.scribble()
    primary.sync(store)
    primary.content["os"] += primary.random.randbytes(500_000) + bytes(500_000)
    del primary.content["data"][4_000_123:]
    primary.sync(store)
    primary.scribble()
    primary.ids["extra"] = DiskId(random_id())
    primary.content["extra"] = bytearray(primary.random.randbytes(100_000))
    primary.sync(store)
    del primary.content["data"], primary.ids["data"]
    primary.sync(store)
    primary.scribble()
    del primary.content["os"][10_000:]
    primary.sync(store)
    check_points(fs, store.directory, primary, [1, 2, 3, 4, 5])
    assert all(not v.mismatches for v in ReplicaReader(fs, store.directory).verify())


def test_restore_writes_images_and_refuses_to_overwrite(fs: FileSystem, tmp_path: Path) -> None:
    primary = SmallPrimary(SIZES)
    store = primary.enrol(fs, tmp_path / "s")
    for _ in range(3):
        primary.scribble()
        primary.sync(store)
    reader = ReplicaReader(fs, store.directory)
    with reader.open_point(2) as point:
        paths = restore_point(fs, point, tmp_path / "out", "raw")
        assert {name: path.read_bytes() for name, path in paths.items()} == primary.copies[2]
        with pytest.raises(TargetExistsError):
            restore_point(fs, point, tmp_path / "out", "raw")
    assert fs.list_names(tmp_path / "out") == ["data.raw", "os.raw"]


class Sharing(SystemCalls):
    """A file system that clones; `spoil` bytes of what it made are another's by the time it is read."""

    def __init__(self, spoil: int) -> None:
        self.spoil, self.made = spoil, 0

    def clone(self, source: int, target: int) -> None:
        self.made += 1
        os.ftruncate(target, 0)
        os.pwrite(target, os.pread(source, os.fstat(source).st_size, 0), 0)
        os.pwrite(target, bytes(self.spoil), 1000)


@pytest.mark.parametrize("spoil", [0, 100])
@pytest.mark.parametrize("head_format", ["raw", "vhd"])
def test_what_is_shared_with_the_head_is_proven_or_written(tmp_path: Path, head_format: HeadFormat, spoil: int) -> None:
    primary, calls = SmallPrimary(SIZES), Sharing(spoil)
    other: HeadFormat = "vhd" if head_format == "raw" else "raw"
    store = primary.enrol(FileSystem(), tmp_path / "s", head_format)
    for _ in range(2):
        primary.scribble()
        primary.sync(store)
    reader = ReplicaReader(FileSystem(calls), store.directory)
    for number, form, clones in ((2, head_format, 2), (2, other, 2), (1, "raw", 2)):
        with reader.open_point(number) as point:
            paths = restore_point(FileSystem(calls), point, tmp_path / f"{number}-{form}", form)
            for disk in point.disks:
                with FlatImage.open(FileSystem(), paths[disk.name], form, size_bytes=disk.size_bytes) as image:
                    content = bytearray(disk.size_bytes)
                    image.read_into(0, content)
                    assert image.layout_problem() is None and content == primary.copies[number][disk.name]
        assert calls.made == clones


def test_rot_is_no_more_shared_than_copied(tmp_path: Path) -> None:
    primary = SmallPrimary(SIZES)
    store = primary.enrol(FileSystem(), tmp_path / "s")
    primary.scribble()
    primary.sync(store)
    image = Layout(store.directory).image(primary.ids["os"])
    with image.open("r+b") as file:
        file.seek(200_000)
        file.write(bytes(100) if any(primary.content["os"][200_000:200_100]) else b"x" * 100)
    calls = Sharing(0)
    with (
        ReplicaReader(FileSystem(calls), store.directory).open_point(1) as point,
        pytest.raises(DamageError, match="Merkle root"),
    ):
        restore_point(FileSystem(calls), point, tmp_path / "out", "raw")
    assert calls.made and not (tmp_path / "out").exists()


def test_what_a_killed_restore_left_goes_with_the_next(fs: FileSystem, tmp_path: Path) -> None:
    primary = SmallPrimary(SIZES)
    store = primary.enrol(fs, tmp_path / "s")
    primary.scribble()
    primary.sync(store)
    left = [f".{primary.ids['os']}.0123abcd.partial", ".files.0123abcd.partial"]
    others = [".notes.partial", ".files.partial", f"{primary.ids['os']}.0123abcd.partial", "mine.raw"]
    out = tmp_path / "out"
    (out / left[1] / "etc").mkdir(parents=True)
    for name in (left[0], f"{left[1]}/etc/web-1.xml", *others):
        (out / name).write_text("x")
    with ReplicaReader(fs, store.directory).open_point(1) as point:
        with fs.lock_directory(out, shared=True):  # as another restore has it while it writes
            restore_point(fs, point, out, "vhd")
        assert fs.list_names(out) == sorted([*left, *others, "data.vhd", "os.vhd"])
        restore_point(fs, point, out, "raw")
        assert fs.list_names(out) == sorted([*others, "data.vhd", "os.vhd", "data.raw", "os.raw"])
        with pytest.raises(TargetExistsError, match="is no directory"):
            restore_point(fs, point, out / "mine.raw", "raw")


def test_a_delta_on_another_base_or_epoch_is_refused(fs: FileSystem, tmp_path: Path) -> None:
    primary = SmallPrimary(SIZES)
    store = primary.enrol(fs, tmp_path)
    primary.scribble()
    stale = primary.make()
    primary.sync(store)
    with pytest.raises(BaseMismatchError):
        primary.send(store, stale)
    made = primary.make()
    with pytest.raises(FencedError):
        store.begin(made.delta_id, made.base.delta_id, Epoch(1, random_id()), made.header)
    with pytest.raises(FencedError):
        store.begin(made.delta_id, made.base.delta_id, Epoch(0, primary.epoch.holder), made.header)
    epoch = store.adopt(primary.epoch, random_id())
    assert epoch.counter == 2
    assert store.adopt(primary.epoch, epoch.holder) == epoch
    with pytest.raises(FencedError):
        primary.send(store, made)
    primary.epoch = epoch
    primary.scribble()
    primary.sync(store)
    check_points(fs, store.directory, primary, [1, 2])


def test_a_delta_with_a_wrong_root_changes_nothing(fs: FileSystem, tmp_path: Path) -> None:
    primary = SmallPrimary(SIZES)
    store = primary.enrol(fs, tmp_path)
    primary.scribble()
    primary.sync(store)
    primary.scribble()
    kept = primary.sent["os"]
    primary.sent["os"] = bytes(primary.content["os"])  # the delta leaves out what changed on this disk
    made = primary.make()
    primary.send(store, made)
    with pytest.raises(RootMismatchError):
        store.commit(made.delta_id)
    primary.sent["os"] = kept
    check_points(fs, store.directory, primary, [1])
    assert store.receiving is None and not any(n.startswith(".") for n in fs.list_names(store.directory / "points"))
    primary.sync(store)
    check_points(fs, store.directory, primary, [1, 2])


def test_segments_resume_in_another_process(fs: FileSystem, tmp_path: Path) -> None:
    primary = SmallPrimary({"os": 20 << 20})
    store = primary.enrol(fs, tmp_path)
    primary.content["os"][:] = primary.random.randbytes(20 << 20)
    made = primary.make()
    assert len(made.segments) >= 5
    store.begin(made.delta_id, made.base.delta_id, primary.epoch, made.header)
    for number in (0, 1, 3):
        store.receive(made.delta_id, number, *made.segments[number][1:])
    store.close()
    part = store.directory / "incoming" / f"{made.delta_id}.part"
    with part.open("r+b") as file:  # segment 1 did not survive the power failure
        file.seek(made.segments[1][1] + 1000)
        file.write(b"rotten")
    store = ReplicaStore.open(fs, store.directory)
    assert store.begin(made.delta_id, made.base.delta_id, primary.epoch, made.header) == [(0, 1), (3, 4)]
    with pytest.raises(ProtocolError):
        store.finish(made.delta_id, made.tail, made.tail_offset)
    with pytest.raises(FormatError):
        store.receive(made.delta_id, 2, made.segments[2][1], made.segments[2][2], b"x" * 100)
    primary.send(store, made)
    store.commit(made.delta_id)
    assert store.commit(made.delta_id) == made.result
    primary.acknowledge(made)
    check_points(fs, store.directory, primary, [1])


def test_segments_that_cannot_be_are_refused_and_many_cost_little(fs: FileSystem, tmp_path: Path) -> None:
    primary = SmallPrimary({"os": 20 << 20})
    store = primary.enrol(fs, tmp_path)
    primary.content["os"][:] = primary.random.randbytes(20 << 20)
    made = primary.make()
    store.begin(made.delta_id, made.base.delta_id, primary.epoch, made.header)

    def put(number: int, blob: bytes, offset: int = 160) -> None:
        store.receive(made.delta_id, number, offset, blake3(blob).digest(), blob)

    for number, blob in ((0, b""), (0, bytes(MIN_BLOB_BYTES - 1)), (MAX_SEGMENTS, bytes(100)), (-1, bytes(100))):
        with pytest.raises(ProtocolError, match="out of bounds"):
            put(number, blob)
    tracemalloc.start()
    try:
        for number in range(3000):
            put(number, b"x" * 100)
        only = tracemalloc.Filter(True, incoming.__file__)  # other threads of the process allocate as well
        found = tracemalloc.take_snapshot().filter_traces([only]).statistics("filename")
        assert 3000 * 40 < sum(entry.size for entry in found) < 3000 * 100
    finally:
        tracemalloc.stop()
    put(2999, b"x" * 100)
    for blob, offset in ((b"y" * 100, 160), (b"x" * 101, 160), (b"x" * 100, 161)):
        with pytest.raises(ConflictError, match="another segment 2999"):
            put(2999, blob, offset)
    for number in (3001, MAX_SEGMENTS - 1):
        put(number, b"x" * 100)
    here = [(0, 3000), (3001, 3002), (MAX_SEGMENTS - 1, MAX_SEGMENTS)]
    assert store.begin(made.delta_id, made.base.delta_id, primary.epoch, made.header) == here
    with pytest.raises(ProtocolError, match="segment 0 of delta"):
        store.finish(made.delta_id, made.tail, made.tail_offset)
    store.discard(made.delta_id)
    primary.send(store, made)
    assert store.commit(made.delta_id) == made.result


def test_a_manifest_with_other_segments_than_those_that_are_here_is_not_received(
    fs: FileSystem, tmp_path: Path
) -> None:
    primary = SmallPrimary({"os": 20 << 20})
    store = primary.enrol(fs, tmp_path)
    primary.content["os"][:] = primary.random.randbytes(20 << 20)
    made = primary.make()
    last = len(made.segments) - 1
    store.begin(made.delta_id, made.base.delta_id, primary.epoch, made.header)
    assert store.begin(made.delta_id, made.base.delta_id, primary.epoch, made.header) == []
    for segment in made.segments[:-1]:
        store.receive(made.delta_id, *segment)
    with pytest.raises(ProtocolError, match=f"segment {last} of"):
        store.finish(made.delta_id, made.tail, made.tail_offset)
    store.receive(made.delta_id, *made.segments[last])
    store.receive(made.delta_id, 500, *made.segments[last][1:])
    with pytest.raises(ProtocolError, match="does not name"):
        store.finish(made.delta_id, made.tail, made.tail_offset)


def test_a_received_delta_waits_for_its_commit_over_a_restart(fs: FileSystem, tmp_path: Path) -> None:
    primary = SmallPrimary(SIZES)
    store = primary.enrol(fs, tmp_path)
    primary.scribble()
    made = primary.make()
    primary.send(store, made)
    store.close()
    store = ReplicaStore.open(fs, store.directory)
    assert store.received == made.delta_id
    store.commit(made.delta_id)
    primary.acknowledge(made)
    check_points(fs, store.directory, primary, [1])


def test_only_one_process_writes(fs: FileSystem, tmp_path: Path) -> None:
    store = SmallPrimary(SIZES).enrol(fs, tmp_path)
    with pytest.raises(BusyError, match="in use by another process"):
        ReplicaStore.open(fs, store.directory)
    store.close()
    ReplicaStore.open(fs, store.directory).close()


class CutFileSystem(FileSystem):
    """Every write, sync, rename, unlink … is one step; from step `cut_at` on each of them fails."""

    def __init__(self, cut_at: int, error: int = errno.EIO) -> None:
        self.cut_at, self.error, self.steps = cut_at, error, 0

    def step(self) -> None:
        self.steps += 1
        if self.steps > self.cut_at:
            kind = StorageFullError if self.error == errno.ENOSPC else StorageError
            raise kind(f"step {self.steps} was cut")

    def open(self, path: Path, *, write: bool = False) -> File:
        file = super().open(path, write=write)
        return CutFile(self, file) if write else file

    def create(self, path: Path, *, private: bool = False) -> File:
        self.step()
        return CutFile(self, super().create(path, private=private))

    def sync_directory(self, path: Path) -> None:
        self.step()
        super().sync_directory(path)

    def publish(self, temporary: Path, final: Path) -> None:
        self.step()
        super().publish(temporary, final)

    def unlink(self, path: Path) -> None:
        self.step()
        super().unlink(path)


class CutFile(File):
    def __init__(self, fs: CutFileSystem, file: File) -> None:
        super().__init__(os.dup(file.fileno()), file.path)
        file.close()
        self._cut = fs

    def write(self, offset: int, data: object) -> None:
        self._cut.step()
        super().write(offset, data)  # type: ignore[arg-type]

    def truncate(self, size_bytes: int) -> None:
        self._cut.step()
        super().truncate(size_bytes)

    def zero(self, offset: int, length: int) -> None:
        self._cut.step()
        super().zero(offset, length)

    def sync(self) -> None:
        self._cut.step()
        super().sync()


def cut_in_the_head(directory: Path, delta_id: DeltaId, steps: int) -> None:
    """Commit what has arrived, and cut that so many steps behind the one that gave the inverse its name."""
    cutting = CutFileSystem(1 << 60)
    store = ReplicaStore.open(cutting, directory)
    original = cutting.step

    def step() -> None:
        if cutting.cut_at == 1 << 60 and (directory / "points" / str(delta_id)).exists():
            cutting.cut_at = cutting.steps + steps
        original()

    cutting.step = step  # type: ignore[method-assign]
    with pytest.raises(StorageError):
        store.commit(delta_id)
    assert store.stopped is not None
    store.close()


@pytest.mark.parametrize("head_format", ["raw", "vhd"])
@pytest.mark.parametrize("resize", [False, True])
def test_a_commit_cut_at_any_step_recovers(fs: FileSystem, tmp_path: Path, head_format: str, resize: bool) -> None:
    """Cut by failing I/O, then recovered by a new process: old points read exactly, and so does an acknowledged one."""
    cut_at, committed = 0, False
    while not committed:
        root = tmp_path / str(cut_at)
        primary = SmallPrimary({"os": 300_001, "data": 500_000}, seed=7)
        store = primary.enrol(fs, root, head_format)
        for _ in range(2):
            primary.scribble(count=3)
            primary.sync(store)
        primary.scribble(count=3)
        if resize:
            primary.content["os"] += primary.random.randbytes(70_000)
            del primary.content["data"][200_000:]
        made = primary.make()
        primary.send(store, made)
        store.close()

        cutting = CutFileSystem(1 << 60)
        store = ReplicaStore.open(cutting, store.directory)
        cutting.steps, cutting.cut_at = 0, cut_at
        try:
            store.commit(made.delta_id)
            committed = True
        except ReplicaError:
            # Listed once its state file has its name, acknowledged only once that name is durable.
            listed = len(ReplicaReader(fs, store.directory).points())
            primary.copies[3] = {name: bytes(data) for name, data in primary.content.items()}
            check_points(fs, store.directory, primary, [1, 2, 3][:listed])
            assert listed >= 2
        store.close()

        store = ReplicaStore.open(fs, store.directory)
        assert store.stopped is None and store.applying is None
        if store.head.delta_id != made.delta_id:
            assert not committed
            check_points(fs, store.directory, primary, [1, 2])
            if store.received is None:
                primary.send(store, made)
            store.commit(made.delta_id)
        primary.acknowledge(made)
        check_points(fs, store.directory, primary, [1, 2, 3])
        assert all(not v.mismatches for v in ReplicaReader(fs, store.directory).verify())
        assert not fs.list_names(store.directory / "incoming")
        primary.scribble()
        primary.sync(store)
        check_points(fs, store.directory, primary, [1, 2, 3, 4])
        store.close()
        cut_at += 1
    assert cut_at > 15


@pytest.mark.parametrize("lost", ["incoming", "points", "both"])
def test_recovery_goes_back_when_it_cannot_go_on(fs: FileSystem, tmp_path: Path, lost: str) -> None:
    """A commit cut in the head's rewrite; then the delta or the inverse rots."""
    primary = SmallPrimary({"os": 300_001, "data": 500_000}, seed=7)
    store = primary.enrol(fs, tmp_path)
    for _ in range(2):
        primary.scribble(count=3)
        primary.sync(store)
    primary.scribble(count=6)
    primary.content["os"] += primary.random.randbytes(70_000)
    del primary.content["data"][200_000:]
    made = primary.make()
    primary.send(store, made)
    store.close()
    cut_in_the_head(store.directory, made.delta_id, 9)
    for directory in ["incoming", "points"] if lost == "both" else [lost]:
        path = store.directory / directory / str(made.delta_id)
        data = bytearray(path.read_bytes())
        data[-20 if directory == "points" else len(data) // 2] ^= 1
        path.write_bytes(data)
    store = ReplicaStore.open(fs, store.directory)
    if lost == "both":
        assert isinstance(store.stopped, DamageError)
        assert (store.directory / "incoming" / str(made.delta_id)).exists()
        return
    assert store.stopped is None
    if lost == "points":
        primary.acknowledge(made)
        assert store.head == made.result
        reader = ReplicaReader(fs, store.directory)
        assert [(i.state.point, i.restorable) for i in reader.points()] == [(1, False), (2, False), (3, True)]
        with pytest.raises(PointGoneError):
            reader.open_point(1)
    else:
        assert store.head == made.base
        check_points(fs, store.directory, primary, [1, 2])
        primary.sync(store)
        check_points(fs, store.directory, primary, [1, 2, 3])


def test_a_stopped_replica_goes_on_when_there_is_space_again(fs: FileSystem, tmp_path: Path) -> None:
    primary = SmallPrimary(SIZES)
    store = primary.enrol(fs, tmp_path)
    primary.scribble()
    primary.sync(store)
    store.close()
    full = CutFileSystem(1 << 60, errno.ENOSPC)
    store = ReplicaStore.open(full, store.directory)
    primary.scribble()
    made = primary.make()
    primary.send(store, made)
    full.steps, full.cut_at = 0, 30
    with pytest.raises(StorageFullError):
        store.commit(made.delta_id)
    with pytest.raises(StorageFullError):
        store.begin(made.delta_id, made.base.delta_id, primary.epoch, made.header)
    check_points(fs, store.directory, primary, [1])
    full.cut_at = 1 << 60
    if store.commit(made.delta_id) == made.result:
        primary.acknowledge(made)
    check_points(fs, store.directory, primary, [1, 2])


def test_a_pinned_point_is_not_rotated_out(fs: FileSystem, tmp_path: Path) -> None:
    primary = SmallPrimary(SIZES)
    store = primary.enrol(fs, tmp_path)
    for _ in range(4):
        primary.scribble()
        primary.sync(store)
    with ReplicaReader(fs, store.directory).open_point(2):
        assert list(store.rotate(Policy(keep_last=1, hourly=0)).dropped) == [1]
        check_points(fs, store.directory, primary, [2, 3, 4])
    assert list(store.rotate(Policy(keep_last=1, hourly=0)).dropped) == [2, 3]
    assert not fs.list_names(store.directory / "points")
    with pytest.raises(PointGoneError, match="4 to 4"):
        ReplicaReader(fs, store.directory).open_point(2)


def test_points_read_exactly_while_commits_go_on(fs: FileSystem, tmp_path: Path) -> None:
    primary = SmallPrimary({"os": 2_000_000})
    store = primary.enrol(fs, tmp_path)
    for _ in range(3):
        primary.scribble(count=20)
        primary.sync(store)
    stop, failures, reads = threading.Event(), [], [0]

    def read_all_the_time() -> None:
        while not stop.is_set():
            try:
                with ReplicaReader(fs, store.directory).open_point() as point:
                    number = point.state.point
                    for _ in range(5):
                        buffer = bytearray(2_000_000)
                        point.read_into(point.disks[0].id, 0, buffer)
                        if buffer != primary.copies[number]["os"]:
                            failures.append(number)
                        reads[0] += 1
            except Exception as error:  # noqa: BLE001 - a thread must hand every failure to the test
                failures.append(error)

    threads = [threading.Thread(target=read_all_the_time) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(25):
        primary.scribble(count=40)
        made = primary.make()
        primary.send(store, made)
        primary.copies[made.result.point] = {n: bytes(d) for n, d in primary.content.items()}
        store.commit(made.delta_id)
        primary.acknowledge(made)
        store.rotate(Policy(keep_last=3, hourly=0))
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures and reads[0] > 10


def test_verify_names_the_damaged_leaf(fs: FileSystem, tmp_path: Path) -> None:
    primary = SmallPrimary(SIZES)
    store = primary.enrol(fs, tmp_path)
    primary.scribble(count=50)
    primary.sync(store)
    reader = ReplicaReader(fs, store.directory)
    disk = primary.disk("data")
    image = store.directory / "head" / f"{disk.id}.img"
    with image.open("r+b") as file:
        file.seek(5 * 16384 + 77)
        byte = file.read(1)
        file.seek(5 * 16384 + 77)
        file.write(bytes([byte[0] ^ 4]))
    found = {verdict.disk.name: verdict.mismatches for verdict in reader.verify()}
    assert found == {"os": (), "data": ((5 * 16384, 16384),)}
    with pytest.raises(DamageError), reader.open_point() as point:
        restore_point(fs, point, tmp_path / "out", "raw")
    assert not fs.list_names(tmp_path / "out")


def test_damaged_points_are_never_silently_left_out(fs: FileSystem, tmp_path: Path) -> None:
    primary = SmallPrimary(SIZES)
    store = primary.enrol(fs, tmp_path)
    for _ in range(4):
        primary.scribble()
        primary.sync(store)
    store.rotate(Policy(keep_last=24, hourly=0))
    reader = ReplicaReader(fs, store.directory)
    assert len(reader.points()) == 4 and reader.damaged == []
    oldest = next(p for p in (store.directory / "points").iterdir() if p.name == str(primary.made[1].delta_id))
    whole = oldest.read_bytes()
    oldest.write_bytes(whole[:100])
    reader = ReplicaReader(fs, store.directory)
    assert [info.state.point for info in reader.points()] == [2, 3, 4]
    assert reader.damaged == [oldest]
    oldest.write_bytes(whole)
    keys = store.directory / "keys"
    keys.rename(tmp_path / "escrow")
    with pytest.raises(KeyMissingError):
        ReplicaReader(fs, store.directory).points()
    (tmp_path / "escrow").rename(keys)
    assert len(ReplicaReader(fs, store.directory).points()) == 4


def test_a_rotten_inverse_names_disk_and_point(fs: FileSystem, tmp_path: Path) -> None:
    primary = SmallPrimary(SIZES)
    store = primary.enrol(fs, tmp_path / "s")
    for _ in range(2):
        primary.scribble()
        primary.sync(store)
    inverse = store.directory / "points" / str(primary.made[1].delta_id)
    data = bytearray(inverse.read_bytes())
    data[400] ^= 1
    inverse.write_bytes(data)
    with (
        ReplicaReader(fs, store.directory).open_point(1) as point,
        pytest.raises(DamageError, match="of point 1 cannot be restored.*restore a newer point"),
    ):
        restore_point(fs, point, tmp_path / "out", "raw")
    assert not fs.list_names(tmp_path / "out")


def test_verify_says_when_a_commit_was_cut(fs: FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    primary = SmallPrimary(SIZES)
    store = primary.enrol(fs, tmp_path)
    primary.scribble()
    primary.sync(store)
    layout = Layout(store.directory)
    state = load_state(fs, layout)
    save_state(fs, layout, StoreState(state.head, state.epoch, DeltaId(random_id()), serial=state.serial + 1))
    monkeypatch.setattr("replica.store.verify.SETTLE_TRIES", 2)
    with pytest.raises(BusyError, match="start 'replica serve'"):
        ReplicaReader(fs, store.directory).verify()


def test_a_wrong_delta_id_is_not_received(fs: FileSystem, tmp_path: Path) -> None:
    store = SmallPrimary(SIZES).enrol(fs, tmp_path)
    with pytest.raises(ProtocolError, match="not open"):
        store.receive(DeltaId(random_id()), 0, 160, bytes(32), b"x")


def test_files_of_others_in_incoming_are_left_alone(fs: FileSystem, tmp_path: Path) -> None:
    primary = SmallPrimary(SIZES)
    store = primary.enrol(fs, tmp_path)
    stray = store.directory / "incoming" / "notes.txt"
    stray.write_text("mine")
    assert store.receiving is None and store.received is None
    for _ in range(2):
        primary.scribble()
        primary.send(store, primary.make())  # discards the one before
    primary.sync(store)
    assert stray.read_text() == "mine"


def test_the_steps_of_a_long_copy_are_no_points(fs: FileSystem, tmp_path: Path) -> None:
    primary = SmallPrimary(SIZES)
    store = primary.enrol(fs, tmp_path)
    primary.scribble()
    primary.sync(store, partial=True)
    reader = ReplicaReader(fs, store.directory)
    assert reader.points() == []
    with pytest.raises(PointGoneError, match="no point yet"):
        reader.open_point()
    primary.scribble()
    primary.sync(store)
    check_points(fs, store.directory, primary, [1])
    for partial in (True, True, False, True):
        primary.scribble()
        primary.sync(store, partial=partial)
        check_points(fs, store.directory, primary, [1] if partial and primary.state.point == 1 else [1, 2])
    with reader.open_point() as newest:  # through the step that is the head
        assert newest.state.point == 2
    store.close()


@pytest.mark.parametrize("thinned", [False, True])
def test_a_delta_named_like_an_older_state_is_refused(fs: FileSystem, tmp_path: Path, thinned: bool) -> None:
    """Files, locks and receipts go by that name: it would take a point's place, also a locked one's."""
    primary = SmallPrimary({"os": 300_001})
    store = primary.enrol(fs, tmp_path)
    for _ in range(5):
        primary.scribble()
        primary.sync(store)
    marks = Marks(fs, Layout(store.directory))
    for point in (1, 3):
        marks.lock(primary.made[point - 1].delta_id, point, 1 << 62)
    if thinned:
        store.rotate(Policy(keep_last=1, hourly=0))
        assert store.thin(Policy(keep_last=1, hourly=0), at_once=True).composed
    listed = [info.state.point for info in ReplicaReader(fs, store.directory).points()]
    for taken in (primary.made[0].delta_id, primary.made[2].delta_id, EMPTY_DELTA_ID):
        primary.scribble()
        made = primary.make(delta_id=taken)
        with pytest.raises(ProtocolError, match="named like"):
            primary.send(store, made)
            store.commit(made.delta_id)
        check_points(fs, store.directory, primary, listed)
    primary.sync(store)


class UnsyncedState(SystemCalls):
    """From the `due`-th time that `state` gets its name, that name is not made durable, and the sync says so once."""

    def __init__(self) -> None:
        self.due = 0
        self.before: dict[Path, bytes] = {}
        self._failing: Path | None = None

    def rename(self, source: Path, target: Path) -> None:
        if target.name == "state" and self.due:
            self.due -= 1
            if not self.due:
                self._failing = target.parent
                self.before = {p: p.read_bytes() for p in (target, target.with_name("state.copy"))}
        super().rename(source, target)

    def fsync(self, descriptor: int) -> None:
        if self._failing is not None and os.path.samestat(os.fstat(descriptor), self._failing.stat()):
            self._failing = None
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().fsync(descriptor)


@pytest.mark.parametrize("policy", [Policy(keep_last=1, hourly=0), Policy(keep_last=1, hourly=1), Policy()])
def test_a_replica_that_stopped_gives_nothing_up(tmp_path: Path, policy: Policy) -> None:
    """The commit's last sync failed: the state that says it is done may be gone with the power, but not its inverse."""
    calls = UnsyncedState()
    primary = SmallPrimary({"os": 300_001})
    store = primary.enrol(FileSystem(calls), tmp_path)
    for _ in range(4):
        primary.sync(store)
    made = primary.make()
    primary.send(store, made)
    calls.due = 2  # the first says that it is being applied
    with pytest.raises(StorageError):
        store.commit(made.delta_id)
    assert not store.rotate(policy)
    assert not store.thin(policy, at_once=True)
    store.close()
    for path, data in calls.before.items():
        path.write_bytes(data)
    store = ReplicaStore.open(FileSystem(), store.directory)
    assert store.stopped is None
    primary.acknowledge(made)
    check_points(FileSystem(), store.directory, primary, [1, 2, 3, 4, 5])


@pytest.mark.parametrize("lost", ["tree", "image"])
@pytest.mark.parametrize("resize", [0, -100_000, 100_000])
def test_a_cut_commit_and_a_lost_file_of_the_head_lose_no_other(
    fs: FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str, resize: int
) -> None:
    primary = SmallPrimary({"os": 300_001})
    store = primary.enrol(fs, tmp_path)
    primary.content["os"][:] = primary.random.randbytes(300_001)
    primary.sync(store)
    primary.scribble(count=1)
    primary.content["os"] = bytearray(bytes(primary.content["os"])[: 300_001 + resize].ljust(300_001 + resize, b"x"))
    made = primary.make()
    primary.send(store, made)

    def cut(*_: object) -> None:
        raise StorageError("cut")

    with monkeypatch.context() as patch:
        patch.setattr("replica.store.commit.settle", cut)
        with pytest.raises(StorageError):
            store.commit(made.delta_id)
    store.close()
    layout = Layout(store.directory)
    path = {"tree": layout.tree, "image": layout.image}[lost](primary.ids["os"])
    path.rename(tmp_path / "away")
    store = ReplicaStore.open(fs, store.directory)
    if lost == "image":
        assert store.stopped is not None
        assert layout.tree(primary.ids["os"]).exists()
        store.close()
        (tmp_path / "away").rename(path)
        store = ReplicaStore.open(fs, store.directory)
    assert store.stopped is None
    primary.acknowledge(made)
    check_points(fs, store.directory, primary, [1, 2])
    assert all(not v.mismatches for v in ReplicaReader(fs, store.directory).verify())
