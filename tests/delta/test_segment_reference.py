"""The native segments against the reference: each opens what the other sealed, and nothing that was forged."""

from __future__ import annotations

import itertools
import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replica import _native
from replica.delta import DataKey, MemoryKeys, Segment, open_segment, rows_of, seal_segment
from replica.delta.seal import Opener, Sealer
from replica.delta.segment import SEGMENT_RAW_BYTES
from replica.errors import DamageError, FormatError
from replica.model import DeltaId, Epoch, ReplicaId, random_id
from tests.delta.segment_reference import CHUNK, Reference, cut

KEY = DataKey.generate()
GRAIN = 4096
KINDS = {
    "noise": lambda generator: generator.randbytes(GRAIN),
    "one page": lambda generator: random.Random(1).randbytes(GRAIN),
    "text": lambda generator: b"".join(b"%d words, " % generator.randrange(10**5) for _ in range(GRAIN))[:GRAIN],
    "sixes": lambda generator: bytes(generator.choices(range(64), k=GRAIN)),
    "uniform": lambda generator: bytes([generator.randrange(1, 256)]) * GRAIN,
}


def sealer() -> Sealer:
    return Sealer(KEY, ReplicaId(random_id()), DeltaId(random_id()), Epoch(1, random_id()))


@st.composite
def segments(draw: st.DrawFn) -> Segment:
    """Of runs of one kind each, up to 160 grains and more extents than one."""
    generator = random.Random(draw(st.integers(0, 99)))
    runs = draw(st.lists(st.tuples(st.sampled_from(sorted(KINDS)), st.integers(1, 40)), max_size=4))
    payload = b"".join(KINDS[kind](generator) for kind, count in runs for _ in range(count))
    rows = [(100 * number, count, 1) for number, (_, count) in enumerate(runs)]
    return Segment(draw(st.integers(0, 9)), rows_of([*rows, (1000, draw(st.integers(1, 1 << 40)), 0)]), payload)


@given(segments(), st.integers(0, 1 << 31), st.sampled_from([1, 3, 19, -5]))
@settings(max_examples=60, deadline=None)
def test_the_reference_opens_what_is_sealed(segment: Segment, number: int, level: int) -> None:
    by = sealer()
    sealed = seal_segment(by, number, segment, level)
    found, chunks = Reference.of(by.header, KEY).open_segment(number, sealed.blob)
    assert found == segment
    assert {raw for raw, _ in chunks[:-1]} <= {32 << 10, 64 << 10, 128 << 10}


@given(segments(), st.lists(st.sampled_from([32 << 10, 64 << 10, 128 << 10]), min_size=1), st.sampled_from([1, 9]))
@settings(max_examples=60, deadline=None)
def test_what_the_reference_sealed_opens(segment: Segment, sizes: list[int], level: int) -> None:
    """However the writer cut it."""
    by = sealer()
    chunks = cut(bytes(segment.payload), itertools.cycle(sizes), level)
    blob = Reference.of(by.header, KEY).seal_parts(7, segment, chunks)
    assert open_segment(Opener(by.header, MemoryKeys(KEY)), 7, blob, GRAIN) == segment


@given(segments(), st.integers(0), st.integers(0, 7))
@settings(max_examples=200, deadline=None)
def test_a_flipped_bit_is_refused(segment: Segment, place: int, bit: int) -> None:
    by = sealer()
    blob = bytearray(seal_segment(by, 0, segment).blob)
    blob[place % len(blob)] ^= 1 << bit
    with pytest.raises(DamageError):
        open_segment(Opener(by.header, MemoryKeys(KEY)), 0, blob, GRAIN)


Patch = list[tuple[int, int]]
PATCHES = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 255)), max_size=3)


def patched(data: bytes, patch: Patch, cut_to: int | None) -> bytes:
    out = bytearray(data[:cut_to])
    for place, value in patch:
        out[place % len(out)] ^= value
    return bytes(out)


@given(PATCHES, st.one_of(st.none(), st.integers(1, 300)), st.sampled_from(["text", "sixes", "uniform"]))
@settings(max_examples=300, deadline=None)
def test_a_forged_frame_is_refused_or_has_its_size(patch: Patch, cut_to: int | None, kind: str) -> None:
    """Sealed by somebody with the key: whatever zstd makes of it stays within its room."""
    by = sealer()
    payload = KINDS[kind](random.Random(5)) * 4
    segment = Segment(0, rows_of([(0, 4, 1)]), payload)
    (raw_bytes, flags, frame), *more = cut(payload, [128 << 10], 1)
    assert flags == 1 and not more
    blob = Reference.of(by.header, KEY).seal_parts(0, segment, [(raw_bytes, 1, patched(frame, patch, cut_to))])
    try:
        opened = open_segment(Opener(by.header, MemoryKeys(KEY)), 0, blob, GRAIN)
    except FormatError as error:
        assert "chunk 0 of segment 0 of the delta" in str(error) and (patch or cut_to)
    else:
        assert len(bytes(opened.payload)) == len(payload)


@given(PATCHES, st.one_of(st.none(), st.integers(1, 60)))
@settings(max_examples=300, deadline=None)
def test_a_forged_table_is_refused_or_fits(patch: Patch, cut_to: int | None) -> None:
    by = sealer()
    reference = Reference.of(by.header, KEY)
    body = random.Random(1).randbytes(2 * GRAIN)
    chunk = reference.seal((CHUNK, 0, 0), body, len(body))
    table = struct.pack("<6I", 0, 1, 2, len(body), 0, len(chunk))
    table += _native.encode_extents(rows_of([(3, 2, 1), (9, 300, 0)]))
    blob = reference.seal_table(0, patched(table, patch, cut_to), [chunk])
    try:
        opened = open_segment(Opener(by.header, MemoryKeys(KEY)), 0, blob, GRAIN)
    except DamageError as error:
        assert "segment 0" in str(error) and (patch or cut_to)
    else:
        assert opened.payload == body


@pytest.mark.parametrize("length", [0, 1, 511, 32 << 10, SEGMENT_RAW_BYTES])
def test_what_does_not_shrink_costs_its_seals(length: int) -> None:
    """Noise is stored in chunks of 32 KiB, asked or not."""
    by = sealer()
    payload = random.Random(3).randbytes(length)
    blob, _ = by.cipher.seal_segment(0, 0, rows_of([(0, 1, 1)]), payload, 1)
    found, chunks = Reference.of(by.header, KEY).open_segment(0, blob)
    assert found.payload == payload
    assert chunks == [(min(32 << 10, length - at), 0) for at in range(0, length, 32 << 10)]
