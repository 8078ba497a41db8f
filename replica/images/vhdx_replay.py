"""A VHDX file as it is after its log was replayed: the file is read, never written.

[MS-VHDX] §2.3.3 and its note 5: where the file is not to be written, the log is
replayed in memory before anything else is read. The updates become a map of the
file, ascending and disjoint, later ones over earlier ones; a read takes the file's
bytes and lays over them what the map has for the place. Data stay in the log and
are read from there, so that memory holds places only.

A file that the log makes longer ends in zeros.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from replica.images.image import writable_bytes
from replica.images.source import Source
from replica.images.vhdx_log import SECTOR, Updates

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from replica.images.image import Bytes

    Offsets = np.ndarray[tuple[int], np.dtype[np.int64]]


class ReplayedSource(Source):
    """The file under an image, as its log leaves it. Thread-safe. Closing it closes the file."""

    def __init__(self, source: Source, updates: Updates) -> None:
        super().__init__(source._file, source.path, updates.file_bytes, source.sector_bytes, device=source.device)
        self._source = source
        self._updates = updates
        self._starts, self._stops, self._rows = _disjoint(updates)

    def read_into(self, offset: int, buffer: Buffer) -> None:
        target = writable_bytes(buffer)
        stop = offset + len(target)
        there = len(target) if stop > self.size_bytes else max(0, min(stop, self._source.size_bytes) - offset)
        self._source.read_into(offset, target[:there].data)
        target[there:] = 0
        first = int(np.searchsorted(self._stops, offset, "right"))
        last = int(np.searchsorted(self._starts, stop, "left"))
        for index in range(first, last):
            start, end = max(offset, int(self._starts[index])), min(stop, int(self._stops[index]))
            self._update(int(self._rows[index]), start, target[start - offset : end - offset])

    def next_data(self, offset: int) -> int:
        """As of the file; what the log writes is data."""
        data = super().next_data(offset)
        index = int(np.searchsorted(self._stops, offset, "right"))
        return min(data, max(offset, int(self._starts[index]))) if index < len(self._starts) else data

    def next_hole(self, offset: int) -> int:
        """As of the file; the end of what the log writes, where that is asked for."""
        index = int(np.searchsorted(self._stops, offset, "right"))
        if index < len(self._starts) and self._starts[index] <= offset:
            return int(self._stops[index])
        return super().next_hole(offset)

    def _update(self, row: int, start: int, part: Bytes) -> None:
        """Fill `part`, which lies at byte `start` of the file and inside this update."""
        place = int(self._updates.place[row])
        if place < 0:
            part[:] = 0
            return
        sector = bytearray(self._source.read(place, SECTOR))
        sector[:8] = int(self._updates.leading[row]).to_bytes(8, "little")
        sector[-4:] = int(self._updates.trailing[row]).to_bytes(4, "little")
        within = start - int(self._updates.offset[row])
        part[:] = np.frombuffer(sector, dtype=np.uint8)[within : within + len(part)]


def _disjoint(updates: Updates) -> tuple[Offsets, Offsets, Offsets]:
    """(starts, stops, rows): ascending pieces of the file, and the last update that wrote each.

    The updates cut the file into cells. From the last update to the first, each
    takes the cells that nobody has yet; `free` leads from a cell to the next such one.
    """
    starts, stops = updates.offset, updates.offset + updates.length
    bounds = np.unique(np.concatenate([starts, stops]))
    left = np.searchsorted(bounds, starts).tolist()
    right = np.searchsorted(bounds, stops).tolist()
    owner = np.full(len(bounds), -1, dtype=np.int64)
    free = list(range(len(bounds) + 1))
    for row in range(len(left) - 1, -1, -1):
        cell = _find(free, left[row])
        while cell < right[row]:
            owner[cell] = row
            free[cell] = cell + 1
            cell = _find(free, cell + 1)
    cells = np.flatnonzero(owner >= 0)
    return bounds[cells], bounds[cells + 1], owner[cells]


def _find(free: list[int], cell: int) -> int:
    """The first free cell at or after `cell`; halves the way for the next who asks."""
    while free[cell] != cell:
        free[cell] = free[free[cell]]
        cell = free[cell]
    return cell
