"""The packer: a stream of rows and payloads becomes segments, always the same ones.

Where a segment ends depends on nothing but the extents and the grains' kinds,
never on how the stream was cut into pieces: so equal deltas have equal
segments, which is what the laws compare. The rule is greedy. A row joins the
open segment, or its last row if it touches it and is of the same kind. DATA
is split where `SEGMENT_RAW_BYTES` is reached, and a segment that is full ends
there. A row that does not fit under `MAX_EXTENTS`, or of another disk, opens
the next segment. ZERO rows are never split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from replica.delta.extents import Rows
from replica.delta.segment import Segment

if TYPE_CHECKING:
    from typing_extensions import Buffer

Sink = Callable[[Segment], None]


class Packer:
    """Feed rows in ascending order (disk by disk), then `flush`. Hands each segment to `sink`. Not thread-safe.

    Keeps references to the payloads until their segment is handed over: a
    caller that reuses its buffers passes copies.
    """

    def __init__(self, sink: Sink) -> None:
        raise NotImplementedError

    def add(self, disk: int, grain_bytes: int, rows: Rows, payload: Buffer) -> None:
        """`rows` start at or after the end of the rows before; `payload` is the DATA grains' content."""
        raise NotImplementedError

    def flush(self) -> None:
        """Hand over the open segment, if any."""
        raise NotImplementedError


def pack(disk: int, grain_bytes: int, stream: Iterable[tuple[Rows, Buffer]]) -> Iterator[Segment]:
    """Segments of one disk (index `disk`) from (rows, payload) pieces in ascending order. Lazy."""
    raise NotImplementedError
