"""Disks that grow, are cut, come, go and change their names between two cycles: every point is what it was."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from primary_lab import TLS, KiB, Lab, MiB

from replica.errors import ConflictError, PointGoneError
from replica.model import Disk, DiskId
from replica.plan import Mode
from replica.primary.cycle import SyncResult
from replica.primary.disks import UNKNOWN_DISK_ID, Known, Wanted, match_disks
from replica.primary.spec import DiskSpec
from replica.receiver.site import AllowSpec, Site, SiteSpec, StorageSpec
from replica.store import Policy, restore_point

# --- which disk is which: the pure rule ---


def known(number: int, name: str, image: str = "") -> Known:
    return Known(Disk(DiskId(UUID(int=number)), name, 4096 * number), image)


def wanted(name: str, image: str = "", formerly: str | None = None, size: int = 777) -> Wanted:
    return Wanted(Disk(UNKNOWN_DISK_ID, name, size), image, formerly)


A, B = known(1, "a", "/a.raw"), known(2, "b", "/b.raw")


@pytest.mark.parametrize(
    ("wishes", "ids"),
    [
        ([wanted("a", "/a.raw"), wanted("b", "/b.raw")], {"a": 1, "b": 2}),
        ([wanted("a", "/new/a.raw"), wanted("b", "/b.raw")], {"a": 1, "b": 2}),
        ([wanted("x", "/a.raw"), wanted("b", "/b.raw")], {"x": 1, "b": 2}),
        ([wanted("x", "/x.raw", "a"), wanted("b", "/b.raw")], {"x": 1, "b": 2}),
        ([wanted("x", "/x.raw"), wanted("b", "/b.raw")], {"x": 100, "b": 2}),
        ([wanted("b", "/a.raw"), wanted("a", "/b.raw")], {"b": 1, "a": 2}),
        ([wanted("b", "/new/a.raw", "a"), wanted("a", "/new/b.raw", "b")], {"b": 1, "a": 2}),
        ([wanted("a", "/b.raw")], {"a": 2}),
        ([wanted("b", "/b.raw", "a"), wanted("a", "/a.raw")], {"a": 1, "b": 2}),
        ([wanted("c", "/c.raw"), wanted("a", "/a.raw")], {"a": 1, "c": 100}),
        ([wanted("b", "/a.raw")], {"b": 1}),
    ],
)
def test_which_disk_is_which(wishes: list[Wanted], ids: dict[str, int]) -> None:
    fresh = count(100)
    disks, images = match_disks(wishes, [A, B], lambda: DiskId(UUID(int=next(fresh))))
    assert {disk.name: disk.id.int for disk in disks} == ids
    assert [disk.id.int for disk in disks] == sorted(ids.values())
    assert dict(zip([disk.name for disk in disks], images, strict=True)) == {w.disk.name: w.image for w in wishes}
    assert all(disk.size_bytes == 777 for disk in disks), "sizes are as the images say"


names = st.sampled_from("abcd")


@given(
    st.lists(st.tuples(names, names, st.none() | names), unique_by=lambda w: w[0], max_size=4),
    st.lists(st.tuples(names, names), unique_by=lambda w: w[0], max_size=4),
)
def test_a_matched_configuration_stays_matched(wishes: list[Any], held: list[Any]) -> None:
    """Every disk has one id, every id one disk; and the next cycle, with the same configuration, finds the same."""
    start = [known(number, *item) for number, item in enumerate(held, 1)]
    config = [wanted(*item) for item in wishes]
    disks, images = match_disks(config, start)
    assert len({disk.id for disk in disks}) == len(config)
    again = [Known(disk, image) for disk, image in zip(disks, images, strict=True)]
    assert match_disks(config, again) == (disks, images)


# --- through whole cycles ---


class Changing(Lab):
    """A lab whose disks change, and the model: what every point was."""

    def __init__(self, root: Path, sizes: dict[str, int], head: str = "raw") -> None:
        self.head_format = head
        super().__init__(root, sizes)
        self.points: dict[int, dict[str, np.ndarray]] = {}

    def open_site(self) -> Site:
        storages = {"tier1": StorageSpec(name="tier1", path=self.storage, head=self.head_format)}
        allow = [AllowSpec(primary="hv-*", storage="tier1", trust_group="prod")]
        return Site(self.fs, SiteSpec("127.0.0.1", 0, TLS, storages, allow, Policy(keep_last=1000)))

    def configure(self, **formerly: str) -> None:
        disks = tuple(DiskSpec(name, path, formerly=formerly.get(name)) for name, path in self.images.items())
        self.machine = replace(self.machine, disks=disks)
        self.spec = replace(self.spec, machines=(self.machine,))

    def resize(self, name: str, size: int) -> None:
        os.truncate(self.images[name], size)
        new = np.zeros(size, np.uint8)
        kept = min(size, len(self.data[name]))
        new[:kept] = self.data[name][:kept]
        self.data[name] = new

    def add(self, name: str, size: int) -> None:
        path = self.root / f"{name}-{len(list(self.root.glob('*.raw')))}.raw"
        path.touch()
        self.images[name], self.data[name] = path, np.zeros(0, np.uint8)
        self.resize(name, size)
        self.configure()

    def remove(self, name: str) -> None:
        self.images.pop(name)
        self.data.pop(name)
        self.configure()

    def rename(self, renames: dict[str, str]) -> None:
        self.images = {renames.get(name, name): path for name, path in self.images.items()}
        self.data = {renames.get(name, name): data for name, data in self.data.items()}
        self.configure()

    def point(self, **options: Any) -> SyncResult:
        frozen = self.copy()
        result = self.sync(**options)
        self.points[result.point] = frozen
        return result

    def assert_points(self) -> None:
        """Every point restores; of a run of unchanged ones the receiver keeps the first and the newest."""
        for number, data in self.points.items():
            listed = sorted(info.state.point for info in self.reader().points())
            if number in listed:
                with suppress(PointGoneError):  # composed away just now, which it is looked at for below
                    self.assert_equal(number, data)
                    continue
                listed = sorted(info.state.point for info in self.reader().points())
            if number not in listed:
                before, after = (max(n for n in listed if n < number), min(n for n in listed if n > number))
                assert self.points[before].keys() == data.keys() == self.points[after].keys()
                assert all((self.points[before][name] == content).all() for name, content in data.items())

    def trackers(self) -> set[str]:
        return {path.name for path in (self.spec.machine_directory("web-1") / "disks").iterdir()}


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Changing]:
    (tmp_path / "lab").mkdir()
    lab = Changing(tmp_path / "lab", {"os": 5 * MiB + 1000, "data": 3 * MiB})
    lab.scribble("os", 0, 5 * MiB)
    lab.scribble("data", 0, 2 * MiB)
    yield lab
    lab.site.close()


@pytest.mark.parametrize("size", [9 * MiB, 5 * MiB + 1001, 4 * MiB, 4 * MiB + 5000, 100, 0])
def test_resizing_ships_what_changed_and_older_points_keep_their_size(lab: Changing, size: int) -> None:
    lab.point()
    lab.resize("os", size)
    result = lab.point()
    assert result.mode is Mode.INCREMENTAL
    assert result.bytes_changed <= 4096, "at most the grain at the cut"
    lab.resize("os", 6 * MiB)
    lab.scribble("os", 5 * MiB, 100)
    assert lab.point().bytes_changed <= 8192
    lab.assert_points()
    assert lab.point().bytes_changed == 0


def test_an_added_disk_is_the_only_one_that_is_copied(lab: Changing) -> None:
    lab.point()
    lab.add("logs", 2 * MiB)
    lab.scribble("logs", MiB, 4096)
    result = lab.point()
    assert (result.mode, result.bytes_changed) == (Mode.INCREMENTAL, 4096)
    lab.assert_points()


def test_a_removed_disk_is_in_older_points_and_its_trackers_are_gone(
    lab: Changing, caplog: pytest.LogCaptureFixture
) -> None:
    assert lab.point().notices == ()
    lab.remove("data")
    lab.resize("os", 5 * MiB)
    result = lab.point()
    told = {
        "disk 'data' is not in it any more; older points keep what they have",
        f"disk 'os' shrank from {5 * MiB + 1000} to {5 * MiB} bytes; older points keep theirs",
    }
    assert set(result.notices) == told and result.bytes_changed <= 4096
    said = [record.getMessage() for record in caplog.records if record.name == "replica.receiver.slot"]
    assert all(any(text in line for line in said) for text in told), said
    assert lab.point().notices == (), "said once"
    assert lab.trackers() == {str(state.disk.id) for state in lab.head.disks} and len(lab.head.disks) == 1
    lab.assert_points()


@pytest.mark.parametrize("renames", [{"os": "system"}, {"os": "data", "data": "os"}, {"os": "data", "data": "x y"}])
def test_renaming_ships_nothing(lab: Changing, renames: dict[str, str]) -> None:
    lab.point()
    ids = {state.disk.id for state in lab.head.disks}
    lab.rename(renames)
    result = lab.point()
    assert (result.mode, result.bytes_changed) == (Mode.INCREMENTAL, 0)
    assert {state.disk.id for state in lab.head.disks} == ids
    assert lab.point().bytes_changed == 0
    lab.assert_points()


def test_a_disk_renamed_and_moved_is_told_by_formerly(lab: Changing) -> None:
    lab.point()
    lab.rename({"os": "system"})
    lab.images["system"] = lab.images["system"].rename(lab.root / "elsewhere.raw")
    lab.configure(system="os")
    assert lab.point().bytes_changed == 0
    lab.assert_points()
    lab.point()


def test_a_cycle_that_failed_after_a_change_forgets_nothing(lab: Changing) -> None:
    """The configuration goes back to what it was before anything was committed: the trackers are still there."""
    lab.point()
    images, data = dict(lab.images), dict(lab.data)
    lab.remove("data")
    lab.add("logs", MiB)
    link = lab.link()

    def before(name: str, _arguments: Any) -> None:
        if name == "commit":
            raise RuntimeError("no")

    link.before = before
    with pytest.raises(RuntimeError):
        lab.sync(link)
    lab.images, lab.data = images, data
    lab.configure()
    assert lab.point().bytes_changed == 0
    assert len(lab.trackers()) == 2
    lab.assert_points()


def test_a_lost_state_directory_with_changed_disks_adopts_by_a_name_in_common(lab: Changing) -> None:
    lab.point()
    ids = {state.disk.name: state.disk.id for state in lab.head.disks}
    shutil.rmtree(lab.spec.state)
    lab.resize("os", 6 * MiB)
    lab.remove("data")
    lab.add("logs", MiB)
    assert lab.point().mode is Mode.RESYNC
    assert next(state.disk.id for state in lab.head.disks if state.disk.name == "os") == ids["os"]
    lab.assert_points()


def test_a_lost_state_directory_with_no_name_in_common_stops(lab: Changing) -> None:
    lab.point()
    shutil.rmtree(lab.spec.state)
    lab.rename({"os": "x", "data": "y"})
    with pytest.raises(ConflictError, match="0 of its 1 replicas"):
        lab.sync()
    lab.configure(x="os")
    assert lab.point().mode is Mode.RESYNC
    lab.assert_points()


def test_a_dynamic_vhd_that_grows(lab: Changing, tmp_path: Path) -> None:
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed")
    vhd = lab.root / "os.vhd"

    def convert() -> None:
        command = ["qemu-img", "convert", "-O", "vpc", "-o", "subformat=dynamic,force_size=on", lab.images["os"], vhd]
        subprocess.run(command, check=True)

    lab.resize("os", 6 * MiB)
    convert()
    disks = (DiskSpec("os", vhd), *lab.machine.disks[1:])
    lab.machine = replace(lab.machine, disks=disks)
    lab.point()
    lab.resize("os", 9 * MiB)
    lab.scribble("os", 8 * MiB, 10)
    convert()
    result = lab.point()
    assert (result.mode, result.bytes_changed) == (Mode.INCREMENTAL, 4096)
    lab.assert_points()


SIZES = (0, 1, 4095, 4096, 16 * KiB + 1, 100 * KiB, 200 * KiB + 77)
step = st.one_of(
    st.tuples(st.just("write"), st.integers(0, 9), st.integers(0, 200 * KiB), st.integers(1, 9000)),
    st.tuples(st.just("discard"), st.integers(0, 9), st.integers(0, 200 * KiB), st.integers(1, 9000)),
    st.tuples(st.just("resize"), st.integers(0, 9), st.sampled_from(SIZES)),
    st.tuples(st.just("add"), st.sampled_from("abcdef"), st.sampled_from(SIZES)),
    st.tuples(st.just("remove"), st.integers(0, 9)),
    st.tuples(st.just("rename"), st.integers(0, 9), st.sampled_from("abcdef")),
    st.tuples(st.just("swap"), st.integers(0, 9), st.integers(0, 9)),
)
Cycles = list[list[tuple[Any, ...]]]


def play(lab: Changing, steps: list[tuple[Any, ...]]) -> int:
    """Do the steps that make sense; an upper bound of the bytes in grains that they changed."""
    changed = 0
    largest = max(len(data) for data in lab.data.values())  # at the point before, whatever a step makes of it first
    for kind, which, *rest in steps:
        at = sorted(lab.images)
        name = at[which % len(at)] if isinstance(which, int) else which
        if kind in ("write", "discard"):
            offset, length = rest
            length = max(0, min(length, len(lab.data[name]) - offset))
            if length:
                lab.scribble(name, offset, length) if kind == "write" else lab.write(name, offset, bytes(length))
                changed += length + 8192
        elif kind == "resize":
            changed += max(0, len(lab.data[name]) - rest[0]) + 8192  # what is cut off is zeros if it grows again
            lab.resize(name, rest[0])
        elif kind == "add" and name not in lab.images:
            lab.add(name, rest[0])
        elif kind == "remove" and len(lab.images) > 1:
            # One added under its name at once is it, with another content; it may have been cut before that.
            changed += max(largest, len(lab.data[name])) + 8192
            lab.remove(name)
        elif kind == "rename" and rest[0] not in lab.images:
            lab.rename({name: rest[0]})
        elif kind == "swap":
            other = at[rest[0] % len(at)]
            lab.rename({name: other, other: name})
    return changed


@pytest.mark.parametrize("head", ["raw", "vhd"])
@given(st.lists(st.lists(step, max_size=6), min_size=1, max_size=6))
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
def test_every_point_of_every_history_restores(tmp_path_factory: Any, head: str, cycles: Cycles) -> None:
    root = tmp_path_factory.mktemp("lab")
    lab = Changing(root, {"a": 100 * KiB + 5, "b": 64 * KiB}, head)
    lab.scribble("a", 0, 90 * KiB)
    lab.point()
    for steps in cycles:
        changed = play(lab, steps)
        result = lab.point()
        assert result.mode is Mode.INCREMENTAL and result.bytes_changed <= changed
        assert lab.trackers() == {str(state.disk.id) for state in lab.head.disks}
    lab.assert_points()
    number = min(lab.points)
    with lab.reader().open_point(number) as opened:
        paths = restore_point(lab.fs, opened, root / "out", "raw")
    assert {name: path.stat().st_size for name, path in paths.items()} == {
        name: len(data) for name, data in lab.points[number].items()
    }
    lab.site.close()
    shutil.rmtree(root)
