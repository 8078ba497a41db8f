"""Marked leaves of the head, looked at once more by who reads them: which of them are rotten in truth?

Marks are hints (`damage`): there is room for so many ranges and no more, and a leaf may have been repaired, or replaced
by a commit, since it was marked. So nobody is refused a byte, or given zeros for it, because of a mark alone: the leaf
is hashed and compared with the tree. What differs is rotten, and so is all that is marked of a disk whose tree is
marked itself or cannot be read, since nothing speaks for it.

A commit under way makes leaves differ. Whoever reads looks for its inverse afterwards, as for any byte of the head
(`reader`); what that does not have, since the leaf is rewritten in part, is refused until the commit is done.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np

from replica.delta.ranges import Range, intersection, union
from replica.durable import File, FileSystem
from replica.errors import StorageError
from replica.images.flat import FlatImage
from replica.merkle import FileNodes, MerkleTree, leaf_digests
from replica.model import Disk, DiskId
from replica.store import damage
from replica.store.layout import Layout

WINDOW_LEAVES = 64


class MarkedLeaves:
    """The marks of one replica, and the trees to ask. Thread-safe."""

    def __init__(self, fs: FileSystem, layout: Layout) -> None:
        self._fs, self._layout = fs, layout
        self._marks = damage.load(fs, layout)
        self._mutex = threading.Lock()
        self._resources = ExitStack()
        self._trees: dict[DiskId, File] = {}

    def close(self) -> None:
        with self._mutex:
            self._resources.close()

    def load(self) -> None:
        """Read the marks anew."""
        self._marks = damage.load(self._fs, self._layout)

    def ranges(self, disk: Disk, start: int, stop: int) -> list[Range]:
        """Those of the bytes [start, stop) that are marked, ascending, as of the last `load`."""
        marked = damage.overlapping(self._marks, disk, start, stop)
        return list(intersection(union(marked), ((start, stop),)))

    def rotten(self, disk: Disk, image: FlatImage, start: int, stop: int) -> Iterator[Range]:
        """Those of the bytes [start, stop) that are in rotten leaves, ascending, as of the last `load`. Lazy.

        Raises StorageError if the image cannot be read.
        """
        marked = self.ranges(disk, start, stop)
        try:
            tree = None if disk.id in self._marks.trees else self._tree(disk)
        except StorageError:
            tree = None
        if tree is None:
            yield from marked
        else:
            yield from union(_differing(disk, image, tree, marked))

    def _tree(self, disk: Disk) -> MerkleTree:
        """The tree that has its name now; what was open before stays open, others may read it."""
        with self._mutex:
            file = self._trees.get(disk.id)
            if file is None or not file.has_name():
                file = self._fs.open(self._layout.tree(disk.id))
                self._resources.callback(file.close)
                self._trees[disk.id] = file
            return MerkleTree(FileNodes(file), disk.leaf_bytes)


def _differing(disk: Disk, image: FlatImage, tree: MerkleTree, ranges: list[Range]) -> Iterator[Range]:
    leaf = disk.leaf_bytes
    for start, stop in ranges:
        for first in range(start // leaf, -(-stop // leaf), WINDOW_LEAVES):
            count = min(WINDOW_LEAVES, -(-stop // leaf) - first)
            buffer = memoryview(bytearray(min(count * leaf, disk.size_bytes - first * leaf)))
            image.read_into(first * leaf, buffer)
            wrong = leaf_digests(buffer, first, leaf) != tree.leaves(first, count)
            for number in (first + np.flatnonzero(wrong.any(axis=1))).tolist():
                yield max(start, number * leaf), min(stop, (number + 1) * leaf)
