"""The laws hold whatever the limits are. So they are also tried with tiny ones: small machines then have
many segments, and leaves, pieces and windows are cut at awkward places."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

import pytest

TINY_BYTES = 16384
TINY = {
    "pack": {"SEGMENT_RAW_BYTES": TINY_BYTES, "MAX_EXTENTS": 3},
    "change": {"SEGMENT_RAW_BYTES": TINY_BYTES, "MAX_EXTENTS": 3},
    "leaves": {"PIECE_BYTES": TINY_BYTES, "LONG_LEAVES": 1},
    "apply": {"PIECE_BYTES": TINY_BYTES},
    "diff": {"_WINDOW_BYTES": TINY_BYTES},
    "read": {"SCAN_BYTES": TINY_BYTES},
}


@pytest.fixture(autouse=True, scope="package", params=["tiny", "real"])
def limits(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "tiny":
            for module, values in TINY.items():
                for name, value in values.items():
                    patch.setattr(import_module(f"replica.delta.{module}"), name, value)
        yield
