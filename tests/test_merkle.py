"""merkle: digests, updates and truncation, against a naive recomputation of the whole tree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import blake3
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replica.durable import File, FileSystem
from replica.merkle import (
    BLOCK_BYTES,
    FAN_OUT,
    MAX_LEAVES,
    Digests,
    FileNodes,
    MemoryNodes,
    MerkleTree,
    Nodes,
    leaf_digests,
    leaf_windows,
)

ZERO = bytes(32)
Leaves = dict[int, bytes]

# Leaves at the corners of blocks and levels: where a streaming update goes wrong if it does.
CORNERS = [0, 1, 255, 256, 257, 511, 65535, 65536, 65537, 131071, 2**24 - 1, 2**24, 2**24 + 256, 2**32 - 257, 2**32 - 1]
leaf_numbers = st.one_of(st.sampled_from(CORNERS), st.integers(0, 2000), st.integers(0, MAX_LEAVES - 1))
leaf_values = st.one_of(st.just(ZERO), st.binary(min_size=32, max_size=32))
leaf_maps = st.dictionaries(leaf_numbers, leaf_values, max_size=20)


def naive_root(leaves: Leaves, size_bytes: int, leaf_bytes: int) -> bytes:
    """The definition, level by level, over the digests that are not zero."""
    digests = {i: d for i, d in leaves.items() if d != ZERO}
    for level in range(1, 5):
        nodes: dict[int, bytes] = {}
        for number in {i // 256 for i in digests}:
            children = b"".join(digests.get(number * 256 + i, ZERO) for i in range(256))
            body = children + level.to_bytes(4, "little")
            nodes[number] = blake3.blake3(body, derive_key_context="replica 2026-11 merkle node v1").digest()
        digests = nodes
    body = digests.get(0, ZERO) + size_bytes.to_bytes(8, "little") + leaf_bytes.to_bytes(4, "little")
    return blake3.blake3(body, derive_key_context="replica 2026-11 merkle root v1").digest()


def as_digests(value: bytes) -> Digests:
    return np.frombuffer(value, np.uint8).reshape(-1, 32)


def put(tree: MerkleTree, leaves: Leaves, *, write: bool = True, cut: int | None = None, size: int = 77) -> bytes:
    update = tree.update(write)
    for number in sorted(leaves):
        if cut is None or number < cut:
            update.put(number, as_digests(leaves[number]))
    if cut is not None:
        update.truncate(cut)
    return update.root(size)


@pytest.fixture(params=["memory", "file"])
def make_nodes(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Nodes]]:
    files: list[File] = []

    def make() -> Nodes:
        if request.param == "memory":
            return MemoryNodes()
        files.append(FileSystem().create(tmp_path / f"tree-{len(files)}"))
        return FileNodes(files[-1])

    yield make
    for file in files:
        file.close()


def test_a_leaf_covers_its_data_index_and_length() -> None:
    data = bytes(range(256)) * 300
    digests = leaf_digests(data, 5, 16384)
    assert digests.shape == (5, 32)
    padded = data + bytes(5 * 16384 - len(data))
    for i in range(5):
        body = padded[i * 16384 :][:16384] + (5 + i).to_bytes(8, "little") + (16384).to_bytes(4, "little")
        wanted = blake3.blake3(body, derive_key_context="replica 2026-11 merkle leaf v1").digest()
        assert digests[i].tobytes() == wanted


def test_zero_leaves_have_the_zero_digest_also_short_ones() -> None:
    assert not leaf_digests(bytes(40000), 9, 16384).any()
    assert leaf_digests(b"", 0, 16384).shape == (0, 32)


def test_the_empty_tree_has_a_root_that_depends_on_size_and_leaf() -> None:
    tree = MerkleTree(MemoryNodes())
    assert tree.root(0) == naive_root({}, 0, 16384) == tree.update(write=False).root(0)
    assert len({tree.root(0), tree.root(1), MerkleTree(MemoryNodes(), 4096).root(0)}) == 3


@given(first=leaf_maps, second=leaf_maps)
def test_updates_end_in_the_tree_of_the_merged_leaves(first: Leaves, second: Leaves) -> None:
    tree = MerkleTree(MemoryNodes())
    assert put(tree, first) == naive_root(first, 77, 16384)
    merged = first | second
    wanted = naive_root(merged, 77, 16384)
    assert put(tree, second, write=False) == wanted
    assert tree.root(77) == naive_root(first, 77, 16384), "a dry run wrote"
    assert put(tree, second) == wanted == tree.root(77)
    assert put(tree, second) == wanted, "not idempotent"
    for number, digest in merged.items():
        assert tree.leaves(number, 1).tobytes() == digest


@given(leaves=leaf_maps, more=leaf_maps, cut=st.one_of(st.just(MAX_LEAVES), leaf_numbers))
def test_truncate_is_the_tree_of_the_leaves_before_the_cut(leaves: Leaves, more: Leaves, cut: int) -> None:
    tree = MerkleTree(MemoryNodes())
    before = put(tree, leaves)
    kept = {i: d for i, d in (leaves | more).items() if i < cut}
    wanted = naive_root(kept, 77, 16384)
    assert put(tree, more, cut=cut, write=False) == wanted
    assert tree.root(77) == before
    assert put(tree, more, cut=cut) == wanted == tree.root(77)
    for number in leaves | more:
        assert tree.leaves(number, 1).tobytes() == kept.get(number, ZERO)
    # Growing again finds zeros, in the leaves and in every node above them.
    assert put(tree, leaves) == naive_root(kept | leaves, 77, 16384)


@given(leaves=leaf_maps, more=leaf_maps, a=leaf_numbers, b=leaf_numbers, nearby=st.integers(0, 1 << 17))
def test_zeros_prove_whole_subtrees_whatever_lies_below(
    leaves: Leaves, more: Leaves, a: int, b: int, nearby: int
) -> None:
    first, stop = min(a, b), max(a, b) if nearby % 2 else min(min(a, b) + nearby, MAX_LEAVES)
    tree = MerkleTree(MemoryNodes())
    before = put(tree, leaves)
    update = tree.update(write=False)
    for number in sorted(n for n in more if n < first):
        update.put(number, np.frombuffer(more[number], np.uint8).reshape(1, 32))
    update.put_zeros(first, stop)
    for number in sorted(n for n in more if n >= stop):
        update.put(number, np.frombuffer(more[number], np.uint8).reshape(1, 32))
    assert update.root(77) == naive_root({n: d for n, d in (leaves | more).items() if not first <= n < stop}, 77, 16384)
    assert tree.root(77) == before


@pytest.mark.parametrize("cut", [0, 1, 255, 256, 257, 600, 65536, 65537])
def test_truncate_clears_what_a_torn_truncate_left(make_nodes: Callable[[], Nodes], cut: int) -> None:
    nodes = make_nodes()
    tree = MerkleTree(nodes)
    leaves = {i: bytes([i % 255 + 1]) * 32 for i in [*range(700), 65536, 70000]}
    put(tree, leaves)
    stale = nodes.read(0, 70000 // FAN_OUT)
    put(tree, {}, cut=cut)
    nodes.write(0, 70000 // FAN_OUT, stale)  # the upper levels reached the disk, this block did not
    put(tree, {}, cut=cut)
    assert not tree.leaves(70000, 1).any()
    assert tree.root(77) == naive_root({i: d for i, d in leaves.items() if i < cut}, 77, 16384)


def test_wide_puts_cross_blocks(make_nodes: Callable[[], Nodes]) -> None:
    digests = np.random.default_rng(4).integers(0, 256, (1500, 32), np.uint8)
    tree = MerkleTree(make_nodes())
    update = tree.update(write=True)
    update.put(100, digests[:3])
    update.put(103, digests[3:900])
    update.put(1000, digests[900:])
    wanted = {
        **{100 + i: digests[i].tobytes() for i in range(900)},
        **{1000 + i: digests[900 + i].tobytes() for i in range(600)},
    }
    assert update.root(9) == naive_root(wanted, 9, 16384) == tree.root(9)
    assert np.array_equal(tree.leaves(100, 900), digests[:900])
    assert np.array_equal(tree.leaves(990, 610)[10:], digests[900:])
    assert np.array_equal(tree.level(1, 0, 256)[2], tree.level(1, 2, 1)[0])


def test_the_file_has_the_documented_layout_and_stays_sparse(tmp_path: Path) -> None:
    path = tmp_path / "tree"
    with FileSystem().create(path) as file:
        tree = MerkleTree(FileNodes(file))
        put(tree, {0x01020304: b"\x01" * 32})
        for level, offset in enumerate([538984448, 2113536, 16384, 8192, 0]):
            stored = file.read(offset + 32 * (0x01020304 >> 8 * level), 32)
            assert stored == tree.level(level, 0x01020304 >> 8 * level, 1).tobytes() != ZERO
        assert file.allocated_bytes() <= 1 << 20
        put(tree, {0x01020304: ZERO})
        assert not tree.level(4, 0, 1).any()
        assert file.allocated_bytes() <= 5 * BLOCK_BYTES


def test_misuse_is_refused() -> None:
    tree = MerkleTree(MemoryNodes())
    one = np.ones((1, 32), np.uint8)
    update = tree.update(write=False)
    update.put(5, one)
    for first in (5, 4):
        with pytest.raises(ValueError, match="follow"):
            update.put(first, one)
    with pytest.raises(ValueError, match="cut"):
        update.truncate(5)
    with pytest.raises(ValueError, match="shape"):
        update.put(9, np.ones((1, 31), np.uint8))
    with pytest.raises(ValueError, match="follow"):
        update.put(MAX_LEAVES, one)
    update.truncate(6)
    with pytest.raises(ValueError, match="follow"):
        update.put(7, one)
    for level, first, count in [(5, 0, 1), (0, -1, 1), (4, 1, 1), (1, 2**24, 1)]:
        with pytest.raises(ValueError, match="level"):
            tree.level(level, first, count)


@pytest.mark.parametrize("size", [0, 3, 300, 70001, 70000])
def test_stored_leaves_leave_out_zeros_only(make_nodes: Callable[[], Nodes], size: int) -> None:
    tree = MerkleTree(make_nodes())
    put(tree, dict.fromkeys([2, 5, 299, 70000], b"\x01" * 32))
    ranges = list(tree.stored_leaves(size))
    covered = [i for first, stop in ranges for i in range(first, stop)]
    assert covered == sorted(set(covered))
    assert {i for i in [2, 5, 299, 70000] if i < size} <= set(covered) <= set(range(size))
    assert len(covered) <= 4 * 256


@given(
    st.lists(st.tuples(st.integers(0, 200), st.integers(1, 60)), max_size=8).map(sorted),
    st.integers(150, 260),
    st.integers(0, 20),
    st.integers(0, 3),
)
def test_windows_cover_the_leaves_of_the_ranges_once(
    runs: list[tuple[int, int]], size: int, start_leaf: int, gap_leaves: int
) -> None:
    """Leaves of 8 bytes, windows of 3, against sets of leaves."""
    start = min(start_leaf * 8, size)
    ranges = [(first, min(first + length, size)) for first, length in runs if first < size]
    wanted = {leaf for first, stop in ranges for leaf in range(first // 8, -(-stop // 8)) if leaf >= start_leaf}
    found = list(leaf_windows(ranges, size, 8, 24, start=start, gap_bytes=gap_leaves * 8))
    reached, covered = start, set[int]()
    for offset, length in found:
        assert offset >= reached and offset % 8 == 0 and 0 < length <= 24
        reached = offset + length
        assert reached % 8 == 0 or reached == size
        covered |= set(range(offset // 8, -(-reached // 8)))
    assert wanted <= covered
    bridged = {
        leaf
        for leaf in covered - wanted
        if any(below in wanted for below in range(leaf - gap_leaves, leaf))
        and any(above in wanted for above in range(leaf + 1, leaf + gap_leaves + 1))
    }
    assert covered - wanted - bridged <= set(range(start_leaf, start_leaf + gap_leaves))
    if not gap_leaves:
        assert covered == wanted
