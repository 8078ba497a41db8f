"""Proof that files stood still: what makes an instant where nothing can freeze.

If device, inode, size, mtime and ctime of a file are the same before the first
and after the last read, nobody wrote to it in between, provided that its stamps
were old enough at the start: a kernel stamps with the time of its last timer
tick, so a write just after the first look could leave the same stamps. 20 ms
is more than two ticks of the slowest kernels (100 Hz). The ctime cannot be set
by anyone, so it catches what a `touch` would hide.

Writes through a shared memory mapping are stamped late, or not until they are
synced; sources that are written so need a freeze. Block devices carry no
stamps at all and are refused.
"""

from __future__ import annotations

import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from replica.errors import ImageError, SourceBusyError

SETTLED_NS = 20_000_000
WAIT_SECONDS = 2.0
_HINT = "stop what writes to it, or configure `freeze` and `thaw` commands for the machine"


class Stamp(NamedTuple):
    """What cannot stay the same when a file is written, replaced or resized."""

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int

    def settled(self, now_ns: int) -> bool:
        """Both stamps are old enough that any write from now on must change them.

        An mtime in the future was set by hand; a write would still change it.
        """
        return now_ns - self.ctime_ns >= SETTLED_NS and not 0 <= now_ns - self.mtime_ns < SETTLED_NS


def take_stamp(path: Path) -> Stamp:
    """The file's stamp. ImageError if it is not there, SourceBusyError if it has none (block devices)."""
    try:
        info = path.stat()
    except OSError as error:
        raise ImageError(
            f"image {path} cannot be read: {error.strerror}", hint="correct the path in the configuration"
        ) from error
    if stat.S_ISBLK(info.st_mode):
        raise SourceBusyError(
            f"{path} is a block device: whether it stands still cannot be shown",
            hint="configure `freeze` and `thaw` commands for the machine",
        )
    if not stat.S_ISREG(info.st_mode):
        raise ImageError(f"image {path} is neither a file nor a block device")
    return Stamp(info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)


class StandStill:
    """The stamps of a machine's images, taken before the first read and compared after the last."""

    def __init__(
        self,
        paths: Mapping[str, Path],
        *,
        clock_ns: Callable[[], int] = time.time_ns,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Wait up to two seconds for stamps to settle; SourceBusyError naming the image if they do not."""
        deadline_ns = clock_ns() + int(WAIT_SECONDS * 1e9)
        while True:
            self._stamps = {path: take_stamp(path) for path in paths.values()}
            now_ns = clock_ns()
            unsettled = [path for path, stamp in self._stamps.items() if not stamp.settled(now_ns)]
            if not unsettled:
                return
            if now_ns >= deadline_ns:
                raise SourceBusyError(f"image {unsettled[0]} is being written: it was changed just now", hint=_HINT)
            sleep(SETTLED_NS / 1e9)

    def check(self) -> None:
        """Raise SourceBusyError naming the first image that changed since."""
        for path, before in self._stamps.items():
            try:
                after: Stamp | None = take_stamp(path)
            except ImageError:
                after = None
            if after != before:
                what = "vanished or was replaced" if after is None or after[:2] != before[:2] else "was written"
                raise SourceBusyError(f"image {path} {what} while it was read: no point was made", hint=_HINT)
