"""The Merkle tree over a disk's leaves: one root names the content of a whole disk.

A leaf is 16 KiB of the disk by default; the tree has a fixed depth of 4 and a
fan-out of 256, so it covers 2^32 leaves, whatever the disk's size. Its digests:

    leaf   32 zero bytes if its data is all zero, else BLAKE3 derive-key
           "replica 2026-11 merkle leaf v1" (data padded with zeros to leaf_bytes ‖ u64 index ‖ u32 leaf_bytes)
    node   32 zero bytes if its 256 children all are, else BLAKE3 derive-key
           "replica 2026-11 merkle node v1" (children ‖ u32 level), level 1 to 4
    root   BLAKE3 derive-key "replica 2026-11 merkle root v1" (level-4 digest ‖ u64 size_bytes ‖ u32 leaf_bytes)

(numbers little-endian). Two things follow. A subtree of zeros is zeros, so the
tree of a sparse disk is a sparse file, and beyond a disk's end the tree is zero:
no leaf ever moves or changes its digest when the disk is resized, growing costs
nothing and shrinking is `truncate`. And index, level and size are hashed, so
nothing can be swapped, shifted or cut off unnoticed.

The digests of a level lie in blocks of 256, the children of one node; `Nodes` keeps
them. In a file (`FileNodes`) the levels lie one after the other, top first:

    level  offset       digests
    4      0            1
    3      8192         2^8
    2      16384        2^16
    1      2113536      2^24
    0      538984448    2^32, as far as there are leaves that are not zero

A change is a `TreeUpdate`: leaves are put in ascending order, every block on the
way up is read once, completed and hashed when the stream has passed it. It holds
one block per level, can run dry to learn the root of a state that is not there
yet, and repeating it after a crash ends in the same tree.

    update = tree.update(write=False)
    update.put(first_leaf, leaf_digests(window, first_leaf, leaf_bytes))
    root = update.root(size_bytes)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

import blake3
import numpy as np
import numpy.typing as npt

from replica import _native
from replica.durable import File
from replica.model import DIGEST_BYTES, LEAF_BYTES
from replica.progress import Progress, silent

if TYPE_CHECKING:
    from typing_extensions import Buffer

Digests = npt.NDArray[np.uint8]
"""u8[n, 32], C-contiguous."""
Leaves = npt.NDArray[np.int64]
"""Numbers of leaves, ascending."""

FAN_OUT = 256
DEPTH = 4
MAX_LEAVES = FAN_OUT**DEPTH
BLOCK_BYTES = FAN_OUT * DIGEST_BYTES
WINDOW_BYTES = 4 << 20

_ROOT_CONTEXT = "replica 2026-11 merkle root v1"
_OFFSETS = (538984448, 2113536, 16384, 8192, 0)
"""Byte offset of each level in a file, leaves first."""


def leaf_digests(buffer: Buffer, first_leaf: int, leaf_bytes: int = LEAF_BYTES) -> Digests:
    """The digests of the leaves that `buffer` holds from leaf `first_leaf` on; the last one may be short."""
    count = -(-memoryview(buffer).nbytes // leaf_bytes)
    digests = np.empty((count, DIGEST_BYTES), np.uint8)
    _native.hash_leaves(buffer, leaf_bytes, first_leaf, None, digests)
    return digests


def leaf_digests_at(buffer: Buffer, numbers: Leaves, leaf_bytes: int = LEAF_BYTES) -> Digests:
    """The digests of leaves that lie one behind the other in `buffer`: the n-th is leaf `numbers[n]` of the disk.

    numbers: int64[n]. Only the last leaf may be short.
    """
    digests = np.empty((len(numbers), DIGEST_BYTES), np.uint8)
    _native.hash_leaves_at(buffer, leaf_bytes, numbers, digests)
    return digests


def root_of(top: bytes, size_bytes: int, leaf_bytes: int) -> bytes:
    """The root of a disk from its tree's level-4 digest. Also the disk of 0 bytes has one."""
    body = top + size_bytes.to_bytes(8, "little") + leaf_bytes.to_bytes(4, "little")
    return blake3.blake3(body, derive_key_context=_ROOT_CONTEXT).digest()


def leaf_windows(
    ranges: Iterable[tuple[int, int]],
    size_bytes: int,
    leaf_bytes: int,
    window_bytes: int,
    *,
    start: int = 0,
    gap_bytes: int = 0,
) -> Iterator[tuple[int, int]]:
    """(offset, length) of windows of whole leaves that cover half-open ranges of bytes from `start` on, once. Lazy.

    The ranges begin in ascending order and may overlap; `window_bytes` is a multiple of the leaf. What lies between two
    of them is covered, too, where that is at most `gap_bytes`.
    """
    begin = end = start
    for first, stop in ranges:
        first, stop = first // leaf_bytes * leaf_bytes, min(-(-stop // leaf_bytes) * leaf_bytes, size_bytes)
        if first > end + gap_bytes or begin == end:
            if begin < end:
                yield begin, end - begin
            begin = end = max(first, end)
        end = max(end, stop)
        while end - begin > window_bytes:
            yield begin, window_bytes
            begin += window_bytes
    if begin < end:
        yield begin, end - begin


def root_of_content(
    size_bytes: int,
    update: TreeUpdate,
    allocated: Iterable[tuple[int, int]],
    read_into: Callable[[int, memoryview], None],
    progress: Progress = silent,
) -> bytes:
    """The root of a disk, read window by window where `allocated` (ascending ranges of bytes) says it is not zero.

    `update` is of an empty tree, which becomes the disk's if it writes.
    """
    leaf_bytes = update.leaf_bytes
    for offset, length in leaf_windows(allocated, size_bytes, leaf_bytes, WINDOW_BYTES):
        window = memoryview(bytearray(length))
        read_into(offset, window)
        update.put(offset // leaf_bytes, leaf_digests(window, offset // leaf_bytes, leaf_bytes))
        progress(offset + length, size_bytes)
    return update.root(size_bytes)


def _by_block(numbers: Leaves) -> Iterator[tuple[int, int, int]]:
    """(block, begin, end): ascending leaves, cut where their block of digests ends."""
    blocks = numbers // FAN_OUT
    cuts = (np.flatnonzero(np.diff(blocks)) + 1).tolist()
    bounds = [0, *cuts, len(numbers)] if len(numbers) else []
    return ((int(blocks[begin]), begin, end) for begin, end in itertools.pairwise(bounds))


class Nodes(Protocol):
    """Where the digests are kept, in blocks of 256; what was never written is zero."""

    def read(self, level: int, block: int) -> Digests:
        """A copy of the block, u8[256, 32]. Of level 4 only the first digest is used."""

    def write(self, level: int, block: int, digests: Digests) -> None:
        """Replace the block."""

    def clear(self, level: int, first_block: int) -> None:
        """Make every block of the level from `first_block` on zero."""

    def stored(self, level: int, stop_block: int) -> Iterator[tuple[int, int]]:
        """Ascending half-open ranges of blocks below `stop_block`; every block outside of them is zero."""


class MemoryNodes:
    """Digests on the heap: for tests, and for disks that live in memory."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[int, int], Digests] = {}

    def read(self, level: int, block: int) -> Digests:
        found = self._blocks.get((level, block))
        return np.zeros((FAN_OUT, DIGEST_BYTES), np.uint8) if found is None else found.copy()

    def write(self, level: int, block: int, digests: Digests) -> None:
        if digests.any():
            self._blocks[level, block] = digests.copy()
        else:
            self._blocks.pop((level, block), None)

    def clear(self, level: int, first_block: int) -> None:
        for key in [k for k in self._blocks if k[0] == level and k[1] >= first_block]:
            del self._blocks[key]

    def stored(self, level: int, stop_block: int) -> Iterator[tuple[int, int]]:
        blocks = sorted(block for at, block in self._blocks if at == level and block < stop_block)
        return ((block, block + 1) for block in blocks)


class FileNodes:
    """Digests in a sparse file with the layout above. The caller syncs and closes the file."""

    def __init__(self, file: File) -> None:
        self._file = file

    def read(self, level: int, block: int) -> Digests:
        digests = np.zeros((FAN_OUT, DIGEST_BYTES), np.uint8)
        self._file.read_into(_OFFSETS[level] + block * BLOCK_BYTES, digests.data)
        return digests

    def write(self, level: int, block: int, digests: Digests) -> None:
        offset = _OFFSETS[level] + block * BLOCK_BYTES
        if digests.any():
            self._file.write(offset, digests.data)
        else:
            self._file.zero(offset, BLOCK_BYTES)

    def clear(self, level: int, first_block: int) -> None:
        start = _OFFSETS[level] + first_block * BLOCK_BYTES
        stop = _OFFSETS[level - 1] if level else self._file.size()
        self._file.zero(start, stop - start)

    def stored(self, level: int, stop_block: int) -> Iterator[tuple[int, int]]:
        start, reached = _OFFSETS[level], 0
        for offset, length in self._file.data_runs(start, start + stop_block * BLOCK_BYTES):
            first = max(reached, (offset - start) // BLOCK_BYTES)
            reached = -(-(offset + length - start) // BLOCK_BYTES)
            if first < reached:
                yield first, reached


class MerkleTree:
    """The tree of one disk. Reading is thread-safe where `nodes` is; one update at a time."""

    def __init__(self, nodes: Nodes, leaf_bytes: int = LEAF_BYTES) -> None:
        self._nodes = nodes
        self.leaf_bytes = leaf_bytes

    def root(self, size_bytes: int) -> bytes:
        """The root of the tree as it is stored, for a disk of that size (32 bytes)."""
        return root_of(self._nodes.read(DEPTH, 0)[0].tobytes(), size_bytes, self.leaf_bytes)

    def leaves(self, first: int, count: int) -> Digests:
        """The digests of `count` leaves from `first` on; beyond the disk's end they are zero."""
        return self.level(0, first, count)

    def leaves_at(self, numbers: Leaves) -> Digests:
        """The digests of some leaves, int64[n] ascending, each block of the file read once."""
        digests = np.empty((len(numbers), DIGEST_BYTES), np.uint8)
        for block, begin, end in _by_block(numbers):
            digests[begin:end] = self._nodes.read(0, block)[numbers[begin:end] % FAN_OUT]
        return digests

    def level(self, level: int, first: int, count: int) -> Digests:
        """`count` digests of a level (0 leaves, 4 the top) from index `first` on. Raises ValueError."""
        if not 0 <= level <= DEPTH or first < 0 or count < 0 or first + count > FAN_OUT ** (DEPTH - level):
            raise ValueError(f"level {level} of a tree has no digests {first} to {first + count}")
        digests = np.empty((count, DIGEST_BYTES), np.uint8)
        done = 0
        while done < count:
            block, start = divmod(first + done, FAN_OUT)
            part = min(FAN_OUT - start, count - done)
            digests[done : done + part] = self._nodes.read(level, block)[start : start + part]
            done += part
        return digests

    def stored_leaves(self, count_leaves: int) -> Iterator[tuple[int, int]]:
        """Ascending half-open ranges of leaves, at most `count_leaves`; every leaf outside of them is zero."""
        for first, stop in self._nodes.stored(0, -(-count_leaves // FAN_OUT)):
            yield first * FAN_OUT, min(stop * FAN_OUT, count_leaves)

    def update(self, write: bool) -> TreeUpdate:
        """Begin a change; without `write` it only computes and the stored tree stays as it is."""
        return TreeUpdate(self._nodes, self.leaf_bytes, write)


class TreeUpdate:
    """One streaming change: `put` ascending leaves, perhaps `truncate`, then `root`. For one thread.

    Per level the block that the stream is in is open; it is closed (stored, hashed,
    its digest put one level up) when the stream leaves it. As leaves ascend, so do
    the nodes above them, hence no block is opened twice. Misuse raises ValueError.
    """

    def __init__(self, nodes: Nodes, leaf_bytes: int, write: bool) -> None:
        self._nodes = nodes
        self.leaf_bytes = leaf_bytes
        self._write = write
        self._open: list[tuple[int, Digests] | None] = [None] * DEPTH
        self._top: bytes | None = None
        self._next = 0
        """The smallest leaf that may be put; past the end once no more may be."""

    def put(self, first_leaf: int, digests: Digests) -> None:
        """Set consecutive leaves; they must lie behind every leaf put before."""
        self.put_at(np.arange(first_leaf, first_leaf + len(digests)), digests)

    def put_at(self, numbers: Leaves, digests: Digests) -> None:
        """Set some leaves, int64[n] ascending; they must lie behind every leaf put before."""
        if digests.shape != (len(numbers), DIGEST_BYTES) or digests.dtype != np.uint8:
            raise ValueError(f"{len(numbers)} leaf digests have the shape {digests.shape} of {digests.dtype}")
        if not len(numbers):
            return
        first, last = int(numbers[0]), int(numbers[-1])
        if first < self._next or last >= MAX_LEAVES or (np.diff(numbers) <= 0).any():
            raise ValueError(f"leaves {first} to {last} do not follow leaf {self._next - 1} one after the other")
        self._next = last + 1
        for block, begin, end in _by_block(numbers):
            target = self._block(0, block, fresh=end - begin == FAN_OUT)
            target[numbers[begin:end] % FAN_OUT] = digests[begin:end]

    def put_zeros(self, first_leaf: int, stop_leaf: int) -> None:
        """Say that the leaves [first_leaf, stop_leaf) are zero, whole subtrees at a time, whatever is stored below.

        A node is zero only if all below it is, so the root that comes out proves all of them. Costs a few blocks
        however many leaves they are. Only of a dry run, since what is stored below is not cleared.
        """
        if self._write or not self._next <= first_leaf <= stop_leaf <= MAX_LEAVES:
            raise ValueError(f"zeros from leaf {first_leaf} to {stop_leaf} after leaf {self._next - 1}")
        self._next = max(self._next, stop_leaf)
        first, stop, level, tails = first_leaf, stop_leaf, 0, []
        while level < DEPTH - 1 and -(-first // FAN_OUT) < stop // FAN_OUT:
            inner, outer = -(-first // FAN_OUT), stop // FAN_OUT
            self._put_zero_nodes(level, first, inner * FAN_OUT)
            tails.append((level, outer * FAN_OUT, stop))
            first, stop, level = inner, outer, level + 1
        for run in ((level, first, stop), *reversed(tails)):
            self._put_zero_nodes(*run)

    def _put_zero_nodes(self, level: int, first: int, stop: int) -> None:
        if first < stop:
            for below in range(level):
                self._close(below)
        while first < stop:
            block, start = divmod(first, FAN_OUT)
            part = min(FAN_OUT - start, stop - first)
            self._block(level, block, fresh=part == FAN_OUT)[start : start + part] = 0
            first += part

    def truncate(self, count_leaves: int) -> None:
        """Make every leaf from `count_leaves` on zero; nothing can be put after it.

        The cost is one block per level: what lies behind the cut is cleared level by
        level, without looking for what is there (after a crash in the middle, a
        node's zero would not prove that its children are).
        """
        if count_leaves < self._next:
            raise ValueError(f"a cut at leaf {count_leaves} after leaf {self._next - 1} was put")
        self._next = MAX_LEAVES + 1
        cut = count_leaves
        for level in range(DEPTH):
            if cut >= FAN_OUT ** (DEPTH - level):
                break
            block, keep = divmod(cut, FAN_OUT)
            self._block(level, block)[keep:] = 0
            self._close(level)
            if self._write:
                self._nodes.clear(level, block + 1)
            cut = block + 1

    def root(self, size_bytes: int) -> bytes:
        """Finish: the root of the resulting tree for a disk of that size. With `write` the tree is stored now."""
        self._next = MAX_LEAVES + 1
        for level in range(DEPTH):
            self._close(level)
        if self._top is None:
            self._top = self._nodes.read(DEPTH, 0)[0].tobytes()
        return root_of(self._top, size_bytes, self.leaf_bytes)

    def _block(self, level: int, block: int, *, fresh: bool = False) -> Digests:
        """The open block of a level, moved on to `block`; `fresh`: all of it is about to be set."""
        current = self._open[level]
        if current is not None and current[0] == block:
            return current[1]
        self._close(level)
        digests = np.zeros((FAN_OUT, DIGEST_BYTES), np.uint8) if fresh else self._nodes.read(level, block)
        self._open[level] = (block, digests)
        return digests

    def _close(self, level: int) -> None:
        """Leave the open block of a level, if there is one."""
        current, self._open[level] = self._open[level], None
        if current is None:
            return
        block, digests = current
        if self._write:
            self._nodes.write(level, block, digests)
        digest = _native.hash_node(digests, level + 1)
        if level + 1 < DEPTH:
            self._block(level + 1, block // FAN_OUT)[block % FAN_OUT] = np.frombuffer(digest, np.uint8)
            return
        self._top = digest
        if self._write:
            top = np.zeros((FAN_OUT, DIGEST_BYTES), np.uint8)
            top[0] = np.frombuffer(digest, np.uint8)
            self._nodes.write(DEPTH, 0, top)
