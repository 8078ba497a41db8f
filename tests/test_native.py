"""_native: the kernels against independent oracles, and what they refuse at the border.

XXH3 with a secret has no other implementation in Python, but XXH3 without a seed *is*
XXH3 with the default secret (for inputs of more than 240 bytes, which grains are), so
that secret ties the kernel to the reference. BLAKE3 is checked in `test_merkle`.
"""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any

import blake3
import numpy as np
import numpy.typing as npt
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from replica import _native

# kSecret of the reference implementation (xxhash.h, XXH3_kSecret), 192 bytes.
DEFAULT_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
U64 = npt.NDArray[np.uint64]


def scan(
    window: bytes, grain: int, old: U64 | None = None, secret: bytes = DEFAULT_SECRET
) -> tuple[tuple[int, int], list[int], list[int]]:
    count = -(-len(window) // grain)
    new, dirty = np.full(count, 7, "<u8"), np.full(count, 7, np.uint8)
    counts = _native.scan(window, grain, secret, old, new, dirty)
    return counts, new.tolist(), dirty.tolist()


def grains(window: bytes, grain: int) -> list[bytes]:
    return [window[i : i + grain].ljust(grain, b"\0") for i in range(0, len(window), grain)]


@pytest.mark.parametrize("grain", [512, 1024, 4096, 65536])
@pytest.mark.parametrize("tail", [0, 1, 200, 511])
def test_scan_is_xxh3_of_every_grain(grain: int, tail: int) -> None:
    window = os.urandom(3 * grain + tail) + bytes(grain)
    wanted = [xxhash.xxh3_64_intdigest(g) if any(g) else 0 for g in grains(window, grain)]
    counts, new, dirty = scan(window, grain)
    assert new == wanted
    assert dirty == [1] * len(wanted)
    assert counts == (len(wanted), wanted.count(0))


def test_the_secret_changes_every_digest() -> None:
    window = os.urandom(8192)
    _, plain, _ = scan(window, 4096)
    for place in (0, 64, 191):
        secret = bytearray(DEFAULT_SECRET)
        secret[place] ^= 1
        _, keyed, _ = scan(window, 4096, secret=bytes(secret))
        assert all(a != b for a, b in zip(plain, keyed, strict=True)), f"byte {place} of the secret does not matter"


@given(data=st.data())
def test_scan_reports_exactly_the_changed_grains(data: st.DataObject) -> None:
    kinds = st.lists(st.sampled_from([b"\0", b"\1", b"\2"]), min_size=1, max_size=20)
    before, after = data.draw(kinds), data.draw(kinds)
    count = min(len(before), len(after))
    cut = data.draw(st.integers(1, 512))
    windows = [b"".join(k * 512 for k in side[:count])[: count * 512 - 512 + cut] for side in (before, after)]
    _, old, _ = scan(windows[0], 512)
    counts, new, dirty = scan(windows[1], 512, np.array(old, "<u8"))
    assert dirty == [int(a != b) for a, b in zip(before[:count], after[:count], strict=True)]
    assert counts == (sum(dirty), after[:count].count(b"\0"))
    assert new == scan(windows[1], 512)[1]


@given(window=st.lists(st.sampled_from([bytes(512), bytes(511) + b"\1", b"\1" + bytes(511)]), max_size=9))
def test_zeros_marks_zero_grains(window: list[bytes]) -> None:
    out = np.full(len(window), 7, np.uint8)
    _native.zeros(b"".join(window), 512, out)
    assert out.tolist() == [int(not any(grain)) for grain in window]


def test_only_selected_leaves_are_written() -> None:
    window = bytes(512) + os.urandom(1000)
    out = np.full((3, 32), 7, np.uint8)
    _native.hash_leaves(window, 512, 9, np.array([1, 0, 1], np.uint8), out)
    assert not out[0].any()
    assert (out[1] == 7).all()
    body = window[1024:].ljust(512, b"\0") + (11).to_bytes(8, "little") + (512).to_bytes(4, "little")
    wanted = blake3.blake3(body, derive_key_context="replica 2026-11 merkle leaf v1").digest()
    assert out[2].tobytes() == wanted


# Extents: tables are lists of (first, count, data), drawn as gaps so that they are valid.

Rows = list[tuple[int, int, int]]


@st.composite
def tables(draw: st.DrawFn, most: int = 1 << 20) -> Rows:
    rows: Rows = []
    end = 0
    for gap, count, data in draw(
        st.lists(st.tuples(st.integers(0, most), st.integers(1, most), st.integers(0, 2)), max_size=12)
    ):
        rows.append((end + gap, count, data))
        end += gap + count
    return rows


def table(rows: Rows) -> npt.NDArray[Any]:
    """As the engine hands it over: a structured array."""
    return np.array(rows, [("first", "<u8"), ("count", "<u8"), ("data", "<u8")])


def naive_varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


@given(rows=tables(most=1 << 58))
def test_encoding_is_two_varints_a_row_or_three_for_lost_ones_and_returns(rows: Rows) -> None:
    wanted, end = b"", 0
    for first, count, data in rows:
        tail = b"\x01" + naive_varint(count) if data == 2 else naive_varint(count << 1 | data)
        wanted += naive_varint(first - end) + tail
        end = first + count
    assert _native.encode_extents(table(rows)) == wanted
    decoded = np.frombuffer(_native.decode_extents(wanted, len(rows)), "<u8").reshape(-1, 3)
    assert decoded.tolist() == [list(row) for row in rows]
    if rows:
        with pytest.raises(ValueError, match="more than"):
            _native.decode_extents(wanted, len(rows) - 1)


@given(encoded=st.one_of(st.binary(max_size=40), st.lists(st.integers(0, 3), max_size=12).map(bytes)))
def test_whatever_decodes_encodes_to_the_same_bytes(encoded: bytes) -> None:
    try:
        rows = _native.decode_extents(encoded, 100)
    except ValueError:
        return
    assert _native.encode_extents(rows) == encoded


@pytest.mark.parametrize(
    "encoded",
    [
        pytest.param(b"\x00", id="half a row"),
        pytest.param(b"\x00\x03\x80", id="a cut varint"),
        pytest.param(b"\x80\x00\x03", id="an overlong gap"),
        pytest.param(b"\x00\x83\x00", id="an overlong count"),
        pytest.param(b"\x00\x00", id="an empty extent"),
        pytest.param(b"\x00\x01", id="a lost extent without its count"),
        pytest.param(b"\x00\x01\x00", id="an empty lost extent"),
        pytest.param(b"\xff" * 9 + b"\x02\x03", id="a gap of 65 bits"),
        pytest.param(b"\xff" * 9 + b"\x01\x03", id="an end of 65 bits"),
        pytest.param(b"\xff" * 50, id="an endless varint"),
    ],
)
def test_other_bytes_are_refused(encoded: bytes) -> None:
    with pytest.raises(ValueError, match="varint|extent"):
        _native.decode_extents(encoded, 100)


@pytest.mark.parametrize(
    "rows", [[(4, 2, 1), (5, 1, 1)], [(4, 2, 1), (0, 1, 1)], [(0, 0, 1)], [(0, 0, 2)], [(0, 1, 3)], [(2**64 - 1, 1, 0)]]
)
def test_other_tables_are_refused(rows: Rows) -> None:
    for action in (_native.encode_extents, lambda t: _native.overlay(t, b""), lambda t: _native.overlay(b"", t)):
        with pytest.raises(ValueError, match="extent"):
            action(table(rows))


def by_grain(rows: Rows, source: int) -> dict[int, tuple[int, int, int | None]]:
    """Grain -> (source, kind, place in its payload or None without one)."""
    found: dict[int, tuple[int, int, int | None]] = {}
    payload = 0
    for first, count, data in rows:
        for i in range(count):
            found[first + i] = (source, data, payload + i if data == 1 else None)
        payload += count if data == 1 else 0
    return found


@given(lower=tables(most=9), upper=tables(most=9))
def test_overlay_lets_the_upper_win_on_every_grain(lower: Rows, upper: Rows) -> None:
    rows = np.frombuffer(_native.overlay(table(lower), table(upper)), "<u8").reshape(-1, 5).tolist()
    found: dict[int, tuple[int, int, int | None]] = {}
    for first, count, data, source, offset in rows:
        assert count > 0
        assert data == 1 or offset == 0
        for i in range(count):
            assert first + i not in found
            found[first + i] = (source, data, offset + i if data == 1 else None)
    assert found == by_grain(lower, 0) | by_grain(upper, 1)
    for a, b in pairwise(rows):
        assert a[0] + a[1] <= b[0], "not ascending"
        goes_on = a[0] + a[1] == b[0] and a[2:4] == b[2:4] and a[4] + a[1] * (a[2] == 1) == b[4]
        assert not goes_on, "one source goes on in two rows"


@given(lower=tables(most=9), upper=tables(most=9))
def test_gather_is_the_payload_of_the_overlay(lower: Rows, upper: Rows) -> None:
    sources = [os.urandom(512 * sum(c for _, c, d in rows if d == 1)) for rows in (lower, upper)]
    pieces = _native.overlay(table(lower), table(upper))
    wanted = b""
    for grain, (source, _kind, place) in sorted((by_grain(lower, 0) | by_grain(upper, 1)).items()):
        if place is not None:
            wanted += sources[source][place * 512 :][:512]
        assert grain >= 0
    assert _native.gather(pieces, sources, 512) == wanted


@pytest.mark.parametrize(
    "row",
    [(0, 3, 1, 0, 0), (0, 1, 1, 0, 2), (0, 1, 1, 1, 0), (0, 2**64 - 1, 1, 0, 1), (0, 2**60, 1, 0, 0), (0, 1, 3, 0, 0)],
)
def test_gather_never_reads_past_a_source(row: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="source|mark"):
        _native.gather(np.array([row], "<u8"), [bytes(1024)], 512)


@given(data=st.binary(max_size=300), cut=st.integers(0, 300))
def test_crc32c_against_its_definition(data: bytes, cut: int) -> None:
    """The reversed Castagnoli polynomial, bit by bit, and the check value of RFC 3720, B.4."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    assert _native.crc32c(data) == crc ^ 0xFFFFFFFF
    assert _native.crc32c(data[cut:], _native.crc32c(data[:cut])) == crc ^ 0xFFFFFFFF
    assert _native.crc32c(bytes(32)) == 0x8A9136AA


# The border: buffers.


def test_buffers_of_wrong_kind_or_size_are_refused() -> None:
    window, new, dirty = bytes(1024), np.zeros(2, "<u8"), np.zeros(2, np.uint8)
    good: list[Any] = [window, 512, DEFAULT_SECRET, None, new, dirty]
    _native.scan(*good)
    bad: list[tuple[int, Any]] = [
        (0, window + b"x"),
        (1, 0),
        (1, 500),
        (1, 1 << 62),
        (2, DEFAULT_SECRET[1:]),
        (3, np.zeros(3, "<u8")),
        (4, np.zeros(1, "<u8")),
        (4, bytes(16)),
        (5, np.zeros(4, np.uint8)[::2]),
    ]
    for place, value in bad:
        with pytest.raises(ValueError, match="bytes|contiguous|read-only"):
            _native.scan(*(value if i == place else kept for i, kept in enumerate(good)))
    with pytest.raises(TypeError):
        _native.scan(7, *good[1:])  # type: ignore[arg-type]
    with pytest.raises(OverflowError):
        _native.scan(window, -512, *good[2:])


def test_what_is_written_may_not_overlap_what_is_read() -> None:
    memory = np.zeros(4096, np.uint8)
    with pytest.raises(ValueError, match="new and window overlap"):
        _native.scan(memory[:1024], 512, DEFAULT_SECRET, None, memory[1016:1032], np.zeros(2, np.uint8))
    with pytest.raises(ValueError, match="dirty and new overlap"):
        _native.scan(bytes(1024), 512, DEFAULT_SECRET, None, memory[:16], memory[15:17])
    with pytest.raises(ValueError, match="out and window overlap"):
        _native.zeros(memory[:512], 512, memory[511:512])
    with pytest.raises(ValueError, match="out and select overlap"):
        _native.hash_leaves(bytes(512), 512, 0, memory[:1], memory[:32])
    _native.zeros(memory[:512], 512, memory[512:513])


def test_unaligned_and_empty_buffers_are_fine() -> None:
    memory = bytearray(1 + 24)
    memory[1:] = table([(3, 4, 1)]).tobytes()
    assert _native.encode_extents(memoryview(memory)[1:]) == b"\x03\x09"
    new = np.zeros(17, np.uint8)
    _native.scan(bytes(1024), 512, DEFAULT_SECRET, None, new[1:], np.zeros(2, np.uint8))
    assert scan(b"", 512) == ((0, 0), [], [])
    assert _native.overlay(b"", b"") == b"" == _native.gather(b"", [], 512) == _native.decode_extents(b"", 0)


def test_levels_and_leaves_have_bounds() -> None:
    for level in (0, 5):
        with pytest.raises(ValueError, match="level"):
            _native.hash_node(bytes(8192), level)
    with pytest.raises(ValueError, match="8192"):
        _native.hash_node(bytes(8191), 1)
    with pytest.raises(ValueError, match="tree has"):
        _native.hash_leaves(bytes(512), 512, 1 << 32, None, np.zeros(32, np.uint8))
