"""The spool: in order, bounded, and nothing is given up before it was acknowledged."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from replica.delta import SealedSegment
from replica.durable import FileSystem
from replica.errors import StorageError
from replica.primary.spool import Spool


def segment(number: int, size: int = 1000) -> SealedSegment:
    return SealedSegment(number, 0, number, number, bytes([number % 251]) * size, bytes(32), size)


def make(directory: Path, memory: int = 10_000, limit: int = 1 << 20) -> Spool:
    return Spool(FileSystem(), directory, memory_bytes=memory, limit_bytes=limit)


def test_what_goes_in_comes_out_from_memory_and_file(tmp_path: Path) -> None:
    spool = make(tmp_path, memory=3000)
    for number in range(10):
        spool.put(segment(number), number * 1000)
    assert spool._in_memory == 3000 and spool._in_file == 7000
    assert list(tmp_path.iterdir()) == [], "the scratch file has no name"
    spool.end()
    got = []
    for held in spool:
        got.append((held.number, held.offset, spool.blob(held)))
        spool.drop(held.number)
    assert got == [(n, n * 1000, bytes([n]) * 1000) for n in range(10)]
    assert spool.waiting_bytes == 0
    spool.close()


def test_the_scratch_file_is_used_again_and_gives_its_space_back(tmp_path: Path) -> None:
    spool = make(tmp_path, memory=1000)
    for round_ in range(20):
        for number in range(round_ * 3, round_ * 3 + 3):
            spool.put(segment(number, 8192), 0)
        for held in [spool._held[n] for n in sorted(spool._held)]:
            assert spool.blob(held) == bytes([held.number % 251]) * 8192
            spool.drop(held.number)
    assert spool._file is not None and spool._file.size() <= 3 * 8192
    assert spool._file.allocated_bytes() <= 8192
    spool.close()


def test_a_full_spool_makes_the_reader_wait(tmp_path: Path) -> None:
    spool = make(tmp_path, limit=2500)
    put = threading.Event()

    def reader() -> None:
        for number in range(3):
            spool.put(segment(number), 0)
        put.set()

    thread = threading.Thread(target=reader)
    thread.start()
    assert not put.wait(0.1)
    spool.drop(next(iter(spool)).number)
    assert put.wait(5)
    thread.join()
    assert spool.waiting_bytes == 2000


def test_one_larger_than_everything_still_passes(tmp_path: Path) -> None:
    spool = make(tmp_path, memory=10, limit=10)
    spool.put(segment(0), 0)
    spool.end()
    assert [h.number for h in spool] == [0]


def test_the_sender_waits_for_segments_and_ends_with_them(tmp_path: Path) -> None:
    spool = make(tmp_path)
    got: list[int] = []

    def send() -> None:
        for held in spool:
            got.append(held.number)
            spool.drop(held.number)

    thread = threading.Thread(target=send)
    thread.start()
    for number in range(3):
        spool.put(segment(number), 0)
        time.sleep(0.01)
    assert thread.is_alive()
    spool.end()
    thread.join(5)
    assert got == [0, 1, 2]


def test_after_a_cut_what_did_not_arrive_comes_again(tmp_path: Path) -> None:
    spool = make(tmp_path)
    for number in range(6):
        spool.put(segment(number), 0)
    spool.end()
    for held in spool:
        if held.number < 2:
            spool.drop(held.number)
    assert spool.acknowledge([(0, 3), (5, 9)]) == 0
    assert [held.number for held in spool] == [3, 4]


def test_what_was_dropped_and_is_not_there_is_counted_as_lost(tmp_path: Path) -> None:
    spool = make(tmp_path)
    for number in range(6):
        spool.put(segment(number), 0)
        if number < 4:
            spool.drop(number)
    assert spool.acknowledge([(1, 2)]) == 3


@pytest.mark.parametrize("side", ["put", "iterate", "check"])
def test_an_error_ends_both_sides(tmp_path: Path, side: str) -> None:
    spool = make(tmp_path, limit=1000)
    spool.put(segment(0), 0)
    threading.Timer(0.05, spool.fail, [StorageError("first")]).start()
    with pytest.raises(StorageError, match="first"):
        if side == "put":
            spool.put(segment(1), 0)
        elif side == "iterate":
            list(spool)
        else:
            time.sleep(0.1)
            spool.fail(StorageError("second"))
            spool.check()
