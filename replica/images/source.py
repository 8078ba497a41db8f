"""The file or block device under an image, opened for reading.

Formats are read through this: it knows the size (a device's is not in its
`stat`), turns every failure into an `ImageError` that names the path, reads
exactly what was asked for, and knows where the file has holes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from replica.durable import File, FileSystem
from replica.errors import ImageError, StorageError
from replica.images.image import ImageFile, coalesce
from replica.model import SECTOR_BYTES

if TYPE_CHECKING:
    from typing_extensions import Buffer

    Grid = np.ndarray[tuple[int, int], np.dtype[np.uint8]]

_BLKSSZGET = 0x1268
"""ioctl of <linux/fs.h>: the logical sector size of a block device, as a C int."""


class Source:
    """Read-only, positioned, exact. Thread-safe."""

    def __init__(self, file: File, path: Path, size_bytes: int, sector_bytes: int, *, device: bool) -> None:
        self._file = file
        self.path = path
        self.size_bytes = size_bytes
        self.sector_bytes = sector_bytes
        self.device = device
        with image_errors(path):
            info = file.stat()
        self.file = ImageFile(path, info.st_dev, info.st_ino)
        self.modified_at = info.st_mtime

    @classmethod
    def open(cls, fs: FileSystem, path: Path) -> Source:
        """Open a regular file or block device; ImageError for anything else, or if it is not there.

        The kind is looked at first: opening a named pipe would wait for ever.
        """
        with image_errors(path):
            mode = fs.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            kind = "a directory" if stat.S_ISDIR(mode) else "neither a file nor a block device"
            raise ImageError(f"image {path} is {kind}", hint="name the disk image itself")
        with image_errors(path):
            file = fs.open(path)
            try:
                device = stat.S_ISBLK(file.stat().st_mode)
                if not device:
                    return cls(file, path, file.size(), SECTOR_BYTES, device=False)
                size = file.seek(0, os.SEEK_END)
                (sector,) = struct.unpack("i", fcntl.ioctl(file.fileno(), _BLKSSZGET, bytes(4)))
                return cls(file, path, size, int(sector), device=True)
            except BaseException:
                file.close()
                raise

    def fileno(self) -> int:
        return self._file.fileno()

    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill all of `buffer`, or ImageError (also when the file ends before)."""
        wanted = memoryview(buffer).nbytes
        try:
            count = self._file.read_into(offset, buffer)
        except StorageError as error:
            raise _image_error(self.path, error) from error
        if count != wanted:
            raise self._cut_short(offset + count, offset, wanted)

    def read_each(self, offsets: Sequence[int], length: int) -> Grid:
        """`length` bytes at each offset, a row for each; ImageError as above. The caller has bounded both."""
        rows = np.empty((len(offsets), length), dtype=np.uint8)
        try:
            count = self._file.read_each(offsets, length, rows.reshape(-1).data)
        except StorageError as error:
            raise _image_error(self.path, error) from error
        if count != len(offsets):
            raise self._cut_short(self._file.size(), offsets[count], length)
        return rows

    def _cut_short(self, end: int, offset: int, length: int) -> ImageError:
        problem = f"image {self.path} ends at byte {end}, {length} bytes at {offset} were to be read"
        return ImageError(problem, hint="it was cut short; put back a whole copy of it")

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes. The caller has bounded `length`."""
        data = bytearray(length)
        self.read_into(offset, data)
        return bytes(data)

    def data_runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Half-open ranges of [start, stop) that are not holes of the file system."""
        return coalesce(DataCursor(self).runs(start, stop))

    def next_data(self, offset: int) -> int:
        """The first byte at or after `offset` that is not in a hole (a huge number: none)."""
        if self.device:
            return offset
        try:
            return self._file.seek(offset, os.SEEK_DATA)
        except OSError as error:
            return sys.maxsize if error.errno == errno.ENXIO else offset

    def next_hole(self, offset: int) -> int:
        """The first byte after data at `offset` that is in a hole (a huge number: none is known)."""
        if self.device:
            return sys.maxsize
        try:
            return self._file.seek(offset, os.SEEK_HOLE)
        except OSError:
            return sys.maxsize

    def close(self) -> None:
        self._file.close()


class DataCursor:
    """Asks the file system for holes, and remembers the last answer.

    Formats map a disk onto pieces of the file, mostly in ascending order.
    Remembering one run of data and one hole makes a walk cost one question per
    run of the file, not one per piece: a file system finds the end of a run by
    walking its extents, so a question per piece of a large file without
    holes would be quadratic. One cursor belongs to one thread and one walk.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._data = (0, 0)
        self._hole = (0, 0)

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Half-open ranges of [start, stop) that are not holes."""
        while start < stop:
            if self._data[0] <= start < self._data[1]:
                yield start, min(stop, self._data[1])
                start = self._data[1]
            elif self._hole[0] <= start < self._hole[1]:
                start = self._hole[1]
            elif (begin := self._source.next_data(start)) > start:
                self._hole = (start, begin)
            else:
                self._data = (start, max(start + 1, self._source.next_hole(start)))


@contextmanager
def image_errors(path: Path) -> Iterator[None]:
    """The source belongs to the user, not to the engine's storage: its failures are ImageErrors."""
    try:
        yield
    except (OSError, StorageError) as error:
        raise _image_error(path, error) from error


def _image_error(path: Path, error: OSError | StorageError) -> ImageError:
    cause = error.__cause__ if isinstance(error, StorageError) else error
    if isinstance(cause, FileNotFoundError):
        return ImageError(f"image {path} is not there", hint="put it back, or correct the path in the configuration")
    what = cause.strerror or cause if isinstance(cause, OSError) else error
    return ImageError(f"cannot read image {path}: {what}")
