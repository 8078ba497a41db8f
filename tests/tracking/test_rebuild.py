"""Rebuilding a tracker: it describes the head exactly, whatever both sides hold, and whatever the head says."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tracking_machine import MemoryImage, root_of

from replica import _native
from replica.durable import File, FileSystem
from replica.errors import DamageError, ProtocolError, StorageError
from replica.images.raw import RawImage
from replica.merkle import DEPTH, FAN_OUT, FileNodes, MemoryNodes, MerkleTree, Nodes, leaf_digests
from replica.model import Consistency, DeltaId, Disk, DiskId, DiskState, Epoch, ReplicaId, State
from replica.tracking.hash import HashTracker, Window
from replica.tracking.journal import JournalWriter
from replica.tracking.rebuild import differing_leaves, rebuild

ID = DeltaId(UUID(int=77))
KiB, MiB = 1 << 10, 1 << 20


class FakeHead:
    """The head as an array, and every question that was asked; `twist` changes an answer."""

    def __init__(self, data: np.ndarray, disk: Disk) -> None:
        self.data, self.disk = data, disk
        self.tree = MerkleTree(MemoryNodes(), disk.leaf_bytes)
        update = self.tree.update(write=True)
        if len(data):
            update.put(0, leaf_digests(data, 0, disk.leaf_bytes))
        update.root(len(data))
        self.asked: list[tuple[str, int]] = []
        self.rotten: set[int] = set()
        self.twist: Callable[[str, bytes], bytes] = lambda _what, answer: answer

    @property
    def state(self) -> DiskState:
        return DiskState(self.disk, root_of(self.data, self.disk))

    def nodes(self, level: int, ranges: list[tuple[int, int]]) -> bytes:
        self.asked.append(("nodes", sum(count for _, count in ranges)))
        return self.twist("nodes", b"".join(self.tree.level(level, *one).tobytes() for one in ranges))

    def grains(self, secret: bytes, ranges: list[tuple[int, int]]) -> bytes:
        leaf = self.disk.leaf_bytes
        numbers = [first + i for first, count in ranges for i in range(count)]
        self.asked.append(("grains", len(numbers)))
        padded = np.zeros(self.disk.count_leaves * leaf, np.uint8)
        padded[: len(self.data)] = self.data
        digests = np.zeros((len(numbers), self.disk.grains_per_leaf), "<u8")
        for row, number in zip(digests, numbers, strict=True):
            if number not in self.rotten:
                window = padded[number * leaf : (number + 1) * leaf]
                _native.scan(window, self.disk.grain_bytes, secret, None, row, np.empty(len(row), np.uint8))
        whole = bytes(number not in self.rotten for number in numbers)
        return self.twist("grains", digests.tobytes() + whole)


def scan(directory: Path, disk: Disk, root: bytes, image: MemoryImage, candidates: object = None) -> set[int]:
    """The grains that the next incremental scan ships."""
    fs, base = FileSystem(), state_of(DiskState(disk, root))
    tracker = HashTracker(fs, directory, disk, base)
    assert tracker.known
    found: set[int] = set()
    with JournalWriter(fs, directory) as journal:
        for piece in tracker.scan(image, journal, 0, fresh=False, candidates=candidates):
            assert isinstance(piece, Window) and piece.dirty is not None
            found.update(int(g) + piece.first_grain for g in np.flatnonzero(piece.dirty))
    return found


def state_of(disk_state: DiskState) -> State:
    return State(ReplicaId(UUID(int=9)), ID, 1, Epoch(1, UUID(int=7)), 5, Consistency.CRASH, (disk_state,))


def differing_grains(a: np.ndarray, b: np.ndarray, disk: Disk) -> set[int]:
    """The oracle: grain by grain, both filled up with zeros."""
    size = disk.count_grains * disk.grain_bytes
    rows = [np.zeros(size, np.uint8) for _ in range(2)]
    for row, data in zip(rows, (a, b), strict=True):
        row[: min(len(data), disk.size_bytes)] = data[: disk.size_bytes]
    differ = (rows[0] != rows[1]).reshape(disk.count_grains, disk.grain_bytes).any(axis=1)
    return set(np.flatnonzero(differ).tolist())


GEOMETRIES = [(4096, 16384), (512, 512), (512, 1 << 20), (4096, 4096), (65536, 65536)]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Disk, np.ndarray, np.ndarray]:
    """A head's disk with its content, and a local one that is equal, changed, zeroed, resized, in places or at all."""
    grain, leaf = draw(st.sampled_from(GEOMETRIES))
    size = draw(st.integers(1, 5 * MiB))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    remote = np.zeros(size, np.uint8)
    for _ in range(draw(st.integers(0, 4))):
        start = int(rng.integers(0, size))
        length = int(rng.integers(1, 1 * MiB))
        remote[start : start + length] = rng.integers(0, 256, len(remote[start : start + length]), np.uint8)
    local = remote.copy()
    for _ in range(draw(st.integers(0, 4))):
        start = int(rng.integers(0, size))
        part = slice(start, start + int(rng.choice([1, 5000, 300_000])))
        kind = draw(st.sampled_from(["write", "zero"]))
        local[part] = 0 if kind == "zero" else rng.integers(0, 256, len(local[part]), np.uint8)
    other = draw(st.sampled_from([size, size, max(1, size - 5000), size + 70_000, max(1, size // 2)]))
    resized = np.zeros(other, np.uint8)
    resized[: min(size, other)] = local[:other]
    return Disk(DiskId(UUID(int=3)), "os", size, grain_bytes=grain, leaf_bytes=leaf), remote, resized


@settings(max_examples=60, deadline=None)
@given(cases())
def test_a_rebuilt_tracker_describes_the_head_and_ships_exactly_what_differs(
    case: tuple[Disk, np.ndarray, np.ndarray],
) -> None:
    disk, remote, local = case
    directory = Path(tempfile.mkdtemp())
    try:
        head = FakeHead(remote, disk)
        rebuilt = rebuild(FileSystem(), directory, head.state, ID, MemoryImage(local), head)
        expected = differing_grains(remote, local, disk)
        fitted = np.zeros(disk.size_bytes, np.uint8)
        fitted[: len(local)] = local[: disk.size_bytes]
        assert scan(directory, disk, head.state.root, MemoryImage(fitted)) == expected
        assert scan(directory, disk, head.state.root, MemoryImage(fitted), rebuilt.windows) == expected
        assert scan(directory, disk, head.state.root, MemoryImage(remote)) == set(), "it is the head, exactly"
        leaves = {grain // disk.grains_per_leaf for grain in expected}
        assert rebuilt.bytes_differing == len(leaves) * disk.leaf_bytes and rebuilt.leaves_unknown == 0
        if not expected:
            assert head.asked == [], "equal disks are equal roots"
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Disk, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    disk = Disk(DiskId(UUID(int=3)), "os", 9 * MiB + 1000)
    remote = rng.integers(1, 256, disk.size_bytes, np.uint8)
    local = remote.copy()
    local[5000] ^= 1
    local[6 * MiB : 6 * MiB + 40_000] = 0
    return tmp_path, disk, remote, local


def test_a_damaged_leaf_is_never_taken_as_known(small: tuple[Path, Disk, np.ndarray, np.ndarray]) -> None:
    directory, disk, remote, local = small
    head = FakeHead(remote, disk)
    head.rotten = {0}
    rebuilt = rebuild(FileSystem(), directory, head.state, ID, MemoryImage(local), head)
    assert rebuilt.leaves_unknown == 1
    assert scan(directory, disk, head.state.root, MemoryImage(local)) == differing_grains(remote, local, disk) | {
        0,
        1,
        2,
        3,
    }


def test_grains_that_all_look_equal_in_a_leaf_that_differs_are_not_believed(
    small: tuple[Path, Disk, np.ndarray, np.ndarray],
) -> None:
    directory, disk, remote, local = small
    liar = FakeHead(local, disk)
    head = FakeHead(remote, disk)
    head.grains = liar.grains  # type: ignore[method-assign]
    rebuilt = rebuild(FileSystem(), directory, head.state, ID, MemoryImage(local), head)
    leaves = {grain // 4 for grain in differing_grains(remote, local, disk)}
    assert rebuilt.leaves_unknown == len(leaves)
    shipped = scan(directory, disk, head.state.root, MemoryImage(local))
    assert shipped == {leaf * 4 + i for leaf in leaves for i in range(4)}


def flipped(what: str, offset: int) -> Callable[[str, bytes], bytes]:
    def twist(about: str, answer: bytes) -> bytes:
        if about != what:
            return answer
        return answer[:offset] + bytes([answer[offset] ^ 1]) + answer[offset + 1 :]

    return twist


def known(directory: Path, head: FakeHead) -> bool:
    return HashTracker(FileSystem(), directory, head.disk, state_of(head.state)).known


@pytest.mark.parametrize("offset", [0, 31, 32 * 255])
def test_nodes_that_do_not_hash_to_the_root_are_refused(
    small: tuple[Path, Disk, np.ndarray, np.ndarray], offset: int
) -> None:
    directory, disk, remote, local = small
    head = FakeHead(remote, disk)
    head.twist = flipped("nodes", offset)
    with pytest.raises(DamageError, match="Merkle tree of disk 'os' at the replica is damaged"):
        rebuild(FileSystem(), directory, head.state, ID, MemoryImage(local), head)
    assert not known(directory, head)


@pytest.mark.parametrize("what", ["nodes", "grains"])
def test_answers_of_another_length_are_refused(small: tuple[Path, Disk, np.ndarray, np.ndarray], what: str) -> None:
    directory, disk, remote, local = small
    head = FakeHead(remote, disk)
    head.twist = lambda about, answer: answer[:-1] if about == what else answer
    with pytest.raises(ProtocolError):
        rebuild(FileSystem(), directory, head.state, ID, MemoryImage(local), head)
    assert not known(directory, head)


class Crash(Exception):
    pass


class Counting(FileSystem):
    """Dies at the n-th write, sync or other change."""

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0

    def step(self) -> None:
        self.count += 1
        if self.count > self.at:
            raise Crash

    def _wrap(self, file: File) -> File:
        for name in ("write", "sync", "zero", "truncate"):
            setattr(file, name, self._stepped(getattr(file, name)))
        return file

    def _stepped(self, function: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: object) -> None:
            self.step()
            function(*arguments)

        return call

    def open(self, path: Path, *, write: bool = False) -> File:
        return self._wrap(super().open(path, write=write)) if write else super().open(path)

    def create(self, path: Path, *, private: bool = False) -> File:
        self.step()
        return self._wrap(super().create(path, private=private))

    def sync_directory(self, path: Path) -> None:
        self.step()
        super().sync_directory(path)

    def unlink(self, path: Path) -> None:
        self.step()
        super().unlink(path)


def test_a_crash_at_any_step_leaves_nothing_that_is_believed(small: tuple[Path, Disk, np.ndarray, np.ndarray]) -> None:
    root, disk, remote, local = small
    head = FakeHead(remote, disk)
    expected = differing_grains(remote, local, disk)
    steps = 0
    while True:
        directory = root / str(steps)
        fs = Counting(steps)
        try:
            rebuild(fs, directory, head.state, ID, MemoryImage(local), head)
            break
        except (Crash, StorageError):
            pass
        if known(directory, head):  # only the very last sync may be missing
            assert scan(directory, disk, head.state.root, MemoryImage(local)) == expected
        rebuild(FileSystem(), directory, head.state, ID, MemoryImage(local), head)
        assert scan(directory, disk, head.state.root, MemoryImage(local)) == expected
        shutil.rmtree(directory)
        steps += 1
    assert steps > 20


class SyntheticNodes:
    """The tree of a huge disk whose leaves are a formula, but for some; nothing of it is stored."""

    def __init__(self, changed: set[int], count_leaves: int) -> None:
        self.changed, self.count_leaves = changed, count_leaves
        self.uniform = [np.full((FAN_OUT, 32), 7, np.uint8)]
        for level in range(1, DEPTH + 1):
            digest = np.frombuffer(_native.hash_node(self.uniform[-1], level), np.uint8)
            self.uniform.append(np.tile(digest, (FAN_OUT, 1)))

    def read(self, level: int, block: int) -> np.ndarray:
        digests = self.uniform[level].copy()
        span = FAN_OUT**level
        for leaf in self.changed:
            if leaf // span // FAN_OUT == block:
                index = leaf // span % FAN_OUT
                digests[index] = 9 if level == 0 else self._node(level, leaf // span)
        return digests

    def _node(self, level: int, node: int) -> np.ndarray:
        return np.frombuffer(_native.hash_node(self.read(level - 1, node), level), np.uint8)


def test_two_disks_of_64_tib_find_a_hundred_differences_in_four_requests() -> None:
    disk = Disk(DiskId(UUID(int=3)), "huge", 64 << 40)
    rng = np.random.default_rng(3)
    changed = set(rng.integers(0, disk.count_leaves, 100).tolist())
    remote: Nodes = SyntheticNodes(changed, disk.count_leaves)  # type: ignore[assignment]
    local: Nodes = SyntheticNodes(set(), disk.count_leaves)  # type: ignore[assignment]
    tree = MerkleTree(remote, disk.leaf_bytes)
    asked: list[int] = []

    class Far:
        def nodes(self, level: int, ranges: list[tuple[int, int]]) -> bytes:
            asked.append(sum(count for _, count in ranges))
            return b"".join(tree.level(level, *one).tobytes() for one in ranges)

        def grains(self, secret: bytes, ranges: list[tuple[int, int]]) -> bytes:
            raise AssertionError

    state = DiskState(disk, tree.root(disk.size_bytes))
    found = [
        leaf for leaves, _ in differing_leaves(MerkleTree(local, disk.leaf_bytes), Far(), state) for leaf in leaves
    ]
    assert found == sorted(changed)
    assert len(asked) == DEPTH
    assert sum(asked) * 32 < 3 * MiB


def test_disks_that_differ_everywhere_are_compared_in_bounded_pieces() -> None:
    disk = Disk(DiskId(UUID(int=3)), "big", 16 << 30)
    nodes = SyntheticNodes(set(), disk.count_leaves)
    state = DiskState(disk, MerkleTree(nodes, disk.leaf_bytes).root(disk.size_bytes))  # type: ignore[arg-type]
    tree = MerkleTree(nodes, disk.leaf_bytes)  # type: ignore[arg-type]
    asked: list[int] = []

    class Far:
        def nodes(self, level: int, ranges: list[tuple[int, int]]) -> bytes:
            asked.append(sum(count for _, count in ranges))
            return b"".join(tree.level(level, *one).tobytes() for one in ranges)

        def grains(self, secret: bytes, ranges: list[tuple[int, int]]) -> bytes:
            raise AssertionError

    walk = differing_leaves(MerkleTree(MemoryNodes(), disk.leaf_bytes), Far(), state)
    leaves, _ = next(walk)
    assert len(leaves) == 65536 and leaves[0] == 0
    assert max(asked) <= 65536


def test_holes_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(1 << 40)
        file.seek(700 << 30)
        file.write(b"x" * 100_000)
    disk = Disk(DiskId(UUID(int=3)), "os", 1 << 40)
    local = MerkleTree(MemoryNodes(), disk.leaf_bytes).update(write=False)
    local.put((700 << 30) // disk.leaf_bytes, leaf_digests(b"x" * 100_000, (700 << 30) // disk.leaf_bytes))
    state = DiskState(disk, local.root(disk.size_bytes))
    with RawImage.open(FileSystem(), path) as image:
        rebuilt = rebuild(FileSystem(), tmp_path / "state", state, ID, image, FakeHead(np.zeros(0, np.uint8), disk))
    assert rebuilt.bytes_read < MiB and rebuilt.bytes_differing == 0
    with FileSystem().open(tmp_path / "state" / "disks" / str(disk.id) / "leaves") as file:
        assert MerkleTree(FileNodes(file), disk.leaf_bytes).root(disk.size_bytes) == state.root


def test_rebuilding_replaces_a_tracker_that_is_there(small: tuple[Path, Disk, np.ndarray, np.ndarray]) -> None:
    directory, disk, remote, local = small
    first = FakeHead(local, disk)
    rebuild(FileSystem(), directory, first.state, ID, MemoryImage(local), first)
    head = FakeHead(remote, disk)
    rebuild(FileSystem(), directory, head.state, ID, MemoryImage(local), head)
    assert scan(directory, disk, head.state.root, MemoryImage(local)) == differing_grains(remote, local, disk)
