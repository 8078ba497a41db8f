"""Leaving: soon and without a leak whatever the receiver does, and asking again without sending again."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from primary_lab import Lab, Link, MiB

from replica.errors import BusyError, TransportError
from replica.primary import shipment
from replica.primary.retry import Stopped
from replica.primary.status import is_running


class Hanging(Link):
    """One call of that name never answers, until it is aborted."""

    def __init__(self, lab: Lab, name: str) -> None:
        super().__init__(lab, "hv-1")
        self.aborted, self.hangs = threading.Event(), threading.Event()
        self.name = name
        self.before = self.hang

    def hang(self, name: str, _arguments: Any) -> None:
        if name == self.name and not self.aborted.is_set():
            self.hangs.set()
            assert self.aborted.wait(30)
            raise TransportError("aborted")

    def abort(self) -> None:
        self.aborted.set()


@pytest.mark.parametrize("name", ["replicas", "begin", "put_segment", "commit"])
def test_a_stop_ends_a_cycle_whose_receiver_hangs(lab: Lab, name: str) -> None:
    lab.scribble("os", 0, 5 * MiB)
    link, stop, stopped_at = Hanging(lab, name), threading.Event(), []

    def ask() -> None:
        link.hangs.wait(20)
        stopped_at.append(time.monotonic())
        stop.set()

    thread = threading.Thread(target=ask)
    thread.start()
    with pytest.raises(Stopped):
        lab.sync(link, stop=stop)
    assert time.monotonic() - stopped_at[0] < 2.5
    thread.join()
    assert not is_running(lab.fs, lab.spec.machine_directory("web-1"))
    assert lab.sync().point == 1


def scratch_files(directory: Path) -> list[str]:
    links = []
    for fd in Path("/proc/self/fd").iterdir():
        try:
            links.append(str(fd.readlink()))
        except OSError:
            continue
    return [link for link in links if "(deleted)" in link and str(directory) in link]


def test_a_sending_thread_that_outlives_the_shipment_closes_the_spool(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipment, "_JOIN_SECONDS", 0.1)
    monkeypatch.setattr(shipment, "_GRACE_SECONDS", 0.05)
    lab.scribble("os", 0, 21 * MiB)
    link, release = lab.link(), threading.Event()
    link.before = lambda name, _arguments: name == "put_segment" and release.wait(30)  # type: ignore[assignment]

    def spoiled(done: int, total: int) -> None:
        if scratch_files(lab.root):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        lab.sync(link, progress=spoiled)
    assert scratch_files(lab.root)
    release.set()
    for _ in range(100):
        if not scratch_files(lab.root):
            break
        time.sleep(0.05)
    assert not scratch_files(lab.root)


def slow_commit(lab: Lab, polls: int) -> Link:
    """The first commit is answered 'still at it', and so are that many looks."""
    link = lab.link()
    commit, replica = link.commit, link.replica
    seen: list[str] = []

    def later(*arguments: Any, **options: Any) -> Any:
        seen.append("commit")
        info = commit(*arguments, **options)
        return None if seen.count("commit") == 1 else info

    def look(replica_id: Any) -> Any:
        info = replica(replica_id)
        if "commit" in seen and seen.count("look") < polls:
            seen.append("look")
            return msgspec.structs.replace(info, applying=info.head.delta_id)
        return info

    link.commit, link.replica = later, look  # type: ignore[attr-defined]
    return link


def test_a_slow_commit_is_looked_after_and_its_manifest_sent_once(lab: Lab) -> None:
    lab.scribble("os", 0, MiB)
    link = slow_commit(lab, 2)
    assert lab.sync(link).point == 1
    assert link.calls.count("commit") == 1


def test_a_commit_that_takes_too_long_is_left_to_the_next_cycle(lab: Lab) -> None:
    lab.scribble("os", 0, MiB)
    with pytest.raises(BusyError, match="still applies"):
        lab.sync(slow_commit(lab, 99), wait_limit_seconds=0.5)
    assert (lab.spec.machine_directory("web-1") / "pending").exists()
    assert lab.sync().point == 2
    lab.assert_equal()
