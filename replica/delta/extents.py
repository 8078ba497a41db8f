"""Extents of one disk as numpy rows: (first grain, count of grains, data 0|1|2).

A *row set* is sorted by `first`, its rows never overlap, every count is at
least one, and rows that touch and are of the same kind are one row
(coalesced). `data` 1 means the grains' content is in the payload that goes
with the rows, one whole grain after the other; 0 means they are all zero; 2,
which only inverses have, that their content is lost: nobody has it any more.

Everything here is pure and vectorised: nothing loops over grains in Python.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from typing_extensions import Buffer

EXTENT = np.dtype([("first", "<u8"), ("count", "<u8"), ("data", "<u8")])
"""24 bytes, no padding: what the native kernels take as u64[3 n]."""

ZERO, DATA, LOST = 0, 1, 2
"""LOST grains had a content that nobody has any more. Only an inverse says so, and it has no payload for them."""

Rows: TypeAlias = npt.NDArray[np.void]
Bytes: TypeAlias = npt.NDArray[np.uint8]


def rows_of(triples: Iterable[tuple[int, int, int]]) -> Rows:
    """Rows from (first, count, data) triples; the caller keeps them sorted."""
    return np.array([tuple(t) for t in triples], dtype=EXTENT)


def empty_rows() -> Rows:
    return np.empty(0, dtype=EXTENT)


def as_bytes(buffer: Buffer) -> Bytes:
    """Any contiguous buffer as u8[n], without a copy."""
    return np.frombuffer(memoryview(buffer), dtype=np.uint8)


def count_data(rows: Rows) -> int:
    """Grains that have a payload."""
    return int(rows["count"][rows["data"] == DATA].sum())


def stop_of(rows: Rows) -> int:
    """First grain after the last row (0 for none)."""
    return int(rows["first"][-1] + rows["count"][-1]) if len(rows) else 0


def rows_of_kinds(first: int, kinds: Bytes) -> Rows:
    """Coalesced rows of consecutive grains: kind 0 is no extent, 1 is ZERO, 2 is DATA, 3 is LOST."""
    if not len(kinds):
        return empty_rows()
    starts = np.flatnonzero(np.concatenate(([True], kinds[1:] != kinds[:-1])))
    counts = np.diff(np.append(starts, len(kinds)))
    return _rows(starts + first, counts, kinds[starts])


def rows_of_grains(grains: npt.NDArray[np.uint64], data: npt.NDArray[np.bool_] | Bytes) -> Rows:
    """Coalesced rows of single grains: ascending indices and what each is (ZERO, DATA or LOST)."""
    if not len(grains):
        return empty_rows()
    breaks = (grains[1:] != grains[:-1] + np.uint64(1)) | (data[1:] != data[:-1])
    starts = np.flatnonzero(np.concatenate(([True], breaks)))
    counts = np.diff(np.append(starts, len(grains)))
    return _rows(grains[starts], counts, data[starts].astype(np.uint8) + 1)


def _rows(first: npt.NDArray[np.integer], count: npt.NDArray[np.integer], kinds: Bytes) -> Rows:
    rows = np.empty(len(first), dtype=EXTENT)
    rows["first"], rows["count"], rows["data"] = first, count, np.maximum(kinds, 1) - 1
    kept: Rows = rows[kinds != 0]
    return kept


def coalesce(rows: Rows) -> Rows:
    """The same extents with touching rows of one kind joined."""
    if len(rows) < 2:
        return rows
    joins = (rows["first"][1:] == rows["first"][:-1] + rows["count"][:-1]) & (rows["data"][1:] == rows["data"][:-1])
    if not joins.any():
        return rows
    starts = np.flatnonzero(np.concatenate(([True], ~joins)))
    joined: Rows = rows[starts].copy()
    joined["count"] = np.add.reduceat(rows["count"], starts)
    return joined


def clip(rows: Rows, first: int, stop: int) -> tuple[Rows, int, int]:
    """The part of `rows` in [first, stop) and where its payload lies: (rows, skipped grains, payload grains)."""
    ends = rows["first"] + rows["count"]
    low = int(np.searchsorted(ends, np.uint64(first), "right"))
    high = int(np.searchsorted(rows["first"], np.uint64(max(stop, first)), "left"))
    if low >= high:
        return empty_rows(), count_data(rows[:low]), 0
    part = rows[low:high].copy()
    skipped = count_data(rows[:low])
    if part["first"][0] < first:
        cut = np.uint64(first) - part["first"][0]
        skipped += int(cut) if part["data"][0] == DATA else 0
        part["first"][0] += cut
        part["count"][0] -= cut
    end = int(part["first"][-1] + part["count"][-1])
    if end > stop:
        part["count"][-1] -= np.uint64(end - stop)
    return part, skipped, count_data(part)


def omit_zero_from(rows: Rows, count_grains: int) -> Rows:
    """Without the ZERO grains at or after `count_grains` (the size of the delta's base)."""
    if stop_of(rows) <= count_grains:
        return rows
    ends = rows["first"] + rows["count"]
    kept: Rows = rows[(rows["data"] != ZERO) | (rows["first"] < count_grains)].copy()
    ends = kept["first"] + kept["count"]
    over = (kept["data"] == ZERO) & (ends > count_grains)
    kept["count"][over] = np.uint64(count_grains) - kept["first"][over]
    return kept


def grains_of(rows: Rows) -> npt.NDArray[np.uint64]:
    """Every grain of the rows, ascending. For bounded row sets only (a few thousand grains)."""
    counts = rows["count"].astype(np.int64)
    total = int(counts.sum())
    skipped = np.concatenate(([0], np.cumsum(counts)[:-1])) if len(counts) else counts
    starts = rows["first"].astype(np.int64) - skipped
    return (np.repeat(starts, counts) + np.arange(total, dtype=np.int64)).astype(np.uint64)
