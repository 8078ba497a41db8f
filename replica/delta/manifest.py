"""The manifest: names everything else in a delta file.

skeleton
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from replica.delta.change import DiskChange
from replica.model import DeltaId, State

SEGMENT_ROW = np.dtype(
    [("disk", "<u4"), ("length", "<u4"), ("offset", "<u8"), ("first", "<u8"), ("last", "<u8"), ("digest", "u1", 32)]
)
MAX_MANIFEST_BYTES = 64 << 20
MAX_SEGMENTS = 1_000_000


class SegmentEntry(NamedTuple):
    """One segment in the manifest. `last` is inclusive; `digest` is BLAKE3-256 of the sealed blob."""

    number: int
    disk: int
    offset: int
    length: int
    first: int
    last: int
    digest: bytes


@dataclass(frozen=True, eq=False)
class Manifest:
    """`table` is SEGMENT_ROW[n], the row's index is the segment's number."""

    delta_id: DeltaId
    base: State
    result: State
    disks: tuple[DiskChange, ...]
    table: npt.NDArray[np.void]


def encode_manifest(delta_id: DeltaId, base: State, result: State, entries: Iterable[SegmentEntry]) -> bytes:
    raise NotImplementedError


def decode_manifest(data: bytes, name: str = "delta") -> Manifest:
    raise NotImplementedError
