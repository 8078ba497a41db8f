"""The digests of one disk: what its grains were at one state, which state that was, and proof of both.

    digests   u64 per grain                 keyed XXH3-64 of its content, 0 where it is all zero
    windows   16 bytes                      the delta id of the state that all this describes; nil while it is changed
              u64 per window of 4 MiB       `window_hash` of the window's digests

Nothing else would notice if a file lost data and kept its size: a hole reads
as grains of zeros, and what the guest zeroed meanwhile would never be shipped.
So a scan checks every window it looks at against its hash, and every window
that it passes over as zeros must have the hash of zeros. And the id tells the
digests of one state from those of another, where two backups were mixed.

No place in either file depends on the disk's size, and a window's hash does not
see digests of zero at its end: a disk that grows is two files that grow, by
zeros; of one that shrinks both are cut, and one window gets another hash.

The hashes are read in pieces of 64 KiB (32 GiB of disk), so memory stays flat.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Self
from uuid import UUID

import numpy as np
import xxhash
from numpy.typing import NDArray

from replica.durable import File, FileSystem
from replica.errors import TrackerDamageError
from replica.model import EMPTY_DELTA_ID, DeltaId, Disk
from replica.tracking.journal import WINDOW_BYTES, grains_per_window

NAMES = ("digests", "windows")
_PIECE_WINDOWS = 8192
_ID_BYTES = 16

Digests = NDArray[np.uint64]


def window_hash(digests: Digests) -> int:
    """XXH3-64 of a window's digests (little-endian) up to the last that is not 0, never 0; 0 if all of them are."""
    used = np.flatnonzero(digests)
    return (xxhash.xxh3_64_intdigest(digests[: int(used[-1]) + 1].data) or 1) if len(used) else 0


def count_windows(disk: Disk) -> int:
    return -(-disk.size_bytes // WINDOW_BYTES)


class DigestTable:
    """Both files of one disk, open. `disk` is the disk that they are of, in the size they have. For one thread."""

    def __init__(self, disk: Disk, digests: File, windows: File) -> None:
        self.disk = disk
        self._digests, self._windows = digests, windows
        self._per_window = grains_per_window(disk)
        self._first = 0
        self._piece = np.zeros(0, "<u8")

    @classmethod
    def open(cls, fs: FileSystem, directory: Path, disk: Disk, *, write: bool = False) -> DigestTable | None:
        """The table in a disk's directory; None unless both files are there."""
        if not all(fs.exists(directory / name) for name in NAMES):
            return None
        with ExitStack() as undo:
            files = [undo.enter_context(fs.open(directory / name, write=write)) for name in NAMES]
            undo.pop_all()
        return cls(disk, *files)

    @classmethod
    def start(cls, fs: FileSystem, directory: Path, disk: Disk) -> DigestTable:
        """A table that says that all is zero, and is nobody's: made anew, whatever was there."""
        with ExitStack() as undo:
            files = []
            for name in reversed(NAMES):  # the id first
                path = directory / name
                there = fs.exists(path)
                file = undo.enter_context(fs.open(path, write=True) if there else fs.create(path, private=True))
                file.truncate(0)
                files.append(file)
            undo.pop_all()
        table = cls(disk, *reversed(files))
        table.resize(disk)
        return table

    @property
    def fits(self) -> bool:
        """Whether both files have the sizes that the disk's size asks for."""
        return self._digests.size() == self.disk.count_grains * 8 and self._windows.size() == _windows_bytes(self.disk)

    def resize(self, disk: Disk) -> None:
        """The table of a disk of another size: what is new is zero. Of a cut window the hash is the caller's to write.

        Idempotent: it does not ask which sizes the files have.
        """
        self._windows.truncate(_windows_bytes(disk))
        self._digests.truncate(disk.count_grains * 8)
        self.disk, self._piece = disk, self._piece[:0]

    def read_id(self) -> DeltaId:
        """The state that the table describes; nil for none."""
        data = self._windows.read(0, _ID_BYTES)
        return DeltaId(UUID(bytes=data)) if len(data) == _ID_BYTES else EMPTY_DELTA_ID

    def write_id(self, delta_id: DeltaId) -> None:
        """The caller syncs."""
        self._windows.write(0, delta_id.bytes)

    def read(self, window: int, digests: Digests) -> None:
        """Fill `digests` with the window's, from its first grain on; beyond the disk's end they are zero."""
        digests[self._digests.read_into(window * self._per_window * 8, digests.data) // 8 :] = 0

    def window(self, window: int) -> Digests:
        """All the digests of a window that is inside the disk."""
        digests = np.zeros(min(self._per_window, self.disk.count_grains - window * self._per_window), "<u8")
        self.read(window, digests)
        return digests

    def write(self, window: int, digests: Digests) -> None:
        """Store all the digests of a window, and their hash; zeros become a hole. What `check` sees is undefined."""
        offset = window * self._per_window * 8
        if digests.any():
            self._digests.write(offset, digests.data)
        else:
            self._digests.zero(offset, digests.nbytes)
        self._windows.write(_ID_BYTES + window * 8, window_hash(digests).to_bytes(8, "little"))

    def check(self, window: int, digests: Digests) -> None:
        """Raise TrackerDamageError unless these are the digests that were stored for `window`.

        Windows come in ascending order, here and in `check_zero`; one behind the disk's end is all zero.
        """
        stored = 0
        if window < count_windows(self.disk):
            self._load(window)
            stored = int(self._piece[window - self._first])
        if stored != window_hash(digests):
            start = window * self._per_window
            raise self.damaged(f"the digests from grain {start} on are not those that were stored")

    def check_zero(self, start: int, stop: int) -> None:
        """Raise TrackerDamageError unless the windows from `start` to `stop` were stored as all zero."""
        stop = min(stop, count_windows(self.disk))
        while start < stop:
            self._load(start)
            end = min(stop, self._first + len(self._piece))
            if self._piece[start - self._first : end - self._first].any():
                raise self.damaged("digests that were stored are gone")
            start = end

    def runs(self, stop_window: int) -> Iterator[tuple[int, int]]:
        """Ascending half-open ranges of grains, below that window: every grain outside of them was zero."""
        stop = min(stop_window * self._per_window, self.disk.count_grains)
        for start, length in self._digests.data_runs(0, stop * 8):
            yield start // 8, -(-(start + length) // 8)

    def sync(self) -> None:
        self._digests.sync()
        self._windows.sync()

    def damaged(self, why: str) -> TrackerDamageError:
        return TrackerDamageError(
            f"what is known of disk {self.disk.name!r} is damaged: {why} ({self._digests.path.parent})"
        )

    def close(self) -> None:
        self._digests.close()
        self._windows.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _load(self, window: int) -> None:
        if self._first <= window < self._first + len(self._piece):
            return
        self._first = window - window % _PIECE_WINDOWS
        self._piece = np.zeros(min(_PIECE_WINDOWS, count_windows(self.disk) - self._first), "<u8")
        self._windows.read_into(_ID_BYTES + self._first * 8, self._piece.data)


def _windows_bytes(disk: Disk) -> int:
    return _ID_BYTES + count_windows(disk) * 8
