"""The file `digests` of one disk: what its grains were at one state, which state that was, and proof of both.

    u64 per grain                       keyed XXH3-64 of its content, 0 where it is all zero
    zeros up to a multiple of 4 KiB
    u64 per window of 4 MiB             `window_hash` of the window's digests
    16 bytes                            the delta id of the state that all this describes; nil while it is being changed

Nothing else would notice if the file lost data and kept its size: a hole reads
as grains of zeros, and what the guest zeroed meanwhile would never be shipped.
So a scan checks every window it looks at against its hash, and every window
that it passes over as zeros must have the hash of zeros. And the id tells the
digests of one state from those of another, where two backups were mixed.

The table is read in pieces of 64 KiB (32 GiB of disk), so memory stays flat.
"""

from __future__ import annotations

from uuid import UUID

import numpy as np
import xxhash
from numpy.typing import NDArray

from replica.durable import File
from replica.errors import TrackerDamageError
from replica.model import EMPTY_DELTA_ID, DeltaId, Disk
from replica.tracking.journal import WINDOW_BYTES, grains_per_window

_ALIGN_BYTES = 4096
_PIECE_WINDOWS = 8192
_ID_BYTES = 16

Digests = NDArray[np.uint64]


def window_hash(digests: Digests) -> int:
    """XXH3-64 of a window's digests (little-endian), never 0; 0 if all of them are."""
    return (xxhash.xxh3_64_intdigest(digests.data) or 1) if digests.any() else 0


def count_windows(disk: Disk) -> int:
    return -(-disk.size_bytes // WINDOW_BYTES)


def file_bytes(disk: Disk) -> int:
    """The size of the file."""
    return _table_offset(disk) + count_windows(disk) * 8 + _ID_BYTES


def _table_offset(disk: Disk) -> int:
    return -(-disk.count_grains * 8 // _ALIGN_BYTES) * _ALIGN_BYTES


def damaged(disk: Disk, file: File, why: str) -> TrackerDamageError:
    return TrackerDamageError(f"what is known of disk {disk.name!r} is damaged: {why} ({file.path})")


def read_id(file: File, disk: Disk) -> DeltaId:
    """The state that the file describes; nil for none, also if the file has not the disk's size."""
    if file.size() != file_bytes(disk):
        return EMPTY_DELTA_ID
    return DeltaId(UUID(bytes=file.read(file_bytes(disk) - _ID_BYTES, _ID_BYTES)))


def write_id(file: File, disk: Disk, delta_id: DeltaId) -> None:
    """The caller syncs."""
    file.write(file_bytes(disk) - _ID_BYTES, delta_id.bytes)


class WindowHashes:
    """The hash table, for windows in ascending order. For one thread."""

    def __init__(self, file: File, disk: Disk) -> None:
        self._file, self._disk = file, disk
        self._windows = count_windows(disk)
        self._first = 0
        self._piece = np.zeros(0, "<u8")

    def check(self, window: int, digests: Digests) -> None:
        """Raise TrackerDamageError unless these are the digests that were stored for `window`."""
        self._load(window)
        if int(self._piece[window - self._first]) != window_hash(digests):
            start = window * grains_per_window(self._disk)
            raise damaged(self._disk, self._file, f"the digests from grain {start} on are not those that were stored")

    def check_zero(self, start: int, stop: int) -> None:
        """Raise TrackerDamageError unless the windows from `start` to `stop` were stored as all zero."""
        while start < stop:
            self._load(start)
            end = min(stop, self._first + len(self._piece))
            if self._piece[start - self._first : end - self._first].any():
                raise damaged(self._disk, self._file, "digests that were stored are gone")
            start = end

    def write(self, window: int, digests: Digests) -> None:
        """Store the hash of a window's digests; what `check` sees of it is undefined."""
        self._file.write(_table_offset(self._disk) + window * 8, window_hash(digests).to_bytes(8, "little"))

    def _load(self, window: int) -> None:
        if self._first <= window < self._first + len(self._piece):
            return
        self._first = window - window % _PIECE_WINDOWS
        self._piece = np.zeros(min(_PIECE_WINDOWS, self._windows - self._first), "<u8")
        self._file.read_into(_table_offset(self._disk) + self._first * 8, self._piece.data)
