"""Gaps that a store must not have: between rollback and reader, close and commit, request and file."""

from __future__ import annotations

import os
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest

from replica.delta import DeltaSealer, Keyring
from replica.durable import File, FileSystem
from replica.errors import BusyError, DamageError, ImageError, StorageError
from replica.merkle import root_of
from replica.model import Consistency, DeltaId, Disk, DiskId, DiskState, State, random_id
from replica.store import Layout, PointReader, Policy, ReplicaReader, ReplicaStore
from replica.store.marks import Marks
from replica.store.rotation import Rotated, Rotator
from tests.store.small_primary import Made, SmallPrimary
from tests.store.test_replica import check_points, cut_in_the_head

SIZE = 400_000


def content(point: PointReader) -> bytes:
    buffer = bytearray(point.disks[0].size_bytes)
    point.read_into(point.disks[0].id, 0, buffer)
    return bytes(buffer)


def half_written(fs: FileSystem, storage: Path) -> tuple[SmallPrimary, Path, Made]:
    """Points 1 and 2, and a commit of the third that was cut while the head was being written."""
    primary = SmallPrimary({"os": SIZE}, seed=3)
    store = primary.enrol(fs, storage)
    primary.content["os"][:] = primary.random.randbytes(SIZE)
    primary.sync(store)
    primary.scribble()
    primary.sync(store)
    primary.content["os"][0:4096] = primary.random.randbytes(4096)
    primary.content["os"][200_000:220_000] = primary.random.randbytes(20_000)
    made = primary.make()
    primary.send(store, made)
    store.close()
    cut_in_the_head(store.directory, made.delta_id, 3)
    return primary, store.directory, made


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_reader_finds_its_way_again_after_a_rollback(fs: FileSystem, tmp_path: Path) -> None:
    primary, directory, made = half_written(fs, tmp_path)
    with ReplicaReader(fs, directory).open_point(2) as point:
        assert content(point) == primary.copies[2]["os"]  # through the inverse of what is half applied
        flip(directory / "incoming" / str(made.delta_id), 400)
        store = ReplicaStore.open(fs, directory)
        assert store.stopped is None and store.head == made.base
        assert not (directory / "points" / str(made.delta_id)).exists()
        primary.content["os"][100_000:200_000] = primary.random.randbytes(100_000)
        primary.sync(store)
        assert content(point) == primary.copies[2]["os"]
    check_points(fs, directory, primary, [1, 2, 3])


def test_a_half_written_head_without_its_inverse_is_not_read(fs: FileSystem, tmp_path: Path) -> None:
    primary, directory, made = half_written(fs, tmp_path)
    flip(directory / "points" / str(made.delta_id), -20)
    reader = ReplicaReader(fs, directory)
    assert not any(info.restorable for info in reader.points())
    for number in (1, 2):
        with pytest.raises(DamageError, match="may be half written.*start 'replica serve'"):
            reader.open_point(number)
    store = ReplicaStore.open(fs, directory)  # the delta is still there: the commit is finished
    assert store.stopped is None and store.head == made.result
    with ReplicaReader(fs, directory).open_point() as point:
        assert content(point) == bytes(primary.content["os"])


def test_close_waits_for_the_commit_and_ends_the_store(fs: FileSystem, tmp_path: Path) -> None:
    inside, go = threading.Event(), threading.Event()

    class SlowFile(File):
        def write(self, offset: int, data: object) -> None:
            if self.path.suffix == ".img":
                inside.set()
                assert go.wait(30)
            super().write(offset, data)  # type: ignore[arg-type]

    class SlowFileSystem(FileSystem):
        def open(self, path: Path, *, write: bool = False) -> File:
            file = super().open(path, write=write)
            slow = SlowFile(os.dup(file.fileno()), path)
            file.close()
            return slow

    primary = SmallPrimary({"os": SIZE})
    store = primary.enrol(fs, tmp_path)
    primary.scribble()
    primary.sync(store)
    primary.scribble()
    made = primary.make()
    primary.send(store, made)
    store.close()
    store = ReplicaStore.open(SlowFileSystem(), store.directory)
    committing = threading.Thread(target=store.commit, args=(made.delta_id,))
    committing.start()
    assert inside.wait(30)
    closing = threading.Thread(target=store.close)
    closing.start()
    closing.join(0.3)
    assert closing.is_alive()
    with pytest.raises(BusyError, match="in use"):
        ReplicaStore.open(fs, store.directory)
    go.set()
    committing.join(30)
    closing.join(30)
    primary.acknowledge(made)
    with pytest.raises(BusyError, match="closed"):
        primary.send(store, primary.make())
    other = ReplicaStore.open(fs, store.directory)
    assert other.head == made.result


def test_finish_waits_for_segments_that_are_being_written(
    fs: FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    primary = SmallPrimary({"os": SIZE})
    store = primary.enrol(fs, tmp_path)
    primary.scribble()
    made = primary.make()
    store.begin(made.delta_id, made.base.delta_id, primary.epoch, made.header)
    number, offset, digest, blob = made.segments[0]
    writing, go = threading.Event(), threading.Event()
    write = File.write

    def slow_write(self: File, at: int, data: bytes) -> None:
        if threading.current_thread().name == "late" and self.path.suffix == ".part":
            writing.set()
            assert go.wait(30)
        write(self, at, data)

    monkeypatch.setattr(File, "write", slow_write)
    late = threading.Thread(name="late", target=store.receive, args=(made.delta_id, number, offset, digest, blob))
    late.start()
    assert writing.wait(30)
    sending = threading.Thread(target=primary.send, args=(store, made))  # the request is given up and sent again
    sending.start()
    sending.join(0.3)
    assert sending.is_alive()
    go.set()
    late.join(30)
    sending.join(30)
    assert store.commit(made.delta_id) == made.result


@pytest.mark.parametrize(("head_format", "size"), [("vhd", 3 << 40), ("raw", 20 << 40)])
def test_a_disk_that_the_storage_cannot_hold_is_refused_in_time(
    fs: FileSystem, tmp_path: Path, head_format: str, size: int
) -> None:
    primary = SmallPrimary({"os": 8192})
    store = primary.enrol(fs, tmp_path, head_format)
    primary.scribble()
    primary.sync(store)
    disk = Disk(DiskId(random_id()), "big", size)
    added = DiskState(disk, root_of(bytes(32), size, disk.leaf_bytes))
    disks = tuple(sorted((*primary.state.disks, added), key=lambda entry: entry.disk.id.bytes))
    delta_id = DeltaId(random_id())
    result = State(primary.replica_id, delta_id, 2, primary.epoch, 5, Consistency.CRASH, disks)
    sealer = DeltaSealer(primary.key, primary.replica_id, delta_id, primary.epoch)
    store.begin(delta_id, primary.state.delta_id, primary.epoch, sealer.header)
    store.finish(delta_id, sealer.tail([], primary.state, result), len(sealer.header))
    try:
        store.commit(delta_id)
    except (ImageError, StorageError):
        assert store.applying is None
        store.discard(delta_id)
        primary.scribble()
        primary.sync(store)
        check_points(fs, store.directory, primary, [1, 2])
    else:
        assert head_format == "raw", "a file system that holds such files"
    assert not [name for name in fs.list_names(store.directory / "head") if name.startswith(".")]


def test_what_a_killed_writer_had_not_named_goes_at_the_next_start(fs: FileSystem, tmp_path: Path) -> None:
    """Its own temporary files go; one that another process may just be writing stays."""
    primary = SmallPrimary({"os": SIZE}, seed=3)
    store = primary.enrol(fs, tmp_path)
    primary.sync(store)
    store.close()
    own = ("points/.x.tmp", "head/.0a.probe", ".state.0a.tmp", ".replica.toml.0a.tmp")
    for name in (*own, ".marks.0a.tmp"):
        (store.directory / name).touch()
    ReplicaStore.open(fs, store.directory).close()
    assert [name for name in own if (store.directory / name).exists()] == []
    assert (store.directory / ".marks.0a.tmp").exists()


def test_failures_that_are_tried_again_leave_no_descriptors_open(
    fs: FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def count_open() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    def refused(self: File, *_: object) -> None:
        raise StorageError(f"cannot touch {self.path}")

    primary, directory, made = half_written(fs, tmp_path)
    store = ReplicaStore.open(fs, directory)
    primary.acknowledge(made)
    primary.scribble()
    made = primary.make()
    primary.send(store, made)
    before = count_open()
    with monkeypatch.context() as patch:
        patch.setattr(File, "write", refused)
        for _ in range(2):
            with pytest.raises(StorageError, match=r"points/\.|state"):
                store.commit(made.delta_id)
    assert count_open() == before, "an inverse whose header cannot be written"
    assert store.commit(made.delta_id) == made.result
    store.close()

    primary, directory, made = half_written(fs, tmp_path)
    before = count_open()
    real = File.sync

    def sync(self: File) -> None:
        if self.path.name == str(made.delta_id) and self.path.parent.name == "points":
            raise StorageError(f"cannot sync {self.path}")
        real(self)

    with monkeypatch.context() as patch:
        patch.setattr(File, "sync", sync)
        store = ReplicaStore.open(fs, directory)
        assert store.stopped is not None
        store.close()
    assert count_open() == before, "the delta, while its inverse cannot be opened"
    store = ReplicaStore.open(fs, directory)
    assert store.stopped is None and store.head == made.result


def test_rotation_keeps_what_undoes_a_first_commit_that_was_cut(
    fs: FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    primary = SmallPrimary({"os": SIZE})
    store = primary.enrol(fs, tmp_path)
    primary.scribble()
    made = primary.make()
    primary.send(store, made)

    def cut(*_: object) -> None:
        raise StorageError("cut while the head is written")

    with monkeypatch.context() as patch:
        patch.setattr("replica.store.commit.write", cut)
        with pytest.raises(StorageError, match="cut"):
            store.commit(made.delta_id)
    layout = Layout(store.directory)
    keyring = Keyring(fs, layout.keys)
    marks = Marks(fs, layout)
    Rotator(fs, layout, keyring, marks, store.receipts, nullcontext, lambda: False).drop(Policy())
    assert layout.point(made.delta_id).exists()
    store.close()
    flip(layout.incoming / str(made.delta_id), 400)
    store = ReplicaStore.open(fs, store.directory)
    assert store.stopped is None and store.head.is_empty
    assert primary.sync(store).result == store.head
    assert store.rotate(Policy()) == Rotated() and not list(layout.points.iterdir())
