"""A machine with points of known content, ways to damage a file, and what must be true afterwards whatever it was."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from replica.errors import ReplicaError
from replica.primary.cycle import SyncResult
from replica.primary.spec import DiskSpec
from replica.store import restore_point

sys.path.append(str(Path(__file__).parents[1] / "primary"))

from primary_lab import KiB, Lab, Link, MiB

LEAF = 16 * KiB


class DamageLab(Lab):
    """Two disks of a few hundred KiB. Points 1 to 3; `copies` is what the disks held at each."""

    def __init__(self, root: Path, points: int = 3, sizes: dict[str, int] | None = None) -> None:
        super().__init__(root, sizes or {"os": 10 * LEAF + 1234, "data": 5 * LEAF})
        self.copies: dict[int, dict[str, np.ndarray]] = {}
        self.restores = 0
        self.scribble("os", 0, 6 * LEAF)
        self.scribble("data", self.data["data"].size // 5, 3000)
        for number in range(points):
            self.scribble("os", number * LEAF + 512, 3000)
            self.scribble("os", 10 * LEAF + 100 * number, 100)
            self.scribble("data", 100 * number, 100)
            self.point()

    @classmethod
    def taken_up(cls, root: Path, template: DamageLab) -> DamageLab:
        """A copy of a template's files under `root`; its site is closed."""
        lab = cls.__new__(cls)
        lab.root, lab.fs, lab.storage = root, template.fs, root / "replicas"
        lab.rng = np.random.default_rng(11)
        lab.images = {name: root / path.name for name, path in template.images.items()}
        lab.data = template.copy()
        disks = tuple(DiskSpec(name, path) for name, path in lab.images.items())
        lab.machine = replace(template.machine, disks=disks)
        lab.spec = replace(template.spec, state=root / "state", keys=root / "keys", machines=(lab.machine,))
        lab.copies, lab.restores = dict(template.copies), 0
        return lab

    def point(self, link: Link | None = None) -> SyncResult:
        result = self.sync(link)
        self.copies[result.point] = self.copy()
        return result

    @property
    def directory(self) -> Path:
        (directory,) = [path for path in self.storage.iterdir() if path.is_dir()]
        return directory

    def image_of(self, disk: str) -> Path:
        return (self.directory / "head" / f"{disk}.img").resolve()

    def tree_of(self, disk: str) -> Path:
        return self.image_of(disk).with_suffix(".tree")

    # --- what must be true ---

    def restores_exactly(self, number: int) -> bool:
        """Whether a point can be restored; if it can, it is what the machine was, or this fails."""
        self.restores += 1
        target = self.root / f"restored-{self.restores}"
        try:
            with self.reader().open_point(number) as point:
                files = restore_point(self.fs, point, target, "raw")
        except ReplicaError:
            return False
        for disk, path in files.items():
            found = np.fromfile(path, np.uint8)
            assert np.array_equal(found, self.copies[number][disk]), f"point {number} was restored wrong: disk {disk}"
            path.unlink()
        return True

    def check_listed(self) -> dict[int, bool]:
        """Point -> listed as restorable. What can be read of it is exact."""
        listed = {info.state.point: info.restorable for info in self.reader().points()}
        for number in listed:
            self.restores_exactly(number)
        return listed


def flip(path: Path, offset: int, length: int = 1) -> None:
    """Other bytes there, as a failing disk leaves them: the file keeps its size and its times do not matter."""
    with path.open("r+b") as file:
        file.seek(offset)
        data = bytes(byte ^ 0x5A for byte in file.read(length).ljust(length, b"\0"))
        file.seek(offset)
        file.write(data)


__all__ = ["LEAF", "DamageLab", "KiB", "MiB", "flip"]
