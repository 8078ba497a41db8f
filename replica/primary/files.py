"""The machine's small configuration files, read at the same instant as its disks.

They become the content of one more disk (`machine_files`), held in memory: at
most 8 MiB. Nothing freezes these files, whatever froze the guest. So each is
proven to have stood still while it was read; and where the instant of the disks
is a proof of the same kind, they are looked at once more when that is over.

A file that is missing or too large stops the cycle and is named: a point that
silently lacks the machine's definition is found out on the day of the disaster.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from replica import machine_files
from replica.durable import FileSystem
from replica.errors import ConfigError, ImageError, StorageError
from replica.images.image import check_range, writable_bytes
from replica.machine_files import FILES_DISK_BYTES, FILES_DISK_NAME, MAX_FILE_BYTES
from replica.model import SECTOR_BYTES
from replica.tracking.still import StandStill, take_stamp

if TYPE_CHECKING:
    from typing_extensions import Buffer


_HINT = "put it back, or take it out of `files` in the configuration"


def archive_path(path: Path) -> str:
    """Under which path a file is restored: its own without the leading slash. Raises ValueError."""
    return machine_files.check_path("/".join(path.absolute().parts[1:]))


class FilesImage:
    """Implements `images.Image`: the archive of the files, zeros behind it. Thread-safe for reading."""

    format, path, files = "raw", Path(FILES_DISK_NAME), ()
    size_bytes, sector_bytes = FILES_DISK_BYTES, SECTOR_BYTES

    def __init__(self, fs: FileSystem, files: Sequence[Path], *, running: bool = False) -> None:
        """Read them. ImageError (missing, too large), SourceBusyError (being written), ConfigError (a bad path).

        `running`: they may be written meanwhile.
        """
        self._still: StandStill | None = None
        try:
            if not running:
                self._still = StandStill(fs, {str(path): path for path in files})
            for path in files:
                take_stamp(fs, path)  # names what is no file: reading a named pipe would wait for ever
        except ImageError as error:
            raise ImageError(f"one of the machine's files cannot be read: {error.message}", hint=_HINT) from error
        content = {}
        for path in files:
            try:
                content[archive_path(path)] = fs.read_bytes(path, MAX_FILE_BYTES)
            except ValueError as error:
                raise ConfigError(str(error), hint="name another file in `files`") from error
            except StorageError as error:
                raise ImageError(f"one of the machine's files cannot be read: {error.message}", hint=_HINT) from error
        try:
            self._data = np.frombuffer(machine_files.encode(content), np.uint8)
        except ValueError as error:
            raise ConfigError(f"the machine's files cannot be kept: {error}", hint="name fewer in `files`") from error
        self.check()

    def check(self) -> None:
        """SourceBusyError if one of them has changed since, where that counts."""
        if self._still is not None:
            self._still.check()

    def allocated(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        if start < min(stop, len(self._data)):
            yield start, min(stop, len(self._data))

    def read_into(self, offset: int, buffer: Buffer) -> None:
        view = writable_bytes(buffer)
        check_range(self.path, offset, len(view), self.size_bytes)
        part = self._data[offset : offset + len(view)]
        view[: len(part)] = part
        view[len(part) :] = 0

    def close(self) -> None:
        """Nothing is open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""
