"""A delta file of version 1, frozen: it opens, and means what it meant."""

from __future__ import annotations

import json
from pathlib import Path
from uuid import UUID

import msgspec
import pytest

from replica.delta import DataKey, DeltaFileReader, MemoryDelta, MemoryKeys, decode_header
from replica.durable import FileSystem
from replica.errors import FormatError
from replica.model import KeyId
from tests.vectors.make_delta_v1 import describe, vector

HERE = Path(__file__).parent
FILE = HERE / "delta-v1.rpldelta"
EXPECTED = json.loads((HERE / "delta-v1.json").read_text())
KEY = DataKey(KeyId(UUID(EXPECTED["key"]["id"])), bytes.fromhex(EXPECTED["key"]["secret"]))


def test_still_opens(fs: FileSystem) -> None:
    with DeltaFileReader(fs.open(FILE), MemoryKeys(KEY)) as reader:
        reader.verify()
        found = describe(MemoryDelta.of(reader))
        flags = {int(flag) for number in range(len(reader)) for flag in reader.table(number).chunks["flags"]}
    assert json.loads(msgspec.json.encode(found)) == EXPECTED
    assert flags == {0, 1}, "the vector has stored and compressed chunks"


def test_the_header_still_has_its_bytes() -> None:
    raw = FILE.read_bytes()[:160]
    assert decode_header(raw).raw == raw
    assert raw[:8] == b"RPLDELT1"


def test_diff_still_makes_it() -> None:
    """Canonical form, segment cuts and Merkle roots are part of the format."""
    assert json.loads(msgspec.json.encode(describe(vector()))) == EXPECTED


@pytest.mark.parametrize("place", [7, 8, 12], ids=["version", "flags", "header length"])
def test_another_version_is_refused(place: int) -> None:
    raw = bytearray(FILE.read_bytes()[:160])
    raw[place] += 1
    with pytest.raises(FormatError):
        decode_header(raw)
