"""pipeline: results in order, memory of one's own, errors in their place, and nothing running after the end."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from replica.pipeline import Bytes, in_order

WINDOW = 10_000


@pytest.mark.parametrize("threads", [1, 3])
def test_results_come_in_order_and_memory_is_ones_own(threads: int) -> None:
    chance, running, most = random.Random(1), [0], [0]

    def work(number: int, memory: Bytes) -> tuple[int, bool]:
        running[0] += 1
        most[0] = max(most[0], running[0])
        memory[:] = number
        time.sleep(chance.random() / 200)
        running[0] -= 1
        return number, len(memory) == WINDOW and memory.ctypes.data % 4096 == 0 and bool((memory == number).all())

    with closing(in_order(work, range(40), WINDOW, threads)) as results:
        assert list(results) == [(number, True) for number in range(40)]
    assert most[0] == threads


def test_pieces_are_asked_for_no_further_ahead_than_there_are_threads() -> None:
    asked: list[int] = []
    with closing(in_order(lambda number, _: number, iter_noting(asked, 40), WINDOW, 3)) as results:
        for number in results:
            assert len(asked) <= number + 4


def iter_noting(asked: list[int], count: int) -> Iterator[int]:
    for number in range(count):
        asked.append(number)
        yield number


def test_an_error_comes_in_its_place_and_nothing_runs_afterwards() -> None:
    started, done = [0], [0]

    def work(number: int, _: Bytes) -> int:
        started[0] += 1
        if number == 5:
            raise OSError(number)
        time.sleep(0.01)
        done[0] += 1
        return number

    taken: list[int] = []
    with pytest.raises(OSError, match="5"), closing(in_order(work, range(100), WINDOW, 2)) as results:
        for number in results:
            taken.append(number)
    assert taken == [0, 1, 2, 3, 4]
    assert done[0] == started[0] - 1 and started[0] < 12


def test_who_stops_early_waits_for_what_runs_and_for_no_more() -> None:
    started, done = [0], [0]

    def work(number: int, _: Bytes) -> int:
        started[0] += 1
        time.sleep(0.02)
        done[0] += 1
        return number

    with closing(in_order(work, range(100), WINDOW, 2)) as results:
        assert next(results) == 0
    assert done[0] == started[0] < 8
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("window")]
