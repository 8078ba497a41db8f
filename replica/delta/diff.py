"""diff: what tracking found, as rows and payload.

skeleton
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from replica.delta.change import MemoryDelta
from replica.delta.extents import Bytes, Rows
from replica.delta.head import Head

if TYPE_CHECKING:
    from typing_extensions import Buffer


def window_rows(
    first_grain: int, window: Buffer, grain_bytes: int, dirty: Bytes | None, zero: Bytes, base_grains: int
) -> tuple[Rows, Bytes]:
    """Rows and payload (a copy) of a window's dirty grains.

    `dirty` and `zero` are u8 masks per grain; the window's last grain may be short (end of the disk) and is
    padded with zeros. ZERO extents at or after `base_grains` are omitted. `dirty` None: nothing is known of the
    base's content, so every grain is covered.
    """
    raise NotImplementedError


def hole_rows(first_grain: int, stop_grain: int, base_grains: int) -> Rows:
    """Rows that say [first, stop) is zero now: what a full covering emits for ranges it did not have to read."""
    raise NotImplementedError


def diff(source: Head, target: Head) -> MemoryDelta:
    """The delta from `source.state` to `target.state`, by comparing every grain. For tests and small heads."""
    raise NotImplementedError
