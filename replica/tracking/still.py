"""Proof that files stood still: what makes an instant where nothing can freeze.

If device, inode, size, mtime and ctime of a file are the same before the first
and after the last read, nobody wrote to it in between, provided that its stamps
were old enough at the start: a write just after the first look could leave the
same stamps. How old is enough follows from two things. A kernel stamps with the
time of its last timer tick: 20 ms is more than two ticks of the slowest kernels
(100 Hz). And a file system may keep less of the stamp than the kernel gives it:
whole seconds (ext4 with 128-byte inodes, ext3), two seconds (FAT), 10 ms (exFAT).
The stamp itself tells: one of whole seconds is taken for one that two seconds
share, one of whole 10 ms likewise. The ctime cannot be set by anyone, so it
catches what a `touch` would hide.

All this needs a clock that goes forward. A stamp in the future, which a later
write may well be given again, never counts as old; and a clock that was set back
while the file was read spoils the proof.

The proof is of the files that were read: `opened` compares the open image with
the stamp, so a path (or a symbolic link) that names another file for a moment
is noticed. Every look opens the path, because a network file system promises
news from other hosts only then.

The parents of a differencing image are known when it has been opened, and parts
of them have been read by then. They are stamped late, and held to stamps that
were settled before the image was opened: what was written since has younger ones.

Writes through a shared memory mapping are stamped late, or not until they are
synced; sources that are written so need a freeze.

Block devices and NBD exports carry no stamps at all and are refused, unless the
operator vouches for them (`offline = true`): snapshots, or disks of a machine that is
off. A device is then claimed while it is read, so that nobody on this host mounts it.
"""

from __future__ import annotations

import stat
import time
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from replica.durable import FileSystem
from replica.errors import ImageError, SourceBusyError, StorageError
from replica.images.device import claim
from replica.images.image import ImageFile
from replica.images.nbd_uri import is_uri

SETTLED_NS = 20_000_000
WAIT_SECONDS = 4.0
_SECOND_NS, _CENTISECOND_NS = 1_000_000_000, 10_000_000
_NO_STAMPS = (
    "configure `freeze` and `thaw` commands for the machine, or `offline = true` for the disk "
    "if nobody writes to it (a snapshot, or a disk of a machine that is off)"
)
_HINT = "stop what writes to it, or configure `freeze` and `thaw` commands for the machine"


def settling_ns(stamp_ns: int) -> int:
    """How long after `stamp_ns` a write may be given that very stamp, judged by how many digits it has."""
    if stamp_ns % _SECOND_NS == 0:
        return 2 * _SECOND_NS + SETTLED_NS
    if stamp_ns % _CENTISECOND_NS == 0:
        return _CENTISECOND_NS + SETTLED_NS
    return SETTLED_NS


class Stamp(NamedTuple):
    """What cannot stay the same when a file is written, replaced or resized."""

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int

    @property
    def settled_at_ns(self) -> int:
        """From when on any write must change both stamps."""
        return max(self.mtime_ns + settling_ns(self.mtime_ns), self.ctime_ns + settling_ns(self.ctime_ns))


def take_stamp(fs: FileSystem, path: Path) -> Stamp:
    """The file's stamp, from a fresh open. ImageError if it is not there, SourceBusyError if it has no stamps."""
    if is_uri(path):
        raise SourceBusyError(f"{path} is an NBD export: whether it stands still cannot be shown", hint=_NO_STAMPS)
    try:
        _check_kind(path, fs.stat(path).st_mode)  # opening a named pipe would wait for ever
        with fs.open(path) as file:
            info = file.stat()
    except StorageError as error:
        raise ImageError(f"image: {error.message}", hint="correct the path in the configuration") from error
    _check_kind(path, info.st_mode)
    return Stamp(info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)


def _has_stamps(path: Path) -> bool:
    return not is_uri(path) and not path.is_block_device()


def _check_kind(path: Path, mode: int) -> None:
    if stat.S_ISBLK(mode):
        raise SourceBusyError(
            f"{path} is a block device: whether it stands still cannot be shown",
            hint=_NO_STAMPS,
        )
    if not stat.S_ISREG(mode):
        raise ImageError(f"image {path} is neither a file nor a block device")


class StandStill:
    """The stamps of a machine's images, taken before the first read and compared after the last."""

    def __init__(
        self,
        fs: FileSystem,
        paths: Mapping[str, Path],
        *,
        offline: Container[str] = (),
        clock_ns: Callable[[], int] = time.time_ns,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Wait up to four seconds for stamps to settle; SourceBusyError naming the image if they do not.

        `offline`: disks that are vouched for, where their images have no stamps. To be closed if there are any.
        """
        self._claims = ExitStack()
        self._vouched = {disk for disk, path in paths.items() if disk in offline and not _has_stamps(path)}
        paths = {disk: path for disk, path in paths.items() if not self._is_vouched(fs, disk, path)}
        self._fs, self._clock_ns, self._monotonic_ns = fs, clock_ns, monotonic_ns
        wait_ns = int(WAIT_SECONDS * 1e9)
        deadline_ns = clock_ns() + wait_ns
        while True:
            self._clock_ahead_ns = clock_ns() - monotonic_ns()
            self._stamps = {path: take_stamp(fs, path) for path in paths.values()}
            self._by_disk = {disk: (path, self._stamps[path]) for disk, path in paths.items()}
            now_ns = clock_ns()
            stamped = ((path, stamp.settled_at_ns) for path, stamp in self._stamps.items())
            path, settled_ns = max(stamped, key=lambda item: item[1], default=(Path(), 0))
            if settled_ns <= now_ns:
                self._begun_ns = now_ns
                return
            if settled_ns - now_ns > wait_ns:
                raise SourceBusyError(
                    f"image {path} has a time stamp that lies in the future: whether it stands still cannot be shown",
                    hint="correct this host's clock, or `touch` the image",
                )
            if now_ns >= deadline_ns:
                raise SourceBusyError(f"image {path} is being written: it was changed just now", hint=_HINT)
            sleep(min(settled_ns - now_ns, SETTLED_NS) / 1e9)

    def opened(self, disk: str, files: Sequence[ImageFile]) -> None:
        """Raise SourceBusyError unless the file that was opened for `disk` is the one that was stamped.

        `files[1:]`, its parents, belong to the proof from now on.
        """
        image = files[0].path if files else None
        if disk not in self._vouched:
            path, stamp = self._by_disk[disk]
            if files[0][1:] != stamp[:2]:
                raise SourceBusyError(f"image {path} was replaced while it was opened: no point was made", hint=_HINT)
        for file in files[1:]:
            if disk in self._vouched and not _has_stamps(file.path):
                self._claims.enter_context(claim(self._fs, file.path))
                continue
            stamp = take_stamp(self._fs, file.path)
            if file[1:] != stamp[:2] or stamp.settled_at_ns > self._begun_ns:
                raise SourceBusyError(
                    f"image {file.path}, a parent of {image}, was written or replaced just now: no point was made",
                    hint=_HINT,
                )
            self._stamps.setdefault(file.path, stamp)

    def _is_vouched(self, fs: FileSystem, disk: str, path: Path) -> bool:
        """Claim it, too, if it is a device."""
        if disk in self._vouched and not is_uri(path):
            self._claims.enter_context(claim(fs, path))
        return disk in self._vouched

    def close(self) -> None:
        """Let go of devices. Idempotent."""
        self._claims.close()

    def check(self) -> None:
        """Raise SourceBusyError naming the first image that changed since."""
        for path, before in self._stamps.items():
            try:
                after: Stamp | None = take_stamp(self._fs, path)
            except ImageError:
                after = None
            if after != before:
                what = "vanished or was replaced" if after is None or after[:2] != before[:2] else "was written"
                raise SourceBusyError(f"image {path} {what} while it was read: no point was made", hint=_HINT)
        # Asked in this order, a pause between the two readings looks like a step forward, never like one back.
        monotonic_ns = self._monotonic_ns()
        if self._clock_ns() - monotonic_ns < self._clock_ahead_ns - SETTLED_NS // 2:
            raise SourceBusyError(
                "this host's clock was set back while the images were read: no point was made",
                hint="the next cycle tries again; let the clock be slewed, not stepped",
            )
