"""The delta: everything that moves between the sites or is kept is one.

Four operations, each a module: `diff`, `apply`, `compose`, `read`; what they
work on is `change` (the canonical form) and `segment`; what lies on disk and
goes over the wire is `file`, with `header`, `manifest` and `seal`.
"""

from replica.delta.apply import apply, settle, write
from replica.delta.change import Delta, DiskChange, MemoryDelta, disk_changes
from replica.delta.compose import compose, compose_segments
from replica.delta.diff import diff, hole_rows, window_rows
from replica.delta.extents import DATA, EXTENT, LOST, ZERO, Rows, rows_of
from replica.delta.file import DeltaFileReader
from replica.delta.head import Head, MemoryHead
from replica.delta.header import HEADER_BYTES, TRAILER_BYTES, Header, Trailer, decode_header, decode_trailer
from replica.delta.keys import DataKey, Keyring, KeySource, MemoryKeys
from replica.delta.manifest import Manifest, SegmentEntry
from replica.delta.pack import Packer, Sink, pack
from replica.delta.prepare import RottenLeavesError, prepare
from replica.delta.read import ChainReader, Layer
from replica.delta.segment import (
    MAX_EXTENTS,
    SEGMENT_RAW_BYTES,
    SealedSegment,
    Segment,
    Table,
    check_blob,
    open_segment,
    seal_segment,
)
from replica.delta.writer import DeltaSealer, DeltaWriter

__all__ = [
    "DATA",
    "EXTENT",
    "HEADER_BYTES",
    "LOST",
    "MAX_EXTENTS",
    "SEGMENT_RAW_BYTES",
    "TRAILER_BYTES",
    "ZERO",
    "ChainReader",
    "DataKey",
    "Delta",
    "DeltaFileReader",
    "DeltaSealer",
    "DeltaWriter",
    "DiskChange",
    "Head",
    "Header",
    "KeySource",
    "Keyring",
    "Layer",
    "Manifest",
    "MemoryDelta",
    "MemoryHead",
    "MemoryKeys",
    "Packer",
    "RottenLeavesError",
    "Rows",
    "SealedSegment",
    "Segment",
    "SegmentEntry",
    "Sink",
    "Table",
    "Trailer",
    "apply",
    "check_blob",
    "compose",
    "compose_segments",
    "decode_header",
    "decode_trailer",
    "diff",
    "disk_changes",
    "hole_rows",
    "open_segment",
    "pack",
    "prepare",
    "rows_of",
    "seal_segment",
    "settle",
    "window_rows",
    "write",
]
