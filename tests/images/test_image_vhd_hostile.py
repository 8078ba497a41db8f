"""Chains that a tenant made to do harm: bounded memory and time, and nothing but ImageError."""

import struct
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vhd_maker import DIFFERENCING, Vhd, checksummed

from replica import images
from replica.durable import FileSystem
from replica.errors import ImageError
from replica.images.vhd_blocks import MAX_BLOCKS

LIMIT_BYTES, LIMIT_SECONDS = 100 << 20, 60


def name(depth: int) -> bytes:
    return f"{depth}.vhd".encode("utf-16-be")


def layer(depth: int, vhd: Vhd) -> Vhd:
    """`vhd` as the differencing disk at that depth of a chain."""
    vhd = replace(vhd, unique_id=bytes([depth]) * 16)
    if depth:
        vhd = replace(vhd, kind=DIFFERENCING, parent_id=bytes([depth - 1]) * 16, parent_name=name(depth - 1))
    return vhd


def write_full(path: Path, vhd: Vhd, count: int) -> None:
    """A sparse file with `count` blocks of 512 bytes, all of them allocated, and empty bitmaps."""
    first = -(-(1536 + 4 * count) // 512)
    with path.open("wb") as file:
        file.write(vhd.footer() + vhd.header())
        for part in range(0, count, 1 << 16):
            stop = min(part + (1 << 16), count)
            file.write(struct.pack(f">{stop - part}I", *range(first + 2 * part, first + 2 * stop, 2)))
        file.seek((first + 2 * count) * 512)
        file.write(vhd.footer())


def test_a_chain_of_the_biggest_tables(tmp_path: Path) -> None:
    """Two files that are at the limit each: the chain has a limit of its own, and that is not reached in memory."""
    for depth in range(2):
        vhd = layer(depth, Vhd(MAX_BLOCKS * 512, 512))
        write_full(tmp_path / f"{depth}.vhd", vhd, MAX_BLOCKS)
    started = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(ImageError, match="more than 6291456 blocks in their files"):
            images.open(tmp_path / "1.vhd")
        assert tracemalloc.get_traced_memory()[1] < LIMIT_BYTES
    finally:
        tracemalloc.stop()
    assert time.monotonic() - started < LIMIT_SECONDS


def test_a_deep_chain_of_empty_bitmaps(tmp_path: Path) -> None:
    """Twenty layers that have every block and no sector: each bitmap is read once, and never asked again."""
    count = 2048
    for depth in range(20):
        write_full(tmp_path / f"{depth}.vhd", layer(depth, Vhd(count * 512, 512)), count)
    started = time.monotonic()
    tracemalloc.start()
    try:
        with images.open(tmp_path / "19.vhd") as image:
            for _ in range(20):
                buffer = bytearray(b"\xa5" * image.size_bytes)
                image.read_into(0, buffer)
                assert not any(buffer)
        assert tracemalloc.get_traced_memory()[1] < LIMIT_BYTES
    finally:
        tracemalloc.stop()
    assert time.monotonic() - started < LIMIT_SECONDS


CHAIN = [
    layer(0, Vhd(20480, blocks={0: b"a" * 8192, 2: b"b" * 8192})),
    layer(1, Vhd(20480, blocks={1: b"c" * 8192, 2: b"d" * 8192}, bitmaps={1: b"\x3c\xa5"})),
    replace(
        layer(2, Vhd(20480, blocks={0: b"e" * 8192}, bitmaps={0: b"\x00\xff"})),
        locators=((b"W2ru", ".\\1.vhd".encode("utf-16-le")), (b"W2ku", "C:\\1.vhd".encode("utf-16-le"))),
    ),
]
INTERESTING = [0, 1, 2, 3, 4, 8, 511, 512, 513, 1536, 8192, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 63]


@st.composite
def damage(draw: st.DrawFn) -> list[tuple[int, int, bytes]]:
    """(file, offset, bytes): in the structures mostly, of the lengths that fields have."""
    changes = []
    for _ in range(draw(st.integers(1, 4))):
        depth = draw(st.integers(0, 2))
        offset = draw(st.one_of(st.integers(0, 511), st.integers(512, 1400), st.integers(1536, 4000)))
        length = draw(st.sampled_from([1, 2, 4, 8]))
        value = draw(st.one_of(st.sampled_from(INTERESTING), st.integers(0, 2**64 - 1)))
        changes.append((depth, offset, (value & (1 << 8 * length) - 1).to_bytes(length, "big")))
    return changes


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=damage(), both=st.booleans(), cut=st.one_of(st.none(), st.tuples(st.integers(0, 2), st.integers(0, 9999)))
)
def test_damage_with_checksums_that_fit(
    tmp_path: Path, changes: list[tuple[int, int, bytes]], both: bool, cut: tuple[int, int] | None
) -> None:
    files = [bytearray(vhd.build()) for vhd in CHAIN]
    for depth, offset, value in changes:
        files[depth][offset : offset + len(value)] = value
    for depth, data in enumerate(files):
        data[:512], data[512:1536] = checksummed(bytes(data[:512]), 64), checksummed(bytes(data[512:1536]), 36)
        if both:
            data[-512:] = data[:512]
        if cut and cut[0] == depth:
            del data[cut[1] :]
        (tmp_path / f"{depth}.vhd").write_bytes(data)
    started = time.monotonic()
    try:
        with images.open(tmp_path / "2.vhd") as image:
            size = min(image.size_bytes, 1 << 20)
            buffer = bytearray(size)
            image.read_into(0, buffer)
            end = -1
            for start, stop in image.allocated(0, image.size_bytes):
                assert end < start < stop <= image.size_bytes
                end = stop
            images.describe(FileSystem(), image, "vhd")
    except ImageError as error:
        assert error.hint
    assert time.monotonic() - started < 5
