"""Block devices (partitions, LVM volumes, loop devices, whole disks): claimed, and overwritten in place.

A claim is an exclusive open (open(2): O_EXCL without O_CREAT). The kernel grants one
per device, and none while it is mounted, swapped to, or part of an LVM volume group, of
RAID or of another mapping, nor while a partition of it is. While it is held, none of
those can begin. It does not keep out a program that opens the device without one, such
as a hypervisor that runs a machine from it.

    with claim(fs, path):
        ...                       # nobody mounts it meanwhile
"""

from __future__ import annotations

import errno
from pathlib import Path

from replica.durable import File, FileSystem
from replica.errors import ImageError, SourceBusyError, StorageError
from replica.images.in_place import InPlaceWriter
from replica.images.source import Source, image_errors

_USERS = "unmount it, and stop the volume group, array or machine that uses it (`lsblk`, `fuser` show who does)"


def claim(fs: FileSystem, path: Path, *, write: bool = False) -> File:
    """Open a block device exclusively. SourceBusyError if it is in use on this host; ImageError if it is none."""
    with image_errors(path):
        if not path.is_block_device():
            raise ImageError(f"{path} is no block device")
    try:
        return fs.claim(path, write=write)
    except StorageError as error:
        cause = error.__cause__
        number = cause.errno if isinstance(cause, OSError) else None
        if number == errno.EBUSY:
            raise SourceBusyError(f"block device {path} is in use on this host", hint=_USERS) from error
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ImageError(
                f"block device {path} may not be {'written' if write else 'read'}",
                hint="run as root or a member of the device's group, and see that it is not read-only",
            ) from error
        raise


class DeviceTarget:
    """A claimed block device that is overwritten (`in_place.Target`). StorageErrors."""

    def __init__(self, fs: FileSystem, path: Path) -> None:
        self.path = path
        self._file = claim(fs, path, write=True)
        source = Source.open(fs, path)
        self.size_bytes, self._sector_bytes = source.size_bytes, source.sector_bytes
        source.close()

    def write(self, offset: int, data: memoryview) -> None:
        self._file.write(offset, data)

    def zero(self, offset: int, length: int) -> None:
        """Whole sectors by the device (a thin one forgets them), what is around them by hand."""
        stop, sector = offset + length, self._sector_bytes
        first, last = -(-offset // sector) * sector, stop // sector * sector
        if first >= last:
            self._file.write(offset, bytes(length))
            return
        self._file.write(offset, bytes(first - offset))
        self._file.zero(first, last - first)
        self._file.write(last, bytes(stop - last))

    def flush(self) -> None:
        self._file.sync()

    def close(self) -> None:
        self._file.close()


def create_on_device(fs: FileSystem, path: Path, size_bytes: int) -> InPlaceWriter:
    """Overwrite a block device with a disk of that size; what is behind the disk becomes zeros."""
    return InPlaceWriter(DeviceTarget(fs, path), size_bytes)
