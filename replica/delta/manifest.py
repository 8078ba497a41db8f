"""The manifest: names everything else in a delta file, so its arrival commits the delta.

    length of the states u32 ‖ states (JSON) ‖ number of segments u32 ‖ a row of 64 bytes per segment

The states are the delta's id, its base and its result, and `lost` where segments
have LOST extents: so a reader knows it without opening one, and where it is not
said such extents are refused. A segment's row says
where its blob lies in the file, which grains of which disk it covers, and the
blob's BLAKE3 digest; its number is the row's index. Since the manifest is
sealed, completeness and order of the segments are authentic.

A manifest stays a numpy table: 64 bytes per 4 MiB, at any disk size.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from replica.delta.change import DiskChange, disk_changes
from replica.delta.header import HEADER_BYTES, MAX_MANIFEST_BYTES
from replica.delta.seal import TAG_BYTES
from replica.delta.segment import MAX_BLOB_BYTES, MIN_BLOB_BYTES, SealedSegment
from replica.errors import FormatError
from replica.model import DIGEST_BYTES, NEVER, DeltaId, Frozen, Stamp, State

SEGMENT_ROW = np.dtype(
    [
        ("disk", "<u4"),
        ("length", "<u4"),
        ("offset", "<u8"),
        ("first", "<u8"),
        ("last", "<u8"),
        ("digest", "u1", (DIGEST_BYTES,)),
    ]
)
MAX_STATES_BYTES = 1 << 20
MAX_SEGMENTS = (MAX_MANIFEST_BYTES - MAX_STATES_BYTES - TAG_BYTES - 8) // SEGMENT_ROW.itemsize

_COUNT = struct.Struct("<I")
_ROW = struct.Struct("<IIQQQ32s")

SegmentRows = npt.NDArray[np.void]


class SegmentEntry(NamedTuple):
    """One segment in the manifest. `last` is inclusive; `digest` is that of the sealed blob."""

    number: int
    disk: int
    offset: int
    length: int
    first: int
    last: int
    digest: bytes

    @classmethod
    def of(cls, sealed: SealedSegment, offset: int) -> SegmentEntry:
        """The entry of a sealed segment that lies at `offset` in the file."""
        return cls(sealed.number, sealed.disk, offset, len(sealed.blob), sealed.first, sealed.last, sealed.digest)


class _States(Frozen, frozen=True, omit_defaults=True):
    delta_id: DeltaId
    base: State
    result: State
    committed: Stamp = NEVER
    lost: bool = False


@dataclass(frozen=True, eq=False)
class Manifest:
    """A decoded manifest. `table` is SEGMENT_ROW[n]; a row's index is its segment's number."""

    delta_id: DeltaId
    base: State
    result: State
    disks: tuple[DiskChange, ...]
    table: SegmentRows
    committed: Stamp = NEVER
    """Of an inverse: when the receiver had committed its result. What a sender says here is not listened to."""
    lost: bool = False

    def entry(self, number: int) -> SegmentEntry:
        disk, length, offset, first, last, digest = self.table[number].item()
        return SegmentEntry(number, disk, offset, length, first, last, bytes(digest))

    def entries(self) -> Iterator[SegmentEntry]:
        """All segments, in number order."""
        return (self.entry(number) for number in range(len(self.table)))


def encode_manifest(
    delta_id: DeltaId,
    base: State,
    result: State,
    entries: Iterable[SegmentEntry],
    committed: Stamp = NEVER,
    *,
    lost: bool = False,
) -> bytes:
    """The plaintext. `entries` come in number order; FormatError if it would be refused by `decode_manifest`."""
    rows = bytearray()
    for index, e in enumerate(entries):
        if e.number != index or index >= MAX_SEGMENTS:
            raise FormatError(f"segment {e.number} of a delta comes at place {index}; at most {MAX_SEGMENTS} can be")
        rows += _ROW.pack(e.disk, e.length, e.offset, e.first, e.last, e.digest)
    table = np.frombuffer(bytes(rows), dtype=SEGMENT_ROW)
    _check_table(table, disk_changes(base, result), "the delta")
    states = msgspec.json.encode(_States(delta_id, base, result, committed, lost))
    return b"".join((_COUNT.pack(len(states)), states, _COUNT.pack(len(table)), rows))


def decode_manifest(data: bytes, name: str = "the delta") -> Manifest:
    """The manifest in `data`. FormatError, naming `name`, unless it is one that `encode_manifest` makes."""
    fixed = 2 * _COUNT.size
    length = _COUNT.unpack_from(data)[0] if len(data) >= fixed else MAX_STATES_BYTES + 1
    if length > min(MAX_STATES_BYTES, len(data) - fixed):
        raise FormatError(f"the manifest of {name} is out of bounds")
    body = data[_COUNT.size : _COUNT.size + length]
    count = _COUNT.unpack_from(data, _COUNT.size + length)[0]
    if count > MAX_SEGMENTS or fixed + length + count * SEGMENT_ROW.itemsize != len(data):
        raise FormatError(f"the manifest of {name} says it has {count} segments, which its length does not fit")
    try:
        states = msgspec.json.decode(body, type=_States)
    except (msgspec.DecodeError, msgspec.ValidationError, ValueError) as error:
        raise FormatError(f"the manifest of {name} is not valid: {error}") from error
    if msgspec.json.encode(states) != body:
        raise FormatError(f"the manifest of {name} is not in the one form it may have")
    table = np.frombuffer(data, dtype=SEGMENT_ROW, offset=fixed + length)
    disks = disk_changes(states.base, states.result)
    _check_table(table, disks, name)
    return Manifest(states.delta_id, states.base, states.result, disks, table, states.committed, states.lost)


def _check_table(table: SegmentRows, disks: tuple[DiskChange, ...], name: str) -> None:
    """FormatError unless the segments cover strictly ascending, disjoint ranges inside the disks."""
    if not len(table):
        return
    if (table["disk"] >= len(disks)).any():
        raise FormatError(f"the manifest of {name} names a disk that it does not list")
    grains = np.array([c.result_grains for c in disks], dtype=np.uint64)
    if (table["first"] > table["last"]).any() or (table["last"] >= grains[table["disk"]]).any():
        raise FormatError(f"the manifest of {name} has a segment outside its disk")
    same = table["disk"][:-1] == table["disk"][1:]
    up = np.where(same, table["last"][:-1] < table["first"][1:], table["disk"][:-1] < table["disk"][1:])
    if not up.all():
        raise FormatError(f"the manifest of {name} has segments that are not ascending")
    if (table["length"] < MIN_BLOB_BYTES).any() or (table["length"] > MAX_BLOB_BYTES).any():
        raise FormatError(f"the manifest of {name} has a segment of an impossible length")


def check_layout(table: SegmentRows, manifest_offset: int, name: str = "the delta") -> None:
    """FormatError unless the segments fill the file from the header to the manifest, in whatever order."""
    order = np.argsort(table["offset"], kind="stable")
    offsets, lengths = table["offset"][order], table["length"][order].astype(np.uint64)
    expected = np.cumsum(np.concatenate((np.array([HEADER_BYTES], dtype=np.uint64), lengths)), dtype=np.uint64)
    if (offsets != expected[:-1]).any() or int(expected[-1]) != manifest_offset:
        raise FormatError(f"the segments of {name} do not fill the file without gaps and overlaps")
