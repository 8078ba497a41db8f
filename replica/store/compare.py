"""What a sender may ask of the head to find where it differs: nodes of its Merkle tree, keyed digests of its grains.

    with StillHead(fs, layout, base) as head:
        head.nodes(disk_id, level, [(first, count), …])
        head.grains(disk_id, secret, [(first leaf, count), …], limit_bytes)

Every answer is about the head that one delta made and no other: the head's lock
is held shared while it is read, so that image, tree and state belong together,
and a head that is another by now, or is just being rewritten, is refused.

A sender builds its trackers from these answers, so a leaf that rotted must not
pass for what the tree says: every leaf is hashed before its grains are told,
and one that is not what it should be is marked as damaged. The tree itself is
proven by the sender, from the root that it knows.

Works beside the writer, in the same process or another. For one thread.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Self

import numpy as np

from replica import _native
from replica.durable import FileSystem
from replica.errors import BaseMismatchError, BusyError, ProtocolError, UnknownMachineError
from replica.images.flat import FlatImage
from replica.merkle import FileNodes, MerkleTree, leaf_digests
from replica.model import DeltaId, Disk, DiskId, State
from replica.store.layout import Layout, load_state, read_identity

Ranges = list[tuple[int, int]]
"""(first, count), ascending, disjoint."""

PIECE_BYTES = 4 << 20


class StillHead:
    """The head that `base` made, held still while the block runs. BusyError, BaseMismatchError."""

    def __init__(self, fs: FileSystem, layout: Layout, base: DeltaId) -> None:
        self._fs = fs
        self._layout = layout
        self._base = base
        self._resources = ExitStack()

    def __enter__(self) -> Self:
        busy = f"the head in {self._layout.root} is just being rewritten"
        with ExitStack() as undo:
            lock = self._fs.lock(self._layout.head_lock, shared=True, busy=busy)
            undo.callback(lock.release)
            state = load_state(self._fs, self._layout)
            if state.applying is not None:
                raise BusyError(busy, hint="try again when it is done")
            if state.head.delta_id != self._base:
                raise BaseMismatchError(
                    f"what was asked is about state {self._base}, but the replica's head is {state.head.delta_id}",
                    head=state.head.delta_id,
                )
            self._head: State = state.head
            self._resources = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def nodes(self, disk_id: DiskId, level: int, ranges: Ranges) -> bytes:
        """32 bytes per node. UnknownMachineError for a disk it has not, ProtocolError for nodes no tree has."""
        disk = self._disk(disk_id)
        with self._fs.open(self._layout.tree(disk_id)) as file:
            tree = MerkleTree(FileNodes(file), disk.leaf_bytes)
            try:
                return b"".join(tree.level(level, first, count).tobytes() for first, count in ranges)
            except ValueError as error:
                raise ProtocolError(str(error)) from error

    def grains(self, disk_id: DiskId, secret: bytes, ranges: Ranges, limit_bytes: int) -> bytes:
        """u64 per grain of these leaves, in whole leaves, then a byte per leaf: 1, or 0 if it is damaged."""
        disk = self._disk(disk_id)
        total = sum(count for _, count in ranges)
        if total * disk.leaf_bytes > limit_bytes:
            raise ProtocolError(f"{total} leaves were asked for; {limit_bytes // disk.leaf_bytes} can be")
        if ranges and sum(ranges[-1]) > disk.count_leaves:
            raise ProtocolError(f"disk {disk.name!r} has {disk.count_leaves} leaves, not {sum(ranges[-1])}")
        digests, whole = np.zeros((total, disk.grains_per_leaf), "<u8"), np.zeros(total, np.uint8)
        head_format = read_identity(self._fs, self._layout).head_format
        done = 0
        with (
            self._fs.open(self._layout.tree(disk_id)) as file,
            FlatImage.open(
                self._fs, self._layout.image(disk_id), head_format, size_bytes=disk.size_bytes, unique_id=disk_id
            ) as image,
        ):
            tree = MerkleTree(FileNodes(file), disk.leaf_bytes)
            step = PIECE_BYTES // disk.leaf_bytes
            for first, count in ranges:
                for start in range(first, first + count, step):
                    stop = min(start + step, first + count)
                    part = slice(done, done + stop - start)
                    _look(image, tree, disk, secret, start, digests[part], whole[part])
                    done = part.stop
        digests[whole == 0] = 0
        return digests.tobytes() + whole.tobytes()

    def _disk(self, disk_id: DiskId) -> Disk:
        entry = self._head.disk(disk_id)
        if entry is None:
            raise UnknownMachineError(f"the head has no disk {disk_id}")
        return entry.disk


def _look(
    image: FlatImage,
    tree: MerkleTree,
    disk: Disk,
    secret: bytes,
    first_leaf: int,
    digests: np.ndarray[tuple[int, int], np.dtype[np.uint64]],
    whole: np.ndarray[tuple[int], np.dtype[np.uint8]],
) -> None:
    """Fill in consecutive leaves, one piece of the image."""
    buffer = np.zeros(len(whole) * disk.leaf_bytes, np.uint8)
    offset = first_leaf * disk.leaf_bytes
    inside = min(len(buffer), disk.size_bytes - offset)
    image.read_into(offset, buffer[:inside].data)
    found = leaf_digests(buffer.data, first_leaf, disk.leaf_bytes)
    whole[:] = (found == tree.leaves(first_leaf, len(whole))).all(axis=1)
    dirty = np.empty(digests.size, np.uint8)
    _native.scan(buffer, disk.grain_bytes, secret, None, digests.reshape(-1), dirty)
