"""A reader beside a commit that is undone: what it hands out was committed, whatever it read on the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from replica.durable import FileSystem
from replica.errors import DamageError
from replica.model import DiskId
from replica.store import Layout, ReplicaReader, ReplicaStore
from replica.store.reader import PointReader
from tests.store.small_primary import SmallPrimary, commit_until

FS = FileSystem()
SIZE = 64 * 4096


def commit_half(store: ReplicaStore, primary: SmallPrimary, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The head holds a delta whose commit then stops. Returns the delta's file."""
    made = commit_until("settle", DamageError("what was written is not what is read"), store, primary, monkeypatch)
    return Layout(store.directory).incoming / str(made.delta_id)


def undo(store: ReplicaStore, delta: Path) -> None:
    """The delta cannot be read any more, so the store takes its commit back."""
    data = bytearray(delta.read_bytes())
    data[300] ^= 1
    delta.write_bytes(data)
    store._ensure_running()
    assert store.stopped is None and store.applying is None and store.head.point == 1


@pytest.mark.parametrize("holes", [False, True])
def test_bytes_that_were_undone_between_two_looks_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holes: bool
) -> None:
    primary = SmallPrimary({"os": SIZE})
    store = primary.enrol(FS, tmp_path)
    primary.content["os"][:] = primary.random.randbytes(SIZE)
    primary.sync(store)
    primary.content["os"][:] = bytes(SIZE) if holes else primary.random.randbytes(SIZE)
    real_read, real_ranges = PointReader._read_head, PointReader._head_ranges
    left = [1]

    def cut_now() -> Path | None:
        return commit_half(store, primary, monkeypatch) if left and left.pop() else None

    def read(point: PointReader, disk_id: DiskId, offset: int, buffer: memoryview) -> None:
        delta = cut_now()
        real_read(point, disk_id, offset, buffer)
        if delta:
            undo(store, delta)

    def ranges(point: PointReader, disk_id: DiskId, start: int, stop: int) -> list[tuple[int, int]]:
        delta = cut_now()
        found = list(real_ranges(point, disk_id, start, stop))
        if delta:
            undo(store, delta)
        return found

    monkeypatch.setattr(PointReader, "_head_ranges" if holes else "_read_head", ranges if holes else read)
    with ReplicaReader(FS, store.directory).open_point(1) as point:
        if holes:
            assert list(point.allocated(primary.ids["os"], 0, SIZE))[-1][1] == SIZE
        else:
            buffer = bytearray(SIZE)
            point.read_into(primary.ids["os"], 0, buffer)
            assert bytes(buffer) == primary.copies[1]["os"]
    assert not left
    store.close()
