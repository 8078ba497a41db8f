"""Writing qcow2, by qemu-img: a disk is written to a raw scratch file, and qemu-img makes the qcow2 of it.

    base:   qemu-img convert scratch -> file
    child:  an overlay on the scratch file, which `rebase` turns into one on the parent: it takes into the overlay
            what differs between the two, and nothing else
    both:   qemu-img compare scratch, file      is every byte of the file, through its parents, the disk's?

qemu is told every format and looks at no content for it; paths are absolute, so that none can be taken for a protocol.
The scratch file lies beside the new one under a name of the same kind, and holds the disk once more while it is there.
"""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self
from uuid import UUID

from replica.durable import FileSystem
from replica.errors import ImageError, StorageError, StorageFullError
from replica.images.flat import FlatImage
from replica.model import random_id

if TYPE_CHECKING:
    from typing_extensions import Buffer

_TOOL: Final = "qemu-img"
_SHOWN: Final = 500
"""Letters of what qemu-img said that an error shows."""


def require_qemu() -> None:
    """ImageError, with a hint, if qemu-img is not installed."""
    if not any(os.access(Path(folder, _TOOL), os.X_OK) for folder in os.get_exec_path()):
        raise ImageError(
            f"{_TOOL} is not installed, and qcow2 is written by it",
            hint="install qemu-utils, or choose raw, vhd or vhdx",
        )


class Qcow2Writer:
    """A new qcow2, an `ImageWriter`. For one thread. Failures of qemu-img are StorageErrors.

    The file is there, whole, when `sync` returns; `sync` is called once.
    """

    format = "qcow2"

    def __init__(self, fs: FileSystem, path: Path, scratch: FlatImage, parent: Path | None = None) -> None:
        """`scratch` holds what the parent holds, or zeros; it is taken over."""
        self._fs, self._scratch, self._parent = fs, scratch, parent
        self._owns_scratch = True
        self.path, self.size_bytes = path, scratch.size_bytes

    @classmethod
    def create(cls, fs: FileSystem, path: Path, size_bytes: int, unique_id: UUID) -> Qcow2Writer:
        """A new file that reads as zeros; it must not exist. ImageError without qemu-img."""
        require_qemu()
        scratch = path.with_name(f".{random_id()}.{os.urandom(4).hex()}.partial")
        return cls(fs, path, FlatImage.create(fs, scratch, "raw", size_bytes, unique_id))

    def child(self, path: Path) -> Qcow2Writer:
        """A new file on top of this one, which was synced and is not written to any more."""
        self._owns_scratch = False
        return Qcow2Writer(self._fs, path, self._scratch, self.path)

    def write(self, offset: int, data: Buffer) -> None:
        self._scratch.write(offset, data)

    def zero(self, offset: int, length: int) -> None:
        self._scratch.zero(offset, length)

    def sync(self) -> None:
        """Make the file, hold it against what was written, byte by byte, and put it on stable storage."""
        raw, made = self._scratch.path.absolute(), self.path.absolute()
        self._fs.create(made).close()  # with the permissions that everything has here
        if self._parent is None:
            self._run("convert", "-f", "raw", "-O", "qcow2", raw, made)
        else:
            self._run("create", "-f", "qcow2", "-b", raw, "-F", "raw", made)
            self._run("rebase", "-f", "qcow2", "-b", self._parent.absolute(), "-F", "qcow2", made)
        self._run("compare", "-f", "raw", "-F", "qcow2", raw, made)
        self._settle()

    def name_parent(self, name: str) -> None:
        """The parent has got this name, in the same folder. From now on the file says so."""
        self._run("rebase", "-u", "-f", "qcow2", "-b", name, "-F", "qcow2", self.path.absolute())
        self._settle()

    def close(self) -> None:
        """Idempotent. The scratch file goes, unless a child took it over."""
        if self._owns_scratch:
            self._owns_scratch = False
            self._scratch.close()
            with suppress(StorageError):
                self._fs.unlink(self._scratch.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _settle(self) -> None:
        with self._fs.open(self.path, write=True) as file:
            file.sync()

    def _run(self, verb: str, *arguments: str | Path) -> None:
        command = [_TOOL, verb, "-q", *map(str, arguments)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if done.returncode == 0:
            return
        said = (done.stderr or done.stdout).decode(errors="replace").strip()[-_SHOWN:]
        error = StorageFullError if "No space left" in said else StorageError
        raise error(f"{_TOOL} {verb} for {self.path} failed: {said or done.returncode}")
