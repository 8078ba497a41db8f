"""The first and the last bytes of a delta file."""

from __future__ import annotations

from uuid import UUID

import pytest

from replica.delta import HEADER_BYTES, TRAILER_BYTES, Header, Trailer, decode_header, decode_trailer
from replica.errors import FormatError
from replica.model import DeltaId, Epoch, KeyId, ReplicaId

HEADER = Header(
    ReplicaId(UUID(int=1)), DeltaId(UUID(int=2)), Epoch(3, UUID(int=4)), KeyId(UUID(int=5)), b"s" * 32, b"c" * 32
)


def test_header_lies_as_documented() -> None:
    raw = HEADER.raw
    assert len(raw) == HEADER_BYTES == 160
    assert raw[:16] == b"RPLDELT1" + bytes(4) + (160).to_bytes(4, "little")
    assert raw[16:48] == UUID(int=1).bytes + UUID(int=2).bytes
    assert raw[48:72] == (3).to_bytes(8, "little") + UUID(int=4).bytes
    assert raw[72:88] == UUID(int=5).bytes
    assert raw[88:152] == b"s" * 32 + b"c" * 32
    assert decode_header(raw) == HEADER


def test_header_refuses_every_flipped_bit() -> None:
    for place in range(HEADER_BYTES * 8):
        raw = bytearray(HEADER.raw)
        raw[place // 8] ^= 1 << place % 8
        with pytest.raises(FormatError, match="name.delta"):
            decode_header(raw, "name.delta")


@pytest.mark.parametrize("raw", [b"", HEADER.raw[:-1], HEADER.raw + b"\0"])
def test_header_has_its_length(raw: bytes) -> None:
    with pytest.raises(FormatError):
        decode_header(raw)


def test_trailer_lies_as_documented() -> None:
    raw = Trailer(1000, 500).raw
    assert len(raw) == TRAILER_BYTES == 32
    assert raw[:16] == (1000).to_bytes(8, "little") + (500).to_bytes(4, "little") + bytes(4)
    assert raw[24:] == b"RPLDEND1"
    assert decode_trailer(raw, 1532) == Trailer(1000, 500)


def test_trailer_refuses_every_flipped_bit() -> None:
    for place in range(TRAILER_BYTES * 8):
        raw = bytearray(Trailer(1000, 500).raw)
        raw[place // 8] ^= 1 << place % 8
        with pytest.raises(FormatError):
            decode_trailer(raw, 1532)


@pytest.mark.parametrize(
    ("trailer", "size"),
    [
        (Trailer(1000, 500), 1531),
        (Trailer(1000, 500), 1533),
        (Trailer(159, 500), 691),
        (Trailer(1000, 23), 1055),
        (Trailer(1000, (64 << 20) + 1), 1033 + (64 << 20)),
        (Trailer((1 << 64) - 1, 500), 531),
    ],
)
def test_trailer_fits_the_file(trailer: Trailer, size: int) -> None:
    with pytest.raises(FormatError):
        decode_trailer(trailer.raw, size)
