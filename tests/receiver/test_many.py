"""Many machines on one receiver: what must not grow with the cycles, and with the machines only by a lock each."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from replica.durable import FileSystem
from replica.primary.runner import run, sync_machines
from replica.primary.spec import DiskSpec, MachineSpec, SenderSpec
from replica.receiver.http_api import WORKERS
from replica.receiver.site import Site
from replica.transport.connection import _Connection
from tests.receiver.loopback import Loopback, Pki, site_spec

MACHINES = 40
PARALLEL = 3
CYCLES = 2
DISK_BYTES = 1 << 20


def descriptors_in(directory: Path) -> int:
    """Open files of this process under a directory."""
    found = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found += entry.readlink().is_relative_to(directory)
        except FileNotFoundError:
            continue
    return found


class Cycles(logging.Handler):
    """Sets `enough` when every machine has reported that many points; watches the threads meanwhile."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count, self.done, self.enough = count, Counter[object](), threading.Event()
        self.most_threads = 0
        self.failures: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.most_threads = max(self.most_threads, threading.active_count())
        assert isinstance(record.args, tuple)
        if record.levelno != logging.INFO:
            self.failures.append(record.getMessage())
            self.enough.set()
            return
        self.done[record.args[0]] += 1
        if len(self.done) == MACHINES and min(self.done.values()) >= self.count:
            self.enough.set()


def comes_true(condition: Callable[[], bool]) -> bool:
    """Whether it is so soon: what tidies up behind a commit has files open for a moment."""
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_connections_descriptors_and_threads_are_bounded(
    pki: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connected: list[_Connection] = []
    connect = _Connection.connect

    def counting(self: _Connection) -> None:
        connected.append(self)
        connect(self)

    monkeypatch.setattr(_Connection, "connect", counting)
    spec = site_spec(tmp_path / "replicas", pki.files("dr-1", ("localhost",)))
    fs = FileSystem()
    names = [f"vm-{number}" for number in range(MACHINES)]
    for name in names:
        with (tmp_path / f"{name}.raw").open("wb") as image:
            os.truncate(image.fileno(), DISK_BYTES)
            image.write(name.encode() * 1000)

    def sender(url: str) -> SenderSpec:
        machines = tuple(
            MachineSpec(n, url, (DiskSpec("os", tmp_path / f"{n}.raw"),), every_seconds=0.1) for n in names
        )
        return SenderSpec("hv-1", tmp_path / "state", tmp_path / "keys", pki.files("hv-1"), machines, parallel=PARALLEL)

    with Loopback(spec, lambda: Site(fs, spec)) as server:
        outcomes = sync_machines(fs, sender(server.url))
        assert [outcome.error for outcome in outcomes] == [None] * MACHINES
        assert len(connected) <= PARALLEL
        assert comes_true(
            lambda: descriptors_in(spec.storages["tier1"].path) == MACHINES
        )  # the lock that keeps a second receiver away

    with Loopback(spec, lambda: Site(fs, spec)) as server:
        assert comes_true(lambda: descriptors_in(spec.storages["tier1"].path) == MACHINES)
        connected.clear()
        threads = threading.active_count()
        cycles, stop = Cycles(CYCLES), threading.Event()
        logger = logging.getLogger("replica.primary.runner")
        before = logger.level
        logger.setLevel(logging.INFO)  # also forgets which levels were found to be off
        logger.addHandler(cycles)
        running = threading.Thread(target=run, args=(sender(server.url), stop))
        running.start()
        try:
            assert cycles.enough.wait(120)
        finally:
            stop.set()
            running.join()
            logger.removeHandler(cycles)
            logger.setLevel(before)
        assert cycles.failures == []
        assert len(connected) <= PARALLEL
        in_the_middle = PARALLEL * 2  # what arrived of a delta whose sender was stopped stays open, and its index
        assert comes_true(lambda: descriptors_in(spec.storages["tier1"].path) <= MACHINES + in_the_middle)
        at_work = PARALLEL * 8  # a cycle's own few, and the commit at the other side
        assert cycles.most_threads <= threads + WORKERS + at_work
        assert comes_true(lambda: threading.active_count() <= threads + 1)
