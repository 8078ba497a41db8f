"""A file system whose power goes: from the step that is due on nothing that would change the disk happens any more.

A step is a write, a change of size, a sync, a name given or taken, a lock. The write that is due is torn.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from replica.durable import File, FileSystem, Lock
from replica.errors import StorageError


def off() -> StorageError:
    return StorageError("the power is off")


class Power:
    """Counts the steps; the one behind `due` fails with what `error` makes, and so does everything after it."""

    def __init__(self, due: int | None = None, error: Callable[[], BaseException] = off) -> None:
        self.steps, self.due, self.error = 0, due, error

    def step(self, torn: Callable[[], None] = lambda: None) -> None:
        """`torn`: what is left of this step if it is the one."""
        self.steps += 1
        if self.due is not None and self.steps > self.due:
            if self.steps == self.due + 1:
                torn()
            raise self.error()


class CutFile(File):
    def __init__(self, file: File, power: Power) -> None:
        super().__init__(file.fileno(), file.path)
        self.power = power

    def write(self, offset: int, data: Any) -> None:
        view = memoryview(data).cast("B")
        write = super().write
        self.power.step(torn=lambda: write(offset, view[: len(view) // 2]))
        write(offset, view)

    def truncate(self, size_bytes: int) -> None:
        self.power.step()
        super().truncate(size_bytes)

    def zero(self, offset: int, length: int) -> None:
        self.power.step()
        super().zero(offset, length)

    def sync(self) -> None:
        self.power.step()
        super().sync()


class CutFileSystem(FileSystem):
    """The real file system until the power goes."""

    def __init__(self, power: Power) -> None:
        self.power = power

    def open(self, path: Path, *, write: bool = False) -> File:
        return CutFile(super().open(path, write=write), self.power)

    def create(self, path: Path, *, private: bool = False) -> File:
        self.power.step()
        return CutFile(super().create(path, private=private), self.power)

    def publish(self, temporary: Path, final: Path) -> None:
        self.power.step()
        super().publish(temporary, final)

    def sync_directory(self, path: Path) -> None:
        self.power.step()
        super().sync_directory(path)

    def make_directory(self, path: Path, *, private: bool = False) -> None:
        self.power.step()
        super().make_directory(path, private=private)

    def unlink(self, path: Path) -> None:
        self.power.step()
        super().unlink(path)

    def lock(self, path: Path, *, shared: bool = False, wait: bool = False, busy: str = "") -> Lock:
        self.power.step()
        return super().lock(path, shared=shared, wait=wait, busy=busy)
