"""The manifest's bounds and its one form."""

from __future__ import annotations

import struct
from typing import Any
from uuid import UUID

import msgspec
import numpy as np
import pytest

from replica.delta import SegmentEntry
from replica.delta.manifest import MAX_SEGMENTS, SEGMENT_ROW, check_layout, decode_manifest, encode_manifest
from replica.delta.segment import MAX_BLOB_BYTES, MIN_BLOB_BYTES
from replica.errors import FormatError
from replica.model import DeltaId, Disk, DiskId
from tests.laws.machines import head_of

A = Disk(DiskId(UUID(int=1)), "a", 1 << 20)
B = Disk(DiskId(UUID(int=2)), "b", 1 << 20)
ID = DeltaId(UUID(int=0xABC))
BASE, RESULT = (head_of({A: bytes(1 << 20), B: bytes(1 << 20)}, i).state for i in (0, 1))
DIGEST = bytes(range(32))


def entry(
    number: int, disk: int = 0, first: int = 0, last: int = 0, length: int = 100, offset: int = 160
) -> SegmentEntry:
    return SegmentEntry(number, disk, offset, length, first, last, DIGEST)


GOOD = [entry(0, 0, 3, 7), entry(1, 0, 8, 255, 200, 260), entry(2, 1, 0, 255, 300, 460)]


def test_decodes_to_what_was_encoded() -> None:
    data = encode_manifest(ID, BASE, RESULT, iter(GOOD))
    manifest = decode_manifest(data)
    assert (manifest.delta_id, manifest.base, manifest.result) == (ID, BASE, RESULT)
    assert list(manifest.entries()) == GOOD
    assert [c.disk_id for c in manifest.disks] == [A.id, B.id]
    assert encode_manifest(ID, BASE, RESULT, manifest.entries()) == data


def test_every_byte_counts_or_is_refused() -> None:
    """It is sealed; but also a manifest made by somebody with the key never decodes to something out of bounds."""
    data = encode_manifest(ID, BASE, RESULT, GOOD)
    for place in range(len(data)):
        touched = bytearray(data)
        touched[place] ^= 0x11
        try:
            manifest = decode_manifest(bytes(touched))
        except FormatError:
            continue
        assert encode_manifest(manifest.delta_id, manifest.base, manifest.result, manifest.entries()) == touched
    for stop in range(len(data)):
        with pytest.raises(FormatError):
            decode_manifest(data[:stop])
    with pytest.raises(FormatError):
        decode_manifest(data + bytes(1))


@pytest.mark.parametrize(
    "entries",
    [
        [entry(1)],
        [entry(0), entry(2, first=1, last=1)],
        [entry(0, disk=2)],
        [entry(0, first=2, last=1)],
        [entry(0, last=256)],
        [entry(0, last=5), entry(1, first=5, last=6)],
        [entry(0, first=5, last=6), entry(1, first=1, last=2)],
        [entry(0, disk=1), entry(1, disk=0, first=9, last=9)],
        [entry(0, length=MIN_BLOB_BYTES - 1)],
        [entry(0, length=MAX_BLOB_BYTES + 1)],
    ],
    ids=["number", "gap", "disk", "empty", "outside", "overlap", "descending", "disks", "short", "long"],
)
def test_entries_that_cannot_be_are_refused_on_both_sides(entries: list[SegmentEntry]) -> None:
    with pytest.raises(FormatError):
        encode_manifest(ID, BASE, RESULT, entries)
    data = encode_manifest(ID, BASE, RESULT, [])
    rows = b"".join(struct.pack("<IIQQQ32s", e.disk, e.length, e.offset, e.first, e.last, e.digest) for e in entries)
    if [e.number for e in entries] == list(range(len(entries))):
        with pytest.raises(FormatError):
            decode_manifest(data[:-4] + struct.pack("<I", len(entries)) + rows)


def with_states(change: dict[str, Any], *, spaces: bool = False) -> bytes:
    data = encode_manifest(ID, BASE, RESULT, [])
    (length,) = struct.unpack_from("<I", data)
    states = msgspec.json.decode(data[4 : 4 + length]) | change
    body = msgspec.json.encode(states)
    body = body.replace(b":", b": ", 1) if spaces else body
    return struct.pack("<I", len(body)) + body + struct.pack("<I", 0)


def test_the_states_have_one_form() -> None:
    assert decode_manifest(with_states({})).delta_id == ID
    for data in (with_states({"more": 1}), with_states({}, spaces=True), with_states({"delta_id": str(ID).upper()})):
        with pytest.raises(FormatError):
            decode_manifest(data)


def test_another_replica_or_geometry_is_refused() -> None:
    other = msgspec.structs.replace(RESULT, replica_id=UUID(int=77))
    coarse = head_of({msgspec.structs.replace(A, grain_bytes=8192): bytes(1 << 20)}, 1).state
    for result in (other, coarse):
        with pytest.raises(FormatError):
            encode_manifest(ID, BASE, result, [])


def test_counts_are_bounded_before_anything_is_allocated() -> None:
    data = encode_manifest(ID, BASE, RESULT, [])
    for count in (1, MAX_SEGMENTS + 1, (1 << 32) - 1):
        with pytest.raises(FormatError):
            decode_manifest(data[:-4] + struct.pack("<I", count))


@pytest.mark.parametrize(
    ("spans", "manifest", "good"),
    [
        ([], 160, True),
        ([], 161, False),
        ([(160, 50), (210, 50)], 260, True),
        ([(210, 50), (160, 50)], 260, True),
        ([(160, 50), (211, 50)], 261, False),
        ([(160, 50), (200, 50)], 250, False),
        ([(160, 50), (160, 50)], 210, False),
        ([(160, 50), (160, 50)], 260, False),
        ([(160, 50), (211, 50)], 260, False),
        ([(160, 50), ((1 << 64) - 50, 100)], 260, False),
        ([(150, 60), (210, 50)], 260, False),
    ],
)
def test_segments_fill_the_file(spans: list[tuple[int, int]], manifest: int, good: bool) -> None:
    table = np.zeros(len(spans), dtype=SEGMENT_ROW)
    for row, (offset, length) in zip(table, spans, strict=True):
        row["offset"], row["length"] = offset, length
    if good:
        check_layout(table, manifest)
    else:
        with pytest.raises(FormatError):
            check_layout(table, manifest)
