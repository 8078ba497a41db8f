"""Segments: how they are cut into chunks, and that nothing but what was sealed opens."""

from __future__ import annotations

import os
import random
import struct

import numpy as np
import pytest
import zstandard
from blake3 import blake3

from replica import _native
from replica.delta import (
    MAX_EXTENTS,
    SEGMENT_RAW_BYTES,
    SealedSegment,
    Segment,
    check_blob,
    open_segment,
    rows_of,
    seal_segment,
)
from replica.delta.keys import DataKey, MemoryKeys
from replica.delta.seal import Kind, Opener, Sealer
from replica.delta.segment import CHUNK, MAX_BLOB_BYTES, Table, open_table
from replica.errors import DamageError, FormatError
from replica.model import DeltaId, Epoch, ReplicaId, random_id

KEY = DataKey.generate()
GRAIN = 4096


def sealer() -> Sealer:
    return Sealer(KEY, ReplicaId(random_id()), DeltaId(random_id()), Epoch(1, random_id()))


def opener_of(sealed_by: Sealer) -> Opener:
    return Opener(sealed_by.header, MemoryKeys(KEY))


def data_segment(payload: bytes, disk: int = 0) -> Segment:
    return Segment(disk, rows_of([(5, len(payload) // GRAIN, 1)]), payload)


def table_of(by: Sealer, sealed: SealedSegment) -> Table:
    (length,) = struct.unpack_from("<I", sealed.blob, 4)
    return open_table(opener_of(by), sealed.number, sealed.blob[8 : 8 + length], len(sealed.blob))


def text(count: int) -> bytes:
    generator = random.Random(1)
    return b"".join(b"%d words like these, " % generator.randrange(10**6) for _ in range(count // 20))[:count]


@pytest.mark.parametrize(
    "payload",
    [b"", os.urandom(GRAIN), os.urandom(SEGMENT_RAW_BYTES), b"\x01" * SEGMENT_RAW_BYTES, text(1 << 20),
     text(1 << 18) + os.urandom(1 << 18) + b"\x01" * (1 << 18) + os.urandom(1 << 17)],
    ids=["none", "one grain", "incompressible", "uniform", "text", "mixed"],
)  # fmt: skip
def test_opens_as_it_was(payload: bytes) -> None:
    by = sealer()
    segment = data_segment(payload) if payload else Segment(3, rows_of([(0, 1 << 40, 0)]), b"")
    sealed = seal_segment(by, 0, segment)
    assert open_segment(opener_of(by), 0, sealed.blob, GRAIN) == segment
    assert (sealed.first, sealed.last, sealed.disk) == (segment.first, segment.last, segment.disk)
    assert sealed.digest == blake3(sealed.blob).digest()
    assert len(sealed.blob) <= MAX_BLOB_BYTES
    assert (table_of(by, sealed).chunks["sealed"] <= (32 << 10) + 16).all()
    check_blob(sealed.blob, sealed.digest, 0)


def test_the_worst_segment_is_within_bounds() -> None:
    """As many extents as can be, each as far from the last as can be, and nothing compresses."""
    count = SEGMENT_RAW_BYTES // 512
    rows = np.zeros(MAX_EXTENTS, dtype=rows_of([]).dtype)
    rows["first"] = np.arange(MAX_EXTENTS, dtype=np.uint64) * np.uint64((1 << 48) // MAX_EXTENTS)
    rows["count"] = 1
    rows["data"][:count] = 1
    sealed = seal_segment(sealer(), 0, Segment(0, rows, os.urandom(SEGMENT_RAW_BYTES)))
    assert len(sealed.blob) <= MAX_BLOB_BYTES


def test_chunks_fit_the_data() -> None:
    """Large chunks where data compresses well, small stored ones where it does not."""
    by = sealer()
    uniform = table_of(by, seal_segment(by, 0, data_segment(b"\x01" * (1 << 20))))
    assert uniform.chunks["raw"].max() == 128 << 10
    noise = table_of(by, seal_segment(by, 1, data_segment(os.urandom(1 << 20))))
    assert set(noise.chunks["raw"].tolist()) == {32 << 10}
    assert not noise.chunks["flags"].any()


def test_equal_segments_compress_equally() -> None:
    one, two = sealer(), sealer()
    segment = data_segment(text(1 << 20))
    first, second = (table_of(by, seal_segment(by, 0, segment)).chunks for by in (one, two))
    assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("payload", [os.urandom(2 * GRAIN), text(4 * GRAIN)], ids=["stored", "compressed"])
def test_every_bit_counts(payload: bytes) -> None:
    by = sealer()
    sealed = seal_segment(by, 0, data_segment(payload))
    opener = opener_of(by)
    for place in range(0, len(sealed.blob) * 8, 7):
        blob = bytearray(sealed.blob)
        blob[place // 8] ^= 1 << place % 8
        with pytest.raises(DamageError):
            open_segment(opener, 0, blob, GRAIN)
        with pytest.raises(FormatError):
            check_blob(blob, sealed.digest, 0)


def test_is_bound_to_its_number_and_file() -> None:
    one, two = sealer(), sealer()
    sealed = seal_segment(one, 1, data_segment(os.urandom(GRAIN)))
    renumbered = struct.pack("<I", 0) + sealed.blob[4:]
    for opener, number, blob in [
        (opener_of(one), 0, sealed.blob),
        (opener_of(one), 0, renumbered),
        (opener_of(two), 1, sealed.blob),
    ]:
        with pytest.raises(DamageError):
            open_segment(opener, number, blob, GRAIN)


def test_is_sealed_once() -> None:
    by = sealer()
    seal_segment(by, 0, data_segment(os.urandom(GRAIN)))
    with pytest.raises(AssertionError):
        seal_segment(by, 0, data_segment(os.urandom(GRAIN)))


def forged(by: Sealer, raw_bytes: int, packed: bytes, flags: int = 1, claimed: int | None = None) -> bytes:
    """A blob that somebody with the key made by hand: one chunk, said to be `raw_bytes` long."""
    by.claim_segment(0)
    chunk = by.seal(Kind.CHUNK, 0, 0, packed, raw_bytes, flags)
    rows = rows_of([(0, (claimed or raw_bytes) // GRAIN, 1)])
    head = struct.pack("<III", 0, 1, 1) + np.array([(raw_bytes, flags, len(chunk))], dtype=CHUNK).tobytes()
    table = head + _native.encode_extents(rows.data)
    sealed = by.seal(Kind.TABLE, 0, 0, table, len(table))
    return struct.pack("<II", 0, len(sealed)) + sealed + chunk


def frame(raw: bytes, *, content_size: bool = True) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=content_size).compress(raw)


@pytest.mark.parametrize(
    ("raw_bytes", "packed", "flags"),
    [
        (GRAIN, frame(bytes(64 << 20)), 1),
        (GRAIN, frame(bytes(GRAIN + 1)), 1),
        (GRAIN, frame(bytes(GRAIN - 1)), 1),
        (GRAIN, frame(bytes(GRAIN), content_size=False), 1),
        (GRAIN, frame(bytes(GRAIN)) + b"more", 1),
        (GRAIN, b"no frame", 1),
        (GRAIN, bytes(GRAIN - 1), 0),
        (GRAIN, bytes(GRAIN), 1),
        (GRAIN, bytes(GRAIN), 2),
        (256 << 10, frame(bytes(256 << 10)), 1),
    ],
    ids=["bomb", "one more", "one less", "no size", "trailing", "garbage", "short", "not smaller", "flag", "too large"],
)
def test_a_chunk_that_is_not_what_it_says_is_refused(raw_bytes: int, packed: bytes, flags: int) -> None:
    by = sealer()
    with pytest.raises(FormatError):
        open_segment(opener_of(by), 0, forged(by, raw_bytes, packed, flags), GRAIN)


def test_a_payload_that_is_not_what_the_extents_say_is_refused() -> None:
    by = sealer()
    blob = forged(by, GRAIN, frame(bytes(GRAIN)), claimed=2 * GRAIN)
    with pytest.raises(FormatError, match="payload"):
        open_segment(opener_of(by), 0, blob, GRAIN)
