"""diff: what tracking found becomes rows and payload, ready for the packer.

A tracker reads a disk in windows and marks grains as dirty and as zero;
`window_rows` turns a window into a part of a delta:

    for first_grain, window, dirty, zero in tracker:
        rows, payload = window_rows(first_grain, window, grain_bytes, dirty, zero, base_grains)
        packer.add(disk_index, grain_bytes, rows, payload)

A *full covering* is the same where nothing is known of the base's content (a
sender that lost its state): every grain is an extent, DATA where it is not zero
and ZERO below the base's size where it is. Windows then come with `dirty` None,
and what need not be read because the image says it is a hole is `hole_rows`.

`diff` compares two heads grain by grain: the definition, slow and plain.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from replica import _native
from replica.delta.change import DiskChange, MemoryDelta, disk_changes
from replica.delta.extents import Bytes, Rows, as_bytes, empty_rows, omit_zero_from, rows_of, rows_of_kinds
from replica.delta.head import Head
from replica.delta.pack import Packer
from replica.delta.segment import Segment

if TYPE_CHECKING:
    from typing_extensions import Buffer

_NOTHING, _ZERO, _DATA = 0, 1, 2
_WINDOW_BYTES = 4 << 20


def window_rows(
    first_grain: int, window: Buffer, grain_bytes: int, dirty: Bytes | None, zero: Bytes, base_grains: int
) -> tuple[Rows, memoryview]:
    """Coalesced rows of a window's dirty grains, and a copy of their content.

    `window` begins at `first_grain`; its last grain may be short (the disk's end) and is filled up with zeros.
    `dirty` and `zero` are u8 per grain; `dirty` None means every grain. Zero grains at or after `base_grains` (the
    size of the delta's base) are omitted.
    """
    data = as_bytes(window)
    count = -(-len(data) // grain_bytes)
    kinds = np.where(zero[:count] != 0, np.uint8(_ZERO), np.uint8(_DATA))
    if dirty is not None:
        kinds[dirty[:count] == 0] = _NOTHING
    rows = omit_zero_from(rows_of_kinds(first_grain, kinds), base_grains)
    chosen = np.flatnonzero(kinds == _DATA)
    if not len(chosen):
        return rows, memoryview(b"")
    whole = len(data) // grain_bytes
    payload = np.zeros((len(chosen), grain_bytes), dtype=np.uint8)
    inside = len(chosen) - int(chosen[-1] >= whole)
    np.take(data[: whole * grain_bytes].reshape(whole, grain_bytes), chosen[:inside], axis=0, out=payload[:inside])
    if inside < len(chosen):
        payload[-1, : len(data) - whole * grain_bytes] = data[whole * grain_bytes :]
    return rows, payload.reshape(-1).data


def hole_rows(first_grain: int, stop_grain: int, base_grains: int) -> Rows:
    """Rows that say [first, stop) is all zero now. None of them where the base had nothing."""
    stop = min(stop_grain, base_grains)
    return rows_of([(first_grain, stop - first_grain, 0)]) if first_grain < stop else empty_rows()


def diff(source: Head, target: Head) -> MemoryDelta:
    """The delta from `source.state` to `target.state`, named by the latter: exactly the grains that differ."""
    parts: list[Segment] = []
    packer = Packer(parts.append)
    for index, change in enumerate(disk_changes(source.state, target.state)):
        step = _WINDOW_BYTES // change.grain_bytes
        for first in range(0, change.result_grains, step):
            stop = min(first + step, change.result_grains)
            old = _window(source, change, change.base_bytes, first, stop)
            new = _window(target, change, change.result_bytes, first, stop)
            dirty = (old != new).any(axis=1).astype(np.uint8)
            zero = np.empty(len(new), dtype=np.uint8)
            _native.zeros(new.data, change.grain_bytes, zero.data)
            rows, payload = window_rows(first, new.data, change.grain_bytes, dirty, zero, change.base_grains)
            packer.add(index, change.grain_bytes, rows, payload)
    packer.flush()
    return MemoryDelta(target.state.delta_id, source.state, target.state, tuple(parts))


def _window(
    head: Head, change: DiskChange, size_bytes: int, first: int, stop: int
) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """Grains [first, stop) of the disk, one per row; zeros behind its end."""
    buffer = np.zeros((stop - first, change.grain_bytes), dtype=np.uint8)
    offset = first * change.grain_bytes
    if offset < size_bytes:
        head.read_into(change.disk_id, offset, buffer.reshape(-1)[: size_bytes - offset].data)
    return buffer
