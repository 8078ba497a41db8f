"""Encode and decode: a delta survives its file, a file has one form, and nothing that was touched is accepted."""

from __future__ import annotations

import os
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replica.delta import MemoryDelta, SegmentEntry, decode_header, decode_trailer, prepare
from replica.delta.head import MemoryHead
from replica.delta.header import HEADER_BYTES, TRAILER_BYTES
from replica.delta.manifest import encode_manifest
from replica.delta.seal import TAG_BYTES, Kind, Opener
from replica.errors import DamageError
from replica.model import Disk, DiskId
from tests.laws.files import KEYS, encode, open_file
from tests.laws.machines import Contents, content_of, head_of, histories, model_delta

BITS = st.integers(0, (1 << 61) - 1)


def delta_of(history: list[Contents], reported: int = 0) -> MemoryDelta:
    return model_delta(head_of(history[0], 0), head_of(history[1], 1), reported)


def refuse(data: bytes, head: MemoryHead) -> None:
    """Such a file is refused before anything is written: by opening, verifying or preparing it."""
    before = content_of(head)
    with pytest.raises(DamageError), open_file(data) as reader:
        reader.verify()
        prepare(head, reader, lambda segment: None)
    assert content_of(head) == before


@given(histories(), BITS, st.randoms(use_true_random=False))
def test_decode_of_encode_is_the_delta(history: list[Contents], reported: int, random: object) -> None:
    """In whatever order the segments lie in the file."""
    delta = delta_of(history, reported)
    order = list(range(len(delta.parts)))
    random.shuffle(order)  # type: ignore[attr-defined]
    with open_file(encode(delta, order)) as reader:
        reader.verify()
        assert MemoryDelta.of(reader) == delta
        assert [(d, r.tolist()) for d, r in reader.extents()] == [(d, r.tolist()) for d, r in delta.extents()]


@given(histories(), BITS)
def test_what_parses_encodes_to_the_same_bytes(history: list[Contents], reported: int) -> None:
    """Header, trailer, manifest; and with the same salt the whole file."""
    data = encode(delta_of(history, reported))
    header, trailer = decode_header(data[:HEADER_BYTES]), decode_trailer(data[-TRAILER_BYTES:], len(data))
    assert header.raw == data[:HEADER_BYTES]
    assert trailer.raw == data[-TRAILER_BYTES:]
    with open_file(data) as reader:
        sealed = data[trailer.manifest_offset : -TRAILER_BYTES]
        plain = Opener(header, KEYS).open(Kind.MANIFEST, 0, 0, sealed, len(sealed) - TAG_BYTES)
        manifest = reader.manifest
        assert encode_manifest(manifest.delta_id, manifest.base, manifest.result, manifest.entries()) == plain
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "urandom", lambda count: header.salt)
            assert encode(MemoryDelta.of(reader)) == data


@given(histories(), st.data())
def test_a_flipped_bit_is_refused(history: list[Contents], data: st.DataObject) -> None:
    file = bytearray(encode(delta_of(history)))
    for _ in range(10):
        place = data.draw(st.integers(0, len(file) * 8 - 1))
        file[place // 8] ^= 1 << place % 8
        refuse(bytes(file), head_of(history[0], 0))
        file[place // 8] ^= 1 << place % 8


@given(histories(), st.data())
def test_a_cut_or_longer_file_is_refused(history: list[Contents], data: st.DataObject) -> None:
    file = encode(delta_of(history))
    refuse(file[: data.draw(st.integers(0, len(file) - 1))], head_of(history[0], 0))
    refuse(file + data.draw(st.binary(min_size=1, max_size=200)), head_of(history[0], 0))
    start = data.draw(st.integers(0, len(file) - 1))
    stop = data.draw(st.integers(start + 1, len(file)))
    refuse(file[:start] + file[stop:], head_of(history[0], 0))


def entries_of(file: bytes) -> list[SegmentEntry]:
    with open_file(file) as reader:
        return list(reader.manifest.entries())


@given(st.lists(st.integers(1, 9), min_size=2, max_size=4), st.data())
def test_swapped_segments_are_refused(grains: list[int], data: st.DataObject) -> None:
    """Also where both are of the same length."""
    disks = [Disk(DiskId(UUID(int=i + 1)), f"disk-{i}", 512 * n, grain_bytes=512) for i, n in enumerate(grains)]
    before = {disk: bytes(disk.size_bytes) for disk in disks}
    after = {disk: bytes([7]) * disk.size_bytes for disk in disks}
    file = encode(delta_of([before, after]))
    entries = entries_of(file)
    low, high = sorted(data.draw(st.sets(st.integers(0, len(entries) - 1), min_size=2, max_size=2)))
    (_, _, a, m, *_), (_, _, b, n, *_) = entries[low], entries[high]
    refuse(file[:a] + file[b : b + n] + file[a + m : b] + file[a : a + m] + file[b + n :], head_of(before, 0))


@given(histories(), BITS, st.data())
def test_pieces_of_another_file_are_refused(history: list[Contents], reported: int, data: st.DataObject) -> None:
    """The same delta sealed twice: nothing of one opens in the other, be it header, segment, manifest or both last."""
    delta = delta_of(history, reported)
    file, other = encode(delta), encode(delta)
    tail = decode_trailer(file[-TRAILER_BYTES:], len(file)).manifest_offset
    spans = [(0, HEADER_BYTES), (tail, len(file) - TRAILER_BYTES), (tail, len(file))]
    spans += [(e.offset, e.offset + e.length) for e in entries_of(file)]
    start, stop = data.draw(st.sampled_from(spans))
    refuse(file[:start] + other[start:stop] + file[stop:], head_of(history[0], 0))
