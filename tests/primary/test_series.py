"""Long copies in parts: what a cut costs, when the machine is frozen, and that it ends."""

from __future__ import annotations

import shutil
import threading
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from primary_lab import Lab, Link, MiB

from replica.errors import RootMismatchError, TransportError
from replica.model import Consistency
from replica.plan import Mode
from replica.primary.record import MachineDirectory
from replica.primary.series import MAX_ROUNDS
from replica.primary.status import machine_status
from replica.tracking.journal import WINDOW_BYTES

PART = 4 * MiB


@pytest.fixture
def parts(lab: Lab) -> Lab:
    lab.spec = replace(lab.spec, part_bytes=PART)
    return lab


def cut_at(link: Link, name: str, time: int) -> None:
    """Break the link for good at that call (from 0) of `name`."""
    count = -1

    def before(called: str, _arguments: Any) -> None:
        nonlocal count
        count += called == name
        if count >= time:
            raise TransportError("the connection broke")

    link.before = before


def sent(link: Link) -> dict[str, int]:
    """How often each call was made."""
    return {name: link.calls.count(name) for name in set(link.calls)}


def test_what_fits_into_one_part_is_one_delta(parts: Lab) -> None:
    parts.scribble("os", 0, 3 * MiB)
    link = parts.link()
    assert parts.sync(link).parts == 0
    assert sent(link)["commit"] == 1


def test_a_first_copy_in_parts_lists_one_point(parts: Lab) -> None:
    parts.scribble("os", 0, 21 * MiB)
    parts.scribble("data", MiB, 6 * MiB)
    result = parts.sync()
    assert (result.point, result.mode, result.parts) == (1, Mode.INITIAL, 7)
    assert [info.state.point for info in parts.reader().points()] == [1]
    assert result.bytes_changed == 27 * MiB
    parts.assert_equal()
    parts.scribble("data", MiB, 100)
    again = parts.sync()
    assert (again.point, again.mode, again.parts, again.bytes_changed) == (2, Mode.INCREMENTAL, 0, 4096)
    parts.assert_equal()


@pytest.mark.parametrize("name", ["begin", "put_segment", "commit"])
@pytest.mark.parametrize("time", [0, 1, 3])
def test_a_cut_costs_at_most_the_running_part(parts: Lab, name: str, time: int) -> None:
    parts.scribble("os", 0, 21 * MiB)
    parts.scribble("data", 0, 6 * MiB)
    link = parts.link()
    cut_at(link, name, time)
    with pytest.raises(TransportError):
        parts.sync(link, retry_seconds=0)
    assert parts.reader().points() == []
    again = parts.link()
    result = parts.sync(again)
    assert (result.point, result.mode) == (1, Mode.INITIAL)
    total = link.bytes_sent + again.bytes_sent
    assert total < 27 * MiB + PART + WINDOW_BYTES + 300_000, "a part ends behind the window that fills it"
    parts.assert_equal()
    assert [info.state.point for info in parts.reader().points()] == [1]


def test_a_copy_that_is_cut_in_every_part_still_ends(parts: Lab) -> None:
    parts.scribble("os", 0, 21 * MiB)
    total = 0
    for _ in range(12):
        link = parts.link()
        cut_at(link, "put_segment", 2)
        with suppress(TransportError):
            parts.sync(link, retry_seconds=0)
        total += link.bytes_sent
        if parts.reader().points():
            break
    assert parts.reader().points(), "each try commits a part"
    parts.assert_equal()


def test_status_shows_how_far_a_copy_is_and_counts_no_part_as_a_point(parts: Lab) -> None:
    parts.scribble("os", 0, 21 * MiB)
    link = parts.link()
    cut_at(link, "commit", 3)
    with pytest.raises(TransportError):
        parts.sync(link, retry_seconds=0)
    status = machine_status(parts.fs, parts.spec, parts.machine)
    assert (status.point, status.frozen_at_ns, status.rpo_seconds) == (0, None, None)
    assert status.copying is not None
    assert (status.copying.done_bytes, status.copying.total_bytes) == (12 * MiB, 21 * MiB)
    point = parts.sync()
    done = machine_status(parts.fs, parts.spec, parts.machine)
    assert (done.point, done.frozen_at_ns, done.copying) == (1, point.frozen_at_ns, None)

    parts.scribble("os", 0, 21 * MiB)
    link = parts.link()
    cut_at(link, "commit", 2)
    with pytest.raises(TransportError):
        parts.sync(link, retry_seconds=0)
    again = machine_status(parts.fs, parts.spec, parts.machine)
    assert (again.point, again.frozen_at_ns) == (1, point.frozen_at_ns), "a part is no point: the RPO goes on"
    assert again.copying is not None


def test_the_machine_is_frozen_for_the_last_delta_only(parts: Lab) -> None:
    log = parts.root / "log"
    log.touch()
    machine = parts.freezing(f"echo freeze >> {log}", f"echo thaw >> {log}", consistency=Consistency.APPLICATION)
    parts.scribble("os", 0, 21 * MiB)
    link = parts.link()
    frozen_at: list[int] = []

    def before(name: str, _arguments: Any) -> None:
        if name == "commit":
            frozen_at.append(len(log.read_text().split()))

    link.before = before
    result = parts.sync(link, machine=machine)
    assert frozen_at == [0] * result.parts + [2] and result.parts == 6
    assert parts.head.consistency is Consistency.APPLICATION
    parts.assert_equal()


def test_a_running_machine_may_write_while_parts_go(parts: Lab) -> None:
    """Also where it was read already; the last delta ships what changed meanwhile."""
    machine = parts.freezing("true", "true")
    parts.scribble("os", 0, 20 * MiB)
    link = parts.link()

    def before(name: str, _arguments: Any) -> None:
        if name == "commit" and link.calls.count("commit") in (2, 4):
            parts.scribble("os", 100_000 * link.calls.count("commit"), 50_000)

    link.before = before
    result = parts.sync(link, machine=machine)
    assert result.point == 1 and result.bytes_changed > 20 * MiB
    parts.assert_equal()


def test_a_frozen_machine_that_changed_more_than_a_part_is_thawed_and_goes_on(parts: Lab) -> None:
    log = parts.root / "log"
    machine = parts.freezing(f"echo freeze >> {log}", f"echo thaw >> {log}")
    parts.scribble("os", 0, MiB)
    parts.sync(machine=machine)
    log.write_text("")
    parts.scribble("os", 0, 20 * MiB)
    link = parts.link()
    seen: list[str] = []

    def before(name: str, _arguments: Any) -> None:
        if name == "commit":
            seen.append(log.read_text().replace("\n", " ").strip())

    link.before = before
    result = parts.sync(link, machine=machine)
    assert seen == ["freeze thaw"] * 5 + ["freeze thaw freeze thaw"]
    assert (result.point, result.mode, result.parts) == (2, Mode.INCREMENTAL, 5)
    parts.assert_equal()


def test_a_source_that_changes_faster_than_it_ships_still_comes_to_a_point(parts: Lab) -> None:
    machine = parts.freezing("true", "true")
    parts.scribble("os", 0, 9 * MiB)
    link = parts.link()

    def before(name: str, _arguments: Any) -> None:
        if name == "begin":
            parts.scribble("os", 0, 9 * MiB)

    link.before = before
    result = parts.sync(link, machine=machine)
    assert result.point == 1
    assert result.parts <= (MAX_ROUNDS + 1) * 4
    parts.assert_equal()


def test_a_still_source_that_is_written_between_parts_makes_a_right_point(parts: Lab) -> None:
    parts.scribble("os", 0, 15 * MiB)
    link = parts.link()
    done = threading.Event()

    def before(name: str, _arguments: Any) -> None:
        if name == "commit" and link.calls.count("commit") == 2 and not done.is_set():
            done.set()
            parts.scribble("os", 0, 30_000)

    link.before = before
    assert parts.sync(link).point == 1
    parts.assert_equal()


def test_state_lost_in_the_middle_of_a_series_sends_nothing_again(parts: Lab) -> None:
    parts.scribble("os", 0, 21 * MiB)
    link = parts.link()
    cut_at(link, "commit", 3)
    with pytest.raises(TransportError):
        parts.sync(link, retry_seconds=0)
    shutil.rmtree(parts.spec.state)
    parts.restart_site()  # else it would wait for the sender that was just there
    again = parts.link()
    result = parts.sync(again)
    assert (result.point, result.mode) == (1, Mode.RESYNC)
    assert again.bytes_sent < 10 * MiB
    parts.assert_equal()


def test_the_receiver_may_restart_between_parts(parts: Lab) -> None:
    parts.scribble("os", 0, 15 * MiB)
    link = parts.link()

    def after(name: str, _arguments: Any) -> None:
        if name == "commit":
            parts.restart_site()

    link.after = after
    assert parts.sync(link).point == 1
    parts.assert_equal()


def test_older_points_restore_after_a_long_incremental_in_parts(parts: Lab) -> None:
    parts.scribble("os", 0, 10 * MiB)
    parts.sync()
    first = parts.copy()
    parts.scribble("os", 5 * MiB, 15 * MiB)
    parts.scribble("data", 0, 5 * MiB)
    result = parts.sync()
    assert result.parts > 3 and result.point == 2
    assert [info.state.point for info in parts.reader().points()] == [1, 2]
    parts.assert_equal(1, first)
    parts.assert_equal(2)


def test_roots_that_differ_in_the_middle_of_a_series_are_found_and_healed(parts: Lab) -> None:
    parts.scribble("os", 0, 15 * MiB)
    link = parts.link()
    broken = False

    def before(name: str, _arguments: Any) -> None:
        nonlocal broken
        if name == "commit" and link.calls.count("commit") == 2 and not broken:
            broken = True
            raise RootMismatchError("the receiver found another root")

    link.before = before
    result = parts.sync(link)
    assert (result.point, result.mode) == (1, Mode.RESYNC)
    parts.assert_equal()
    record = MachineDirectory(parts.fs, parts.spec.machine_directory("web-1")).load()
    assert record is not None and record.trusted and record.head == parts.head
