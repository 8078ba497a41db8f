"""What comes off the wire is what was meant, or is refused."""

from __future__ import annotations

from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replica import errors
from replica.errors import BaseMismatchError, ProtocolError, ReplicaError, TransportError
from replica.model import DeltaId, Epoch, KeyId, random_id
from replica.transport import wire
from replica.transport.wire import TAIL_NUMBER, Begin, Enrol, Problem

BLOBS = st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=5)


def body_of(first: int, blobs: list[bytes]) -> bytes:
    offset, parts = 160, []
    for number, blob in enumerate(blobs, first):
        parts += [wire.encode_frame(number, offset, wire.digest_of(blob), blob), blob]
        offset += len(blob)
    return b"".join(parts)


@given(st.integers(0, 2**24), BLOBS)
def test_a_segment_body_comes_apart_as_it_was_put_together(first: int, blobs: list[bytes]) -> None:
    frames = wire.decode_segments(body_of(first, blobs), first)
    assert [bytes(f.blob) for f in frames] == blobs
    assert [f.number for f in frames] == list(range(first, first + len(blobs)))
    assert [f.offset for f in frames] == [160 + sum(map(len, blobs[:n])) for n in range(len(blobs))]


def test_the_frame_is_laid_out_as_documented() -> None:
    digest = bytes(range(32))
    expected = bytes.fromhex("07000000 0002000000000000 03000000") + digest
    assert wire.encode_frame(7, 512, digest, b"abc") == expected
    assert wire.FRAME.size == 48


@given(BLOBS, st.data())
def test_any_flipped_bit_in_a_blob_or_digest_is_found(blobs: list[bytes], data: st.DataObject) -> None:
    body = bytearray(body_of(0, blobs))
    starts = [sum(48 + len(b) for b in blobs[:n]) for n in range(len(blobs))]
    headers = {start + i for start in starts for i in range(16)}
    position = data.draw(st.sampled_from([i for i in range(len(body)) if i not in headers]))
    body[position] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(TransportError):
        wire.decode_segments(body, 0)


@given(BLOBS, st.data())
def test_any_cut_is_refused(blobs: list[bytes], data: st.DataObject) -> None:
    body = body_of(0, blobs)
    whole = {sum(48 + len(b) for b in blobs[:n]) for n in range(1, len(blobs) + 1)}
    length = data.draw(st.sampled_from([n for n in range(len(body)) if n not in whole]))
    with pytest.raises(ProtocolError):
        wire.decode_segments(body[:length], 0)


@pytest.mark.parametrize("first", [1, 3, TAIL_NUMBER])
def test_a_body_whose_first_number_is_not_the_url_s_is_refused(first: int) -> None:
    with pytest.raises(ProtocolError):
        wire.decode_segments(body_of(2, [b"x"]), first)


def test_a_gap_between_numbers_is_refused() -> None:
    with pytest.raises(ProtocolError, match="segment 4 where 3 was to come"):
        wire.decode_segments(body_of(2, [b"x"]) + body_of(4, [b"y"]), 2)


def test_an_empty_frame_is_refused() -> None:
    with pytest.raises(ProtocolError):
        wire.decode_segments(wire.encode_frame(0, 160, wire.digest_of(b""), b""), 0)


def test_a_tail_is_one_marked_frame() -> None:
    tail = wire.encode_frame(TAIL_NUMBER, 99, wire.digest_of(b"tail"), b"tail") + b"tail"
    frame = wire.decode_tail(tail)
    assert (frame.offset, bytes(frame.blob)) == (99, b"tail")
    for wrong in (tail + tail, body_of(0, [b"tail"]), b"", tail[:-1]):
        with pytest.raises(ProtocolError):
            wire.decode_tail(wrong)
    with pytest.raises(TransportError):
        wire.decode_tail(tail[:-1] + b"L")
    with pytest.raises(ProtocolError):
        wire.decode_segments(tail, TAIL_NUMBER)


@pytest.mark.parametrize("kind", sorted(errors.BY_CODE.values(), key=lambda k: k.__name__))
def test_every_error_comes_back_as_its_own_class(kind: type[ReplicaError]) -> None:
    sent = kind("what happened", hint="what to do")
    problem = wire.decode(wire.encode(wire.to_problem(sent)), Problem, "it")
    assert (problem.status, problem.retryable) == (kind.status, kind.retryable)
    back = wire.from_problem(problem)
    assert type(back) is kind
    assert (back.message, back.hint) == ("what happened", "what to do")


def test_a_base_mismatch_carries_the_actual_head() -> None:
    error = BaseMismatchError("no")
    head = DeltaId(random_id())
    assert error.head is None
    back = wire.from_problem(wire.to_problem(BaseMismatchError(error.message, head=head)))
    assert isinstance(back, BaseMismatchError)
    assert back.head == head


@pytest.mark.parametrize(
    ("status", "retryable", "kind"),
    [(503, True, TransportError), (418, False, ProtocolError), (500, False, ReplicaError)],
)
def test_an_error_of_a_later_version_keeps_its_meaning(status: int, retryable: bool, kind: type[ReplicaError]) -> None:
    problem = Problem("urn:replica:error:from-the-future", "New", status, "news", retryable=retryable)
    assert type(wire.from_problem(problem)) is kind


def enrol() -> Enrol:
    return Enrol("web-1", KeyId(random_id()), b"secret-secret-secret-secret-1234", Epoch(0, random_id()))


def test_a_key_is_never_printed() -> None:
    assert "secret" not in repr(enrol()) + str(enrol())


@pytest.mark.parametrize(
    "change",
    [
        {"machine": "../etc"},
        {"machine": ""},
        {"key": "AAAA"},
        {"key_id": "no"},
        {"epoch": {"counter": -1, "holder": str(UUID(int=1))}},
        {"extra": 1},
        {"machine": None},
    ],
)
def test_a_document_out_of_bounds_is_refused(change: dict[str, object]) -> None:
    document = msgspec.json.decode(wire.encode(enrol())) | change
    with pytest.raises(ProtocolError, match="the request is not valid"):
        wire.decode(msgspec.json.encode(document), Enrol, "the request")


def test_what_is_no_json_or_bottomless_is_refused() -> None:
    for data in (b"", b"{", b"\xff", b"[" * 100_000):
        with pytest.raises(ProtocolError):
            wire.decode(data, Enrol, "it")


def test_a_file_header_is_bounded() -> None:
    base, epoch = DeltaId(random_id()), Epoch(0, random_id())
    for header in (b"", bytes(wire.MAX_FILE_HEADER_BYTES + 1)):
        with pytest.raises(ProtocolError):
            wire.decode(msgspec.json.encode({"base": base, "epoch": epoch, "header": header}), Begin, "it")
