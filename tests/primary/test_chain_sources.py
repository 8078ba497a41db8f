"""Differencing images as sources: snapshots come and go under a machine, and its points stay whole."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest

from replica.errors import ImageError, SourceBusyError
from replica.images import ParentLink
from replica.images.vhd_write import VhdWriter
from replica.images.vhdx_write import VhdxWriter
from replica.primary.cycle import Mode
from replica.primary.spec import DiskSpec, MachineSpec
from tests.primary.primary_lab import Lab, MiB

sys.path.insert(0, str(Path(__file__).parents[1] / "images"))
from vhdx_interrupted import Interrupted, allocate, state
from vhdx_maker import Vhdx

SIZE = 8 * MiB


class Chain:
    """The disk `os` as a chain of VHDs or VHDXs: `base` in the folder `bases`, children in `vm`."""

    def __init__(self, lab: Lab, writer: type[VhdWriter] | type[VhdxWriter]) -> None:
        self.writer = writer
        self.lab, self.files = lab, [lab.root / "bases" / f"base.{writer.format}"]
        self.id = UUID(int=0)
        self.lab.data = {"os": np.zeros(SIZE, np.uint8)}
        self.grow(self.files[0])

    def grow(self, path: Path) -> None:
        """One file more, with a megabyte of changes in sectors that its parent has, too."""
        path.parent.mkdir(exist_ok=True)
        parent = ParentLink(self.files[-1], self.id) if path not in self.files else None
        self.files += [path] if parent else []
        with self.writer.create(self.lab.fs, path, SIZE, UUID(int=len(self.files)), parent=parent) as writer:
            for offset in (512, 3 * MiB + len(self.files) * 4096):
                data = self.lab.rng.integers(1, 256, MiB // 2, np.uint8)
                writer.write(offset, data.tobytes())
                self.lab.data["os"][offset : offset + len(data)] = data
            writer.sync()
            self.id = writer.data_write_id if isinstance(writer, VhdxWriter) else writer.unique_id

    def child(self, name: str) -> None:
        """A snapshot: one file more."""
        self.grow(self.lab.root / "vm" / f"{name}.a{self.writer.format}")

    @property
    def machine(self) -> MachineSpec:
        disk = DiskSpec("os", self.files[-1], parents=(self.lab.root / "bases",))
        return replace(self.lab.machine, disks=(disk,))


@pytest.fixture(params=[VhdWriter, VhdxWriter], ids=["vhd", "vhdx"])
def chain(lab: Lab, request: pytest.FixtureRequest) -> Chain:
    return Chain(lab, request.param)


def test_snapshots_come_and_go(lab: Lab, chain: Chain) -> None:
    assert lab.sync(machine=chain.machine).point == 1
    lab.assert_equal()
    for number in (2, 3):
        chain.child(f"child-{number}")
        result = lab.sync(machine=chain.machine)
        assert (result.point, result.mode) == (number, Mode.INCREMENTAL)
        assert result.bytes_changed <= 2 * MiB
        lab.assert_equal()


def test_a_parent_that_moves_makes_no_point(lab: Lab, chain: Chain) -> None:
    chain.child("child")

    def touch(_done: int, _total: int) -> None:
        os.utime(chain.files[0])

    with pytest.raises(SourceBusyError, match="base.vhdx? was written while it was read"):
        lab.sync(machine=chain.machine, progress=touch)
    time.sleep(0.05)  # a stamp that is not yet old proves nothing
    assert lab.sync(machine=chain.machine).point == 1
    lab.assert_equal()


def test_a_parent_of_a_frozen_machine_must_not_move_either(lab: Lab, chain: Chain) -> None:
    chain.child("child")
    machine = replace(chain.machine, freeze="true", thaw="true")
    with pytest.raises(SourceBusyError, match="base.vhdx? was written although"):
        lab.sync(machine=machine, progress=lambda *_: os.utime(chain.files[0]))
    assert lab.sync(machine=machine).point == 1
    lab.assert_equal()


def test_a_parent_without_permission_is_no_source(lab: Lab, chain: Chain) -> None:
    chain.child("child")
    disk = replace(chain.machine.disks[0], parents=())
    with pytest.raises(ImageError, match="differencing image whose parent .* is not in .*; .*`parents`"):
        lab.sync(machine=replace(chain.machine, disks=(disk,)))


def test_a_vhdx_that_a_crash_left(lab: Lab) -> None:
    """Its log is replayed in memory: the point is what the machine wrote, and the file stays as it is."""
    recipe = Vhdx(SIZE, blocks={1: b"a" * MiB})
    writer = Interrupted(recipe, lag=2)
    path = lab.root / "crashed.vhdx"
    machine = replace(lab.machine, disks=(DiskSpec("os", path),))
    for number, step in enumerate([allocate(4, b"b"), allocate(0, b"c"), state(3, 2)], 1):
        writer.step(step)
        path.write_bytes(writer.file)
        lab.data = {"os": np.frombuffer(writer.content, np.uint8).copy()}
        time.sleep(0.05)
        assert lab.sync(machine=machine).point == number
        lab.assert_equal()
        assert path.read_bytes() == writer.file
