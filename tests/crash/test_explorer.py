"""Every power cut in a scripted life of a store, as far as `disk` permits faults; and barriers that must be there.

The whole life is tried at `LIMIT` subsets of unsynced changes per moment; `tools/explore.py` tries more of them, and
other lives, for as long as it is told.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path

import pytest

from replica.durable import FileSystem
from tests.crash.disk import ROOT, Kernel, Op
from tests.crash.history import History, ViolationError, check, record

LIMIT = 8
SHARES = 4
BARRIERS = (
    "layout.py:save_state replace_bytes",
    "flat.py:sync sync",
    "head.py:sync sync",
)
"""Call sites whose fsync is left out, each of which must make the explorer fail."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What the store says of thousands of power cuts is for nobody."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@cache
def history() -> History:
    return record()


@pytest.mark.parametrize("share", range(SHARES))
def test_no_power_cut_breaks_a_promise(share: int) -> None:
    seen: set[int] = set()
    tried = 0
    for state, promise, where in islice(history().states(limit=LIMIT), share, None, SHARES):
        tried += 1
        try:
            check(state, promise, seen=seen)
        except ViolationError as error:
            raise ViolationError(f"{where}: {error}") from error
    assert tried > 300


@pytest.mark.parametrize("barrier", BARRIERS)
def test_without_a_barrier_a_promise_is_broken(barrier: str) -> None:
    known = {(state.digest(), id(promise)) for state, promise, _ in history().states(limit=4)}
    assert any(op.label == barrier for op in history().log)

    def left_out(op: Op) -> bool:
        return op.label == barrier

    for state, promise, _ in history().states(limit=4, without=left_out):
        if (state.digest(), id(promise)) in known:
            continue
        try:
            check(state, promise)
        except ViolationError:
            return
    raise AssertionError("nothing goes wrong without it: it is superfluous, or the explorer is blind")


def test_the_double_keeps_what_was_synced_and_nothing_else() -> None:
    kernel = Kernel()
    fs = FileSystem(kernel)
    kernel.mkdir(ROOT + "/d")
    for path in (ROOT, ROOT + "/d"):
        fd = kernel.open(path, 0)
        kernel.fsync(fd)
        kernel.close(fd)
    directory = Path(ROOT) / "d"
    with fs.create(directory / "a") as file:
        file.write(0, b"one")
        file.sync()
        assert fs.list_names(directory) == ["a"]
        lost = FileSystem(Kernel(kernel.disk.after(lambda _op: None)))
        assert lost.list_names(directory) == [], "a synced file without a synced name"
        fs.sync_directory(directory)
        file.write(0, b"two")
        fs.unlink(directory / "none")
    after = FileSystem(Kernel(kernel.disk.after(lambda _op: None)))
    assert after.read_bytes(directory / "a", 10) == b"one"
    kept = FileSystem(Kernel(kernel.disk.live()))
    assert kept.read_bytes(directory / "a", 10) == b"two"
    fs.replace_bytes(directory / "a", b"three")
    assert FileSystem(Kernel(kernel.disk.after(lambda _op: None))).read_bytes(directory / "a", 10) == b"three"
    assert fs.list_names(directory) == ["a"]
