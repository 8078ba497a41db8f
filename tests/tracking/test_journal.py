"""The journal: what it holds comes back, and nothing damaged is ever used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest
from tracking_machine import Machine, MemoryImage

from replica.durable import File, FileSystem
from replica.errors import FormatError
from replica.model import Consistency, DeltaId, Disk, DiskId, DiskState, Epoch, ReplicaId, State
from replica.tracking.journal import Journal, JournalRecord, JournalSummary, JournalWriter

W = 4 << 20


def state(*disks: Disk) -> State:
    states = tuple(DiskState(disk, bytes(range(32))) for disk in disks)
    return State(ReplicaId(UUID(int=1)), DeltaId(UUID(int=2)), 5, Epoch(1, UUID(int=3)), 99, Consistency.CRASH, states)


def record(disk: int, first: int, grains: list[int], leaves: list[int]) -> JournalRecord:
    rng = np.random.default_rng(first + disk)
    return JournalRecord(
        disk,
        first,
        np.array(grains, np.uint16),
        rng.integers(0, 1 << 63, len(grains), np.uint64),
        np.array(leaves, np.uint16),
        rng.integers(0, 256, (len(leaves), 32), np.uint8),
    )


DISKS = (Disk(DiskId(UUID(int=10)), "os", 3 * W), Disk(DiskId(UUID(int=11)), "data", 10 * W, grain_bytes=512))
SUMMARY = JournalSummary(DeltaId(UUID(int=4)), state(*DISKS), (False, True))
RECORDS = [
    record(0, 0, [0, 7, 1023], [0, 255]),
    record(0, 2048, [5], [1]),
    record(1, 0, list(range(8192)), list(range(256))),
    record(1, 3 * 8192, [], [9]),
]


def write(directory: Path, records: list[JournalRecord], summary: JournalSummary = SUMMARY) -> Path:
    with JournalWriter(FileSystem(), directory) as journal:
        for one in records:
            journal.add(one)
        journal.finish(summary)
    return directory / "pending"


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, [RECORDS[0], record(0, 1024, [], []), *RECORDS[1:]])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pending"]
    with Journal(FileSystem(), path) as journal:
        assert journal.summary == SUMMARY
        found = list(journal.records())
    assert len(found) == len(RECORDS)
    for got, expected in zip(found, RECORDS, strict=True):
        assert got[:2] == expected[:2]
        for a, b in zip(got[2:], expected[2:], strict=True):
            np.testing.assert_array_equal(a, b)


def test_an_unfinished_journal_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), JournalWriter(FileSystem(), tmp_path) as journal:
        journal.add(RECORDS[0])
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_left_overs_of_a_killed_writer_do_not_hinder(tmp_path: Path) -> None:
    (tmp_path / ".pending.tmp").write_bytes(b"half")
    write(tmp_path, RECORDS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pending"]


def test_every_cut_and_every_flipped_byte_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, RECORDS[:2])
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError, match="next sync reads every disk anew"):
            Journal(FileSystem(), path)
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x40]) + whole[position + 1 :])
        with pytest.raises(FormatError):
            Journal(FileSystem(), path)


@pytest.mark.parametrize(
    "records",
    [
        [RECORDS[1], RECORDS[0]],
        [RECORDS[0], RECORDS[0]],
        [record(2, 0, [1], [0])],
        [record(0, 1, [1], [0])],
        [record(0, 3072, [1], [0])],
        [record(0, 0, [1024], [0])],
        [record(0, 0, [1], [256])],
        [record(0, 0, [3, 3], [0])],
        [record(0, 0, [4, 3], [0])],
        [record(0, 0, list(range(1025)), [0])],
    ],
    ids=["order", "twice", "disk", "unaligned", "behind-end", "grain", "leaf", "double", "falling", "too-many"],
)
def test_a_record_that_breaks_the_rules_is_refused(tmp_path: Path, records: list[JournalRecord]) -> None:
    """A valid checksum says that the bytes are what was written, not that they make sense."""
    with Journal(FileSystem(), write(tmp_path, records)) as journal, pytest.raises(FormatError):
        list(journal.records())


def test_accepting_renames_and_is_idempotent(tmp_path: Path) -> None:
    with Journal(FileSystem(), write(tmp_path, RECORDS)) as journal:
        journal.accept()
        journal.accept()
        assert [p.name for p in tmp_path.iterdir()] == ["folding"]
        journal.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_name_is_given_only_to_what_was_synced(tmp_path: Path) -> None:
    """After a crash a file that has its name has its content."""
    steps: list[str] = []

    class Recording(FileSystem):
        def create(self, path: Path, *, private: bool = False) -> File:
            file = super().create(path, private=private)
            sync = file.sync
            file.sync = lambda: (steps.append("sync"), sync())[1]  # type: ignore[method-assign]
            write = file.write
            file.write = lambda at, data: (steps.append("write"), write(at, data))[1]  # type: ignore[method-assign]
            return file

        def publish(self, temporary: Path, final: Path) -> None:
            steps.append(f"{temporary.name} -> {final.name}")
            super().publish(temporary, final)

    with JournalWriter(Recording(), tmp_path) as journal:
        journal.add(RECORDS[0])
        journal.finish(SUMMARY)
    assert steps == ["write", "sync", ".pending.tmp -> pending"]


def test_memory_does_not_grow_with_the_disk(tmp_path: Path) -> None:
    """The writer's buffer is flushed as it goes, so a large journal is on disk before it is finished."""
    disk = Disk(DiskId(UUID(int=10)), "os", 1 << 40)
    with JournalWriter(FileSystem(), tmp_path) as journal:
        for window in range(400):
            journal.add(record(0, window * 1024, list(range(1024)), list(range(256))))
            assert len(journal._buffer) < 2 << 20
        assert (tmp_path / ".pending.tmp").stat().st_size > 6 << 20
        journal.finish(JournalSummary(DeltaId(UUID(int=4)), state(disk), (True,)))


def test_a_scan_of_the_real_tracker_round_trips(machine: Callable[..., Machine]) -> None:
    m = machine(2 * W + 100)
    m.scan(MemoryImage(np.arange(2 * W + 100, dtype=np.uint32).astype(np.uint8)))
    with Journal(m.fs, m.directory / "pending") as journal:
        assert [r.first_grain for r in journal.records()] == [0, 1024, 2048]
