"""compose: one delta that does several, in order.

skeleton
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from replica.delta.change import Delta, MemoryDelta
from replica.delta.segment import Segment


def compose_segments(deltas: Sequence[Delta]) -> Iterator[Segment]:
    """Segments of the delta deltas[0].base -> deltas[-1].result. Streaming: one segment per delta in memory."""
    raise NotImplementedError


def compose(*deltas: Delta) -> MemoryDelta:
    """The same in memory; its delta_id is the last one's."""
    raise NotImplementedError
