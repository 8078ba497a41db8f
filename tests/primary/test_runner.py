"""Many machines: on schedule, several at once, and an error on one stops no other."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from primary_lab import KiB, Lab, Link

from replica import documents
from replica.errors import ImageError, TransportError
from replica.primary import thawing
from replica.primary.runner import run, sync_machines
from replica.primary.spec import DiskSpec, MachineSpec, SenderSpec
from replica.primary.status import Word, machine_status
from replica.tracking.instant import FrozenMark


@pytest.fixture
def many(lab: Lab) -> SenderSpec:
    """Four machines of one small disk each; the image of `broken` is missing."""
    machines = []
    for name in ("a", "b", "broken", "c"):
        image = lab.root / f"{name}.raw"
        if name != "broken":
            image.write_bytes(name.encode() * 64 * KiB)
        machines.append(MachineSpec(name, "https://dr-1", (DiskSpec("os", image),), every_seconds=0.3))
    return replace(lab.spec, machines=tuple(machines))


def connecting(lab: Lab, links: list[Link]) -> Callable[[MachineSpec], Any]:
    def connect(_machine: MachineSpec) -> Link:
        link = lab.link()
        links.append(link)
        return link

    return connect


def test_results_and_errors_per_machine(lab: Lab, many: SenderSpec) -> None:
    links: list[Link] = []
    outcomes = sync_machines(lab.fs, many, connect=connecting(lab, links))
    assert [o.machine for o in outcomes] == ["a", "b", "broken", "c"]
    assert [o.result.point if o.result else type(o.error) for o in outcomes] == [1, 1, ImageError, 1]
    assert all(link.calls[-1] == "close" for link in links)
    assert sync_machines(lab.fs, many, (), connect=connecting(lab, links)) == []


def test_a_fault_in_one_is_an_error_of_that_one(lab: Lab, many: SenderSpec) -> None:
    def connect(machine: MachineSpec) -> Link:
        link = lab.link()
        if machine.name == "b":
            link.before = lambda _name, _arguments: 1 // 0  # type: ignore[func-returns-value]
        return link

    outcomes = {o.machine: o for o in sync_machines(lab.fs, many, connect=connect)}
    assert outcomes["b"].error is not None and "ZeroDivisionError" in str(outcomes["b"].error)
    assert outcomes["a"].result and outcomes["c"].result
    assert machine_status(lab.fs, many, many.machines[1]).state is Word.FAILING


def running(spec: SenderSpec, lab: Lab, connect: Any) -> tuple[threading.Thread, threading.Event]:
    stop = threading.Event()
    thread = threading.Thread(target=run, args=(spec, stop), kwargs={"fs": lab.fs, "connect": connect})
    thread.start()
    return thread, stop


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_run_goes_on_until_stopped(lab: Lab, many: SenderSpec, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "replica.primary.runner")
    thread, stop = running(many, lab, connecting(lab, []))

    def points(name: str) -> int:
        machine = next(m for m in many.machines if m.name == name)
        return machine_status(lab.fs, many, machine).point

    wait_until(lambda: min(points(n) for n in "abc") >= 3)
    broken = machine_status(lab.fs, many, many.machines[2])
    wait_until(lambda: machine_status(lab.fs, many, many.machines[2]).last_error is not None)
    broken = machine_status(lab.fs, many, many.machines[2])
    assert broken.last_error is not None and broken.last_error.code == "image"
    wait_until(lambda: machine_status(lab.fs, many, many.machines[0]).next_due_ns is not None)
    stop.set()
    started = time.monotonic()
    thread.join(30)
    assert not thread.is_alive() and time.monotonic() - started < 10
    lines = [r.getMessage() for r in caplog.records]
    assert any(line.startswith("machine 'a': point 3 of 20") for line in lines)
    assert any(line.startswith("machine 'broken': ") for line in lines)
    assert machine_status(lab.fs, many, many.machines[0]).next_due_ns is None


def test_a_missed_cycle_is_tried_again_and_catches_up(lab: Lab, many: SenderSpec) -> None:
    spec = replace(many, machines=many.machines[:1])
    down = threading.Event()
    down.set()

    def connect(_machine: MachineSpec) -> Link:
        link = lab.link()

        def before(_name: str, _arguments: Any) -> None:
            if down.is_set():
                raise TransportError("nobody answers")

        link.before = before
        return link

    thread, stop = running(spec, lab, connect)
    wait_until(lambda: machine_status(lab.fs, spec, spec.machines[0]).last_error is not None)
    down.clear()
    wait_until(lambda: machine_status(lab.fs, spec, spec.machines[0]).point >= 1)
    stop.set()
    thread.join(30)
    assert not thread.is_alive()


def test_no_more_at_once_than_allowed(lab: Lab, many: SenderSpec) -> None:
    spec = replace(many, parallel=2, machines=tuple(m for m in many.machines if m.name != "broken"))
    at_work, most = [0], [0]
    lock = threading.Lock()

    def connect(_machine: MachineSpec) -> Link:
        link = lab.link()

        def before(name: str, _arguments: Any) -> None:
            with lock:
                at_work[0] += {"replicas": 1, "close": -1}.get(name, 0)
                most[0] = max(most[0], at_work[0])
            if name == "begin":
                time.sleep(0.1)

        link.before = before
        return link

    assert all(outcome.result for outcome in sync_machines(lab.fs, spec, connect=connect))
    assert most[0] == 2


def test_marked_machines_are_thawed_before_their_turn_comes(lab: Lab, many: SenderSpec) -> None:
    log = lab.root / "log"
    frozen = replace(many.machines[3], freeze="true", thaw=f"echo thaw >> {log}; test -e {lab.root}/fixed")
    spec = replace(many, parallel=1, machines=(*many.machines[:2], frozen))
    assert sync_machines(lab.fs, spec, (frozen,), connect=connecting(lab, []))[0].error is not None
    assert machine_status(lab.fs, spec, frozen).state is Word.FROZEN
    (lab.root / "fixed").touch()

    def connect(machine: MachineSpec) -> Link:
        if machine.name == "a":
            wait_until(lambda: log.read_text().count("thaw") >= 2)
        return lab.link()

    outcomes = sync_machines(lab.fs, spec, connect=connect)
    assert all(outcome.result for outcome in outcomes)
    assert log.read_text().count("thaw") == 3, "once before, once at the start, and once for its own cycle"


@pytest.mark.parametrize("chosen", [False, True])
def test_a_damaged_mark_is_thawed_as_configured(lab: Lab, many: SenderSpec, chosen: bool) -> None:
    log = lab.root / "log"
    thaw = f"echo $REPLICA_MACHINE $REPLICA_DISK_0_NAME >> {log}"
    spec = replace(many, machines=(replace(many.machines[0], freeze="true", thaw=thaw),))
    path = spec.machine_directory("a")
    path.mkdir(parents=True)
    (path / "frozen").write_bytes(b"rot")
    sync_machines(lab.fs, spec, spec.machines if chosen else (), connect=connecting(lab, []))
    assert log.read_text().split()[:2] == ["a", "os"] and not (path / "frozen").exists()


def hanging(lab: Lab, many: SenderSpec) -> tuple[SenderSpec, Path]:
    """`c` and `d` are marked; what thaws them hangs until that file is there, and says that it has begun."""
    free = lab.root / "free"
    machines = []
    for name in ("c", "d"):
        thaw = f"touch {lab.root}/begun-{name}; while ! test -e {free}; do sleep 0.01; done"
        machine = replace(many.machines[3], name=name, freeze="true", thaw=thaw)
        path = many.machine_directory(name)
        path.mkdir(parents=True)
        documents.save(lab.fs, path / "frozen", FrozenMark(name, 1, ["sh", "-c", thaw], {}))
        machines.append(machine)
    return replace(many, parallel=1, machines=(*machines, *many.machines[:2])), free


def test_a_thaw_that_hangs_holds_up_its_own_machine_alone(lab: Lab, many: SenderSpec) -> None:
    spec, free = hanging(lab, many)
    done = []

    def connect(machine: MachineSpec) -> Link:
        done.append(machine.name)
        if machine.name == "b":
            wait_until(lambda: all((lab.root / f"begun-{name}").exists() for name in "cd"))
            free.touch()
        return lab.link()

    outcomes = sync_machines(lab.fs, spec, connect=connect)
    assert [o.machine for o in outcomes] == ["c", "d", "a", "b"] and all(o.result for o in outcomes)
    assert done[:2] == ["a", "b"]


def test_run_goes_on_with_others_while_a_thaw_hangs_and_is_stopped(lab: Lab, many: SenderSpec) -> None:
    spec, free = hanging(lab, many)
    thread, stop = running(spec, lab, connecting(lab, []))
    wait_until(lambda: machine_status(lab.fs, spec, spec.machines[3]).point >= 2)
    assert machine_status(lab.fs, spec, spec.machines[0]).point == 0
    stop.set()
    free.touch()
    thread.join(30)
    assert not thread.is_alive()
    assert not (spec.machine_directory("c") / "frozen").exists(), "a thaw that has begun is waited for"


def test_a_stop_begins_no_thaw(lab: Lab, many: SenderSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thawing, "AT_ONCE", 1)
    spec, free = hanging(lab, many)
    thread, stop = running(spec, lab, connecting(lab, []))
    wait_until(lambda: (lab.root / "begun-c").exists())
    stop.set()
    free.touch()
    thread.join(30)
    assert not (lab.root / "begun-d").exists() and (spec.machine_directory("d") / "frozen").exists()


def test_what_cannot_be_read_in_the_state_directory_stops_nobody_else(lab: Lab, many: SenderSpec) -> None:
    many.state.mkdir()
    (many.state / "loop").symlink_to("loop")
    outcomes = {o.machine: o for o in sync_machines(lab.fs, many, connect=connecting(lab, []))}
    assert outcomes["a"].result and outcomes["c"].result
    mark = many.machine_directory("b") / "frozen"
    mark.symlink_to("frozen")
    outcomes = {o.machine: o for o in sync_machines(lab.fs, many, connect=connecting(lab, []))}
    assert outcomes["a"].result and outcomes["c"].result
    assert outcomes["b"].error is not None and outcomes["b"].error.code == "storage"


@pytest.mark.parametrize("left", ["removed", "wrong", "not chosen"])
def test_a_marked_machine_is_thawed_whatever_became_of_its_configuration(lab: Lab, many: SenderSpec, left: str) -> None:
    """By the command in its mark, if the configuration has none that can run."""
    frozen = replace(many.machines[3], freeze="true", thaw=f"test -e {lab.root}/fixed")
    assert sync_machines(lab.fs, many, (frozen,), connect=connecting(lab, []))[0].error is not None
    (lab.root / "fixed").touch()
    others = {"removed": (), "wrong": (replace(frozen, freeze="a\0", thaw="b\0"),), "not chosen": (frozen,)}[left]
    sync_machines(lab.fs, replace(many, machines=others), (), connect=connecting(lab, []))
    assert not (many.machine_directory("c") / "frozen").exists()


def test_moving_a_state_away_is_not_advised_while_it_holds_a_mark(lab: Lab, many: SenderSpec) -> None:
    path = many.machine_directory("a")
    path.mkdir(parents=True)
    (path / "machine.json").write_bytes(b"rot")
    for name, advice in (("", "^move"), ("frozen", "thaw it first")):
        if name:
            (path / name).touch()
        error = machine_status(lab.fs, many, many.machines[0]).last_error
        assert error is not None and re.search(advice, error.hint)
