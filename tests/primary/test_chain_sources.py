"""Differencing images as sources: snapshots come and go under a machine, and its points stay whole."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest

from replica.errors import ImageError, SourceBusyError
from replica.images import ParentLink, VhdWriter
from replica.primary.cycle import Mode
from replica.primary.spec import DiskSpec, MachineSpec
from tests.primary.primary_lab import Lab, MiB

SIZE = 8 * MiB


class Chain:
    """The disk `os` as a chain of VHDs: `base` in the folder `bases`, children in `vm`."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.files = lab, [lab.root / "bases" / "base.vhd"]
        self.lab.data = {"os": np.zeros(SIZE, np.uint8)}
        self.grow(self.files[0])

    def grow(self, path: Path) -> None:
        """One file more, with a megabyte of changes in sectors that its parent has, too."""
        path.parent.mkdir(exist_ok=True)
        parent = ParentLink(self.files[-1], UUID(int=len(self.files))) if path not in self.files else None
        self.files += [path] if parent else []
        with VhdWriter.create(self.lab.fs, path, SIZE, UUID(int=len(self.files)), parent=parent) as writer:
            for offset in (512, 3 * MiB + len(self.files) * 4096):
                data = self.lab.rng.integers(1, 256, MiB // 2, np.uint8)
                writer.write(offset, data.tobytes())
                self.lab.data["os"][offset : offset + len(data)] = data
            writer.sync()

    @property
    def machine(self) -> MachineSpec:
        disk = DiskSpec("os", self.files[-1], parents=(self.lab.root / "bases",))
        return replace(self.lab.machine, disks=(disk,))


@pytest.fixture
def chain(lab: Lab) -> Chain:
    return Chain(lab)


def test_snapshots_come_and_go(lab: Lab, chain: Chain) -> None:
    assert lab.sync(machine=chain.machine).point == 1
    lab.assert_equal()
    for number in (2, 3):
        chain.grow(lab.root / "vm" / f"child-{number}.avhd")
        result = lab.sync(machine=chain.machine)
        assert (result.point, result.mode) == (number, Mode.INCREMENTAL)
        assert result.bytes_changed <= 2 * MiB
        lab.assert_equal()


def test_a_parent_that_moves_makes_no_point(lab: Lab, chain: Chain) -> None:
    chain.grow(lab.root / "vm" / "child.avhd")

    def touch(_done: int, _total: int) -> None:
        os.utime(chain.files[0])

    with pytest.raises(SourceBusyError, match="base.vhd was written while it was read"):
        lab.sync(machine=chain.machine, progress=touch)
    assert lab.sync(machine=chain.machine).point == 1
    lab.assert_equal()


def test_a_parent_of_a_frozen_machine_must_not_move_either(lab: Lab, chain: Chain) -> None:
    chain.grow(lab.root / "vm" / "child.avhd")
    machine = replace(chain.machine, freeze="true", thaw="true")
    with pytest.raises(SourceBusyError, match="base.vhd was written although"):
        lab.sync(machine=machine, progress=lambda *_: os.utime(chain.files[0]))
    assert lab.sync(machine=machine).point == 1
    lab.assert_equal()


def test_a_parent_without_permission_is_no_source(lab: Lab, chain: Chain) -> None:
    chain.grow(lab.root / "vm" / "child.avhd")
    disk = replace(chain.machine.disks[0], parents=())
    with pytest.raises(ImageError, match="differencing image whose parent .* is not in .*; .*`parents`"):
        lab.sync(machine=replace(chain.machine, disks=(disk,)))
