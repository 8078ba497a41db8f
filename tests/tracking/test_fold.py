"""Fold: after a crash before any step, folding again ends in the very same trackers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tracking_machine import Machine, MemoryImage, root_of

from replica.durable import FileSystem
from replica.errors import DamageError, StorageError
from replica.tracking.fold import fold
from replica.tracking.journal import Journal
from tests.cutting import CutFileSystem, Power

W = 4 << 20


def changed(seed: int, data: np.ndarray) -> np.ndarray:
    """Scattered writes, a range that became zero, and a window that did."""
    rng = np.random.default_rng(seed)
    after = data.copy()
    for position in rng.integers(0, len(data), 20):
        after[position] ^= 0x55
    after[W // 2 : W // 2 + 40000] = 0
    after[2 * W : 3 * W] = 0
    return after


def take(directory: Path) -> dict[str, tuple[int, list[tuple[int, bytes]]]]:
    """Every file with its size and what is not zero in it (the trackers are sparse: half a GiB of holes)."""
    found = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        with FileSystem().open(path) as file:
            size = file.size()
            runs = [(at, file.read(at, length)) for at, length in file.data_runs(0, size)]
        found[str(path.relative_to(directory))] = (size, [run for run in runs if any(run[1])])
    return found


def put_back(directory: Path, files: dict[str, tuple[int, list[tuple[int, bytes]]]]) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    for name, (size, runs) in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileSystem().create(path) as file:
            for at, data in runs:
                file.write(at, data)
            file.truncate(size)


def trackers(directory: Path) -> dict[str, object]:
    files = {name: value for name, value in take(directory).items() if name.endswith(("digests", "windows", "leaves"))}
    assert files
    return {name: {at: d.rstrip(b"\0") for at, d in _pages(runs)} for name, (_, runs) in files.items()}


def _pages(runs: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """4 KiB pieces that are not zero: which holes there are is the file system's affair."""
    pieces = [(at + i, data[i : i + 4096]) for at, data in runs for i in range(0, len(data), 4096)]
    return [piece for piece in pieces if any(piece[1])]


@pytest.mark.parametrize("size", [4 * W + 12345, 3 * W + 99999, 3 * W, 5 * W + 1, 4 * W + 12000])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_cut_before_every_step_converges(
    machine: Callable[..., Machine], tmp_path: Path, fresh: bool, size: int
) -> None:
    """Also where the disk is grown or cut at the same time."""
    m = machine(4 * W + 12345)
    data = np.random.default_rng(1).integers(0, 256, m.disk.size_bytes, np.uint8)
    m.cycle(MemoryImage(data))
    m.resize(size)
    after = np.resize(changed(2, data), size)
    _, result = m.scan(MemoryImage(after), fresh=fresh)
    saved = take(m.directory)

    def attempt(work: Path, power: Power) -> None:
        """One process: fold what is there, as the start of every cycle does."""
        fs = CutFileSystem(power)
        name = "folding" if (work / "folding").exists() else "pending"
        with Journal(fs, work / name) as journal:
            journal.accept()
            fold(fs, work, journal)
            journal.remove()

    def fresh_copy() -> Path:
        work = tmp_path / "work"
        put_back(work, saved)
        return work

    power = Power()
    work = fresh_copy()
    attempt(work, power)
    expected, steps = trackers(work), power.steps
    assert steps > 10
    for due in range(steps):
        work = fresh_copy()
        with pytest.raises(StorageError, match="power"):
            attempt(work, Power(due))
        if (work / "folding").exists() or (work / "pending").exists():
            attempt(work, Power())
        assert trackers(work) == expected, f"cut before step {due}"
        assert not (work / "folding").exists()
    assert result.disks[0].root == root_of(after, m.disk)


def test_two_cuts_in_a_row_converge(machine: Callable[..., Machine]) -> None:
    m = machine(3 * W)
    data = np.random.default_rng(1).integers(0, 256, m.disk.size_bytes, np.uint8)
    m.cycle(MemoryImage(data))
    m.scan(MemoryImage(changed(3, data)))
    for due in range(3, 14, 2):
        name = "folding" if (m.directory / "folding").exists() else "pending"
        with Journal(CutFileSystem(Power(due)), m.directory / name) as journal, pytest.raises(StorageError):
            journal.accept()
            fold(CutFileSystem(Power(due - 2)), m.directory, journal)
    with Journal(m.fs, m.directory / "folding") as journal:
        fold(m.fs, m.directory, journal)
        m.head = journal.summary.result
        journal.remove()
    assert m.dirty(MemoryImage(changed(3, data))) == set()


def test_a_rotten_tree_is_noticed(machine: Callable[..., Machine]) -> None:
    m = machine(3 * W)
    data = np.random.default_rng(1).integers(0, 256, m.disk.size_bytes, np.uint8)
    m.cycle(MemoryImage(data))
    data[0] ^= 1
    m.scan(MemoryImage(data))
    leaves = m.directory / "disks" / str(m.disk.id) / "leaves"
    with leaves.open("r+b") as file:
        file.seek(538984448 + 32)
        file.write(b"x")
    with Journal(m.fs, m.directory / "pending") as journal, pytest.raises(DamageError, match="'os'"):
        journal.accept()
        fold(m.fs, m.directory, journal)
