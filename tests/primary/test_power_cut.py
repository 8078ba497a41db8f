"""The sender dies before every single step that changes something, here or at the receiver, and goes on afterwards."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from primary_lab import KiB, Lab, Link
from test_disks import Changing

from replica.plan import Mode
from replica.primary.cycle import sync_machine
from replica.store import replica_directories
from tests.cutting import CutFileSystem, Power


class PowerCut(BaseException):
    """No error: nothing of the program runs on, as after SIGKILL."""


def sync_with(lab: Lab, power: Power) -> None:
    """A sync in which every call to the receiver is two steps: before it arrives, and before its answer does."""
    link: Link = lab.link()
    link.before = link.after = lambda _name, _arguments: power.step()
    sync_machine(CutFileSystem(power), lab.spec, lab.machine, link, retry_seconds=1)


def cut_at_every_step(lab: Lab, prepare: Any) -> Iterator[int]:
    """Yields after every cut, for the caller to look; ends when a sync came through uncut."""
    due = 0
    while True:
        prepare(due)
        power = Power(due, PowerCut)
        try:
            sync_with(lab, power)
        except PowerCut:
            yield due
            due += 1
        else:
            return


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path / "lab", {"os": 300 * KiB + 5, "data": 64 * KiB})
    yield lab
    lab.site.close()


@pytest.fixture(autouse=True)
def _directory(tmp_path: Path) -> None:
    (tmp_path / "lab").mkdir()


def test_an_incremental_survives_a_cut_anywhere(small: Lab) -> None:
    small.scribble("os", 0, 200 * KiB)
    small.sync()
    points = {1: small.copy()}

    def change(due: int) -> None:
        small.scribble("os", due * 1000 % (250 * KiB), 5000)
        small.scribble("data", due * 777 % (50 * KiB), 10)

    cuts = 0
    for due in cut_at_every_step(small, change):
        cuts += 1
        if due % 2:
            change(due + 1)  # between the cut and the next cycle the guest goes on
        frozen = small.copy()
        result = small.sync()
        assert result.mode is Mode.INCREMENTAL, f"a cut before step {due} cost the trackers"
        small.assert_equal(result.point, frozen)
        points[result.point] = frozen
    assert cuts > 25
    kept = [listed.state.point for listed in small.reader().points() if listed.state.point in points]
    assert len(kept) > 25
    for point in kept[:: len(kept) // 10]:
        small.assert_equal(point, points[point])
    names = {path.name for path in small.spec.machine_directory("web-1").iterdir()}
    assert names - {"receipt"} == {"machine.json", "lock", "status.json", "disks"}


def test_a_cut_anywhere_and_a_receiver_put_back_to_before_it(small: Lab) -> None:
    """Trackers that are half folded describe neither state: nothing may be compared with them."""
    small.scribble("os", 0, 200 * KiB)
    small.sync()
    saved = small.root / "saved"

    def save(due: int) -> None:
        shutil.rmtree(saved, ignore_errors=True)
        subprocess.run(["cp", "-a", "--sparse=always", small.storage, saved], check=True)
        for disk, size in (("os", 250 * KiB), ("data", 50 * KiB)):
            small.scribble(disk, due * 1000 % size, 9000)

    modes = set()
    for _ in cut_at_every_step(small, save):
        small.site.close()
        shutil.rmtree(small.storage)
        saved.rename(small.storage)
        small.site = small.open_site()
        modes.add(small.sync().mode)
        small.assert_equal()
    assert modes == {Mode.INCREMENTAL, Mode.RESYNC}


def test_two_cuts_in_a_row_anywhere(small: Lab) -> None:
    small.scribble("os", 0, 200 * KiB)
    small.sync()
    for due in cut_at_every_step(small, lambda due: small.scribble("os", due * 1000 % (250 * KiB), 5000)):
        with pytest.raises(PowerCut):
            sync_with(small, Power(due % 17, PowerCut))
        small.sync()
        small.assert_equal()


def test_becoming_a_replica_survives_a_cut_anywhere(small: Lab) -> None:
    """However often the first sync dies, there is one replica, and its key is known."""
    small.scribble("os", 0, 200 * KiB)

    def start_over(_due: int) -> None:
        small.site.close()
        for directory in (small.storage, small.spec.state, small.spec.keys):
            shutil.rmtree(directory, ignore_errors=True)
        small.site = small.open_site()

    cuts = 0
    for _ in cut_at_every_step(small, start_over):
        cuts += 1
        small.sync()
        assert len(replica_directories(small.fs, small.storage)) == 1
        small.assert_equal()
    assert cuts > 30


@pytest.mark.parametrize("head", ["raw", "vhd"])
def test_changing_disks_survives_a_cut_anywhere(tmp_path: Path, head: str) -> None:
    """Grown, cut, renamed, swapped, added and removed at once; the next cycle never ships what it knows."""
    lab = Changing(tmp_path / "lab", {"os": 300 * KiB + 5, "data": 64 * KiB, "logs": 20 * KiB}, head)
    for name in lab.images:
        lab.scribble(name, 0, 20 * KiB)
    lab.point()
    sizes = [310 * KiB, 250 * KiB + 1, 16 * KiB, 300 * KiB]

    def change(due: int) -> None:
        lab.resize(sorted(lab.images)[due % len(lab.images)], sizes[due % len(sizes)])
        lab.rename({"os": "data", "data": "os"} if due % 2 else {"os": "x", "data": "y"})
        lab.rename({"x": "os", "y": "data"})
        if "logs" in lab.images:
            lab.remove("logs")
        else:
            lab.add("logs", 20 * KiB)
            lab.scribble("logs", 0, 20 * KiB)

    cuts = 0
    for due in cut_at_every_step(lab, change):
        cuts += 1
        result = lab.point()
        assert result.mode is Mode.INCREMENTAL and result.bytes_changed <= 32 * KiB, f"a cut before step {due}"
        lab.assert_equal(result.point)
        assert lab.trackers() == {str(state.disk.id) for state in lab.head.disks}
    assert cuts > 30
    for number in list(lab.points)[:: max(1, len(lab.points) // 10)]:
        lab.assert_equal(number, lab.points[number])
    lab.site.close()


def test_adopting_survives_a_cut_anywhere(small: Lab) -> None:
    small.scribble("os", 0, 200 * KiB)
    small.sync()

    def lose_state(due: int) -> None:
        shutil.rmtree(small.spec.state, ignore_errors=True)
        small.site.close()  # a sender in the middle of a delta would be waited for; here it is known to be dead
        small.site = small.open_site()
        small.scribble("os", due * 1000 % (250 * KiB), 100)

    for _ in cut_at_every_step(small, lose_state):
        small.sync()
        small.assert_equal()
    assert len(replica_directories(small.fs, small.storage)) == 1
    assert np.all(small.content()["data"] == 0)
