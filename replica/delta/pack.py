"""The packer: a stream of rows and payloads becomes segments, always the same ones.

Where a segment ends depends on nothing but the extents and their kinds, never
on how the stream was cut into pieces: so equal deltas have equal segments,
which is what the laws compare. The rule is greedy:

- a row joins the last row of the open segment if it touches it and is of its kind;
- DATA is split where the segment holds `SEGMENT_RAW_BYTES`, and the segment ends there;
- a row that would be the segment's (`MAX_EXTENTS` + 1)-th, or is of another disk, opens the next one;
- ZERO rows are never split.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from replica.delta.extents import DATA, Rows, coalesce, count_data, empty_rows, stop_of
from replica.delta.segment import MAX_EXTENTS, SEGMENT_RAW_BYTES, Segment

if TYPE_CHECKING:
    from typing_extensions import Buffer

Sink = Callable[[Segment], None]


def _cut(rows: Rows, limit_grains: int) -> tuple[Rows, Rows] | None:
    """(rows of a segment that ends here, the rest), or None while the segment stays open."""
    head = rows[:MAX_EXTENTS]
    data = np.cumsum(np.where(head["data"] == DATA, head["count"], 0))
    full = int(np.searchsorted(data, limit_grains, "left"))
    if full == len(head):
        return (head, rows[MAX_EXTENTS:]) if len(rows) > MAX_EXTENTS else None
    over = np.uint64(int(data[full]) - limit_grains)
    if not over:
        return rows[: full + 1], rows[full + 1 :]
    done, rest = rows[: full + 1].copy(), rows[full:].copy()
    done["count"][-1] -= over
    rest["first"][0] += rest["count"][0] - over
    rest["count"][0] = over
    return done, rest


class Packer:
    """Feed rows in ascending order, disk by disk, then `flush`. Hands each segment to `sink`. Not thread-safe.

    Keeps the payloads it was given until their segment is handed over: a caller
    that reuses its buffers passes copies.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._disk = -1
        self._grain_bytes = 1
        self._rows = empty_rows()
        self._pieces: deque[memoryview] = deque()

    def add(self, disk: int, grain_bytes: int, rows: Rows, payload: Buffer) -> None:
        """`rows` begin at or after the end of those before; `payload` is the content of their DATA grains."""
        if not len(rows):
            return
        if disk != self._disk:
            self.flush()
            assert disk > self._disk, "disks go in the order of the disk table"
            self._disk, self._grain_bytes = disk, grain_bytes
        view = memoryview(payload).cast("B")
        assert view.nbytes == count_data(rows) * grain_bytes, "the payload is not what the rows say"
        assert not len(self._rows) or int(rows["first"][0]) >= stop_of(self._rows), "rows go up"
        if view.nbytes:
            self._pieces.append(view)
        self._rows = coalesce(np.concatenate((self._rows, rows)))
        while cut := _cut(self._rows, SEGMENT_RAW_BYTES // grain_bytes):
            done, self._rows = cut
            self._emit(done)

    def flush(self) -> None:
        """Hand over the open segment, if there is one."""
        if len(self._rows):
            done, self._rows = self._rows, empty_rows()
            self._emit(done)

    def _emit(self, rows: Rows) -> None:
        parts, wanted = [], count_data(rows) * self._grain_bytes
        while wanted:
            piece = self._pieces.popleft()
            if len(piece) > wanted:
                self._pieces.appendleft(piece[wanted:])
            parts.append(piece[:wanted])
            wanted -= len(parts[-1])
        self._sink(Segment(self._disk, rows, parts[0] if len(parts) == 1 else b"".join(parts)))


def pack(disk: int, grain_bytes: int, stream: Iterable[tuple[Rows, Buffer]]) -> Iterator[Segment]:
    """Segments of one disk (index `disk`) from (rows, payload) pieces in ascending order. Lazy."""
    done: deque[Segment] = deque()
    packer = Packer(done.append)
    for rows, payload in stream:
        packer.add(disk, grain_bytes, rows, payload)
        while done:
            yield done.popleft()
    packer.flush()
    yield from done
