"""The first pass of apply: check everything, change nothing, and make the inverse.

Leaf by leaf, in pieces of at most 4 MiB (`leaves`): the old leaves are read and
checked against the tree; what the delta covers of them goes to the inverse; then
the delta is laid over the same buffers and the new digests computed. At the end
the roots that will result are known before a byte of the head has changed.

What the inverse carries, for a disk that goes from p to q grains: every grain
the delta covers, and every grain from q to p, which is cut off. It is canonical
as any delta: zeros at or after q are omitted, since growing back makes them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from replica import _native
from replica.delta.change import Delta, DiskChange, check_roots, check_segment, total_bytes
from replica.delta.extents import DATA, ZERO, Rows, as_bytes, grains_of, rows_of, rows_of_grains, stop_of
from replica.delta.head import Head
from replica.delta.leaves import Blank, ByDisk, Leaves, Piece, aligned, pieces, runs_of
from replica.delta.pack import Packer, Sink
from replica.delta.segment import Segment
from replica.errors import BaseMismatchError, DamageError, FormatError
from replica.merkle import Digests, MemoryNodes, MerkleTree, leaf_digests
from replica.model import DIGEST_BYTES, DiskState
from replica.progress import Progress, silent


class LeafDamageError(DamageError):
    """Leaves of the head are not what its tree says: nothing was changed."""

    def __init__(self, disk: str, offset: int, length: int) -> None:
        super().__init__(
            f"disk {disk!r} of the head is damaged: {length} bytes at {offset} are not what its Merkle tree says",
            hint="the storage under the head lost or changed them; the older points do not need these bytes",
        )
        self.disk, self.offset, self.length = disk, offset, length


def prepare(head: Head, delta: Delta, sink: Sink, progress: Progress = silent) -> tuple[DiskState, ...]:
    """Pass 1: check everything and change nothing. Returns the result's disks with their roots.

    The inverse's segments (base: the delta's result, result: its base, the same disk table) go to `sink` in order.

    Raises BaseMismatchError (the head is not the delta's base), FormatError (not canonical), LeafDamageError
    (an old leaf is not what the tree says), RootMismatchError (another result than the manifest names).
    """
    if head.state != delta.base:
        raise BaseMismatchError(
            f"delta {delta.delta_id} starts from state {delta.base.delta_id}, the head is {head.state.delta_id}"
        )
    packer = Packer(sink)
    segments = ByDisk((s.disk, s) for s in delta.segments())
    total, done, roots = total_bytes(delta, progress), 0, []
    for index, change in enumerate(delta.disks):
        one = _PrepareDisk(head, index, change, packer)
        for rows, payload in aligned(one.parts(segments.take(index)), one.per_leaf, change.grain_bytes):
            for piece in pieces(rows, payload, change, one.tree):
                one.add(piece)
                done += len(piece.payload) if isinstance(piece, Piece) else 0
                progress(done, total)
        root = one.finish()
        if change.after:
            roots.append(DiskState(change.after, root))
    segments.finish()
    packer.flush()
    return check_roots(tuple(roots), delta.result)


class _PrepareDisk:
    """One disk's part of pass 1."""

    def __init__(self, head: Head, index: int, change: DiskChange, packer: Packer) -> None:
        self._head, self._index, self._change, self._packer = head, index, change, packer
        self.per_leaf = change.leaf_bytes // change.grain_bytes
        self.tree = head.tree(change.disk_id) if change.before else MerkleTree(MemoryNodes(), change.leaf_bytes)
        self._update = self.tree.update(write=False)
        self._covered_stop = 0

    def parts(self, segments: Iterator[Segment]) -> Iterator[tuple[Rows, memoryview]]:
        """The delta's rows, and as the last one what is cut off, as zeros."""
        change = self._change
        for segment in segments:
            check_segment(change, segment)
            self._covered_stop = stop_of(segment.extents)
            yield segment.extents, as_bytes(segment.payload).data
        self._check_cut()
        if change.result_grains < change.base_grains:
            cut = change.base_grains - change.result_grains
            yield rows_of([(change.result_grains, cut, ZERO)]), memoryview(b"")

    def _check_cut(self) -> None:
        """FormatError if the disk is cut inside a grain that loses content and is not in the delta."""
        change = self._change
        stop = min(change.base_bytes, change.result_grains * change.grain_bytes)
        if self._covered_stop < change.result_grains and change.result_bytes < stop:
            rest = np.zeros(stop - change.result_bytes, dtype=np.uint8)
            self._head.read_into(change.disk_id, change.result_bytes, rest.data)
            if rest.any():
                raise FormatError(f"the delta cuts disk {change.disk.name!r} inside a grain that it does not carry")

    def add(self, piece: Piece | Blank) -> None:
        """Inverse and new digests of the next leaves."""
        change = self._change
        if isinstance(piece, Blank):
            if piece.first < change.result_grains:
                rows = rows_of([(piece.first, piece.stop - piece.first, ZERO)])
                self._packer.add(self._index, change.grain_bytes, rows, b"")
            return
        grains = grains_of(piece.rows).astype(np.int64)
        slots = np.searchsorted(piece.leaves, grains // self.per_leaf)
        places = slots * self.per_leaf + grains % self.per_leaf
        leaves = self._read(piece.leaves, np.bincount(slots, minlength=len(piece.leaves)) == self.per_leaf)
        self._emit(leaves, grains, places)
        data = np.repeat(piece.rows["data"] == DATA, piece.rows["count"].astype(np.int64))
        view = leaves.reshape(-1, change.grain_bytes)
        view[places[data]] = as_bytes(piece.payload).reshape(-1, change.grain_bytes)
        view[places[~data]] = 0
        self._put(piece.leaves, leaves)

    def _read(self, numbers: Leaves, covered: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Digests:
        """The old leaves, u8[n, leaf_bytes], checked against the tree. LeafDamageError.

        A leaf that is covered as a whole and zero by the tree is not read: nothing of it will be left.
        """
        change = self._change
        leaves = np.zeros((len(numbers), change.leaf_bytes), dtype=np.uint8)
        stored = np.zeros((len(numbers), DIGEST_BYTES), dtype=np.uint8)
        for a, b in runs_of(numbers):
            stored[a:b] = self.tree.leaves(int(numbers[a]), b - a)
        wanted = np.flatnonzero((stored.any(axis=1) | ~covered) & (numbers * change.leaf_bytes < change.base_bytes))
        found = np.zeros_like(stored)
        for a, b in runs_of(numbers[wanted]):
            slot, count, first = int(wanted[a]), b - a, int(numbers[wanted[a]])
            offset = first * change.leaf_bytes
            part = leaves[slot : slot + count].reshape(-1)
            self._head.read_into(change.disk_id, offset, part[: change.base_bytes - offset].data)
            found[slot : slot + count] = leaf_digests(part.data, first, change.leaf_bytes)
        bad = np.flatnonzero((found != stored).any(axis=1))
        if len(bad):
            offset = int(numbers[bad[0]]) * change.leaf_bytes
            raise LeafDamageError(change.disk.name, offset, change.leaf_bytes)
        return leaves

    def _emit(self, leaves: Digests, grains: Leaves, places: Leaves) -> None:
        """The covered grains' old content, to the inverse."""
        change = self._change
        zero = np.empty(leaves.size // change.grain_bytes, dtype=np.uint8)
        _native.zeros(leaves.data, change.grain_bytes, zero.data)
        data = zero[places] == 0
        kept = (grains < change.base_grains) & (data | (grains < change.result_grains))
        rows = rows_of_grains(grains[kept].astype(np.uint64), data[kept])
        payload = leaves.reshape(-1, change.grain_bytes)[places[kept & data]]
        self._packer.add(self._index, change.grain_bytes, rows, payload.reshape(-1).data)

    def _put(self, numbers: Leaves, leaves: Digests) -> None:
        """The new digests, of the leaves that will be there."""
        change = self._change
        count = int(np.searchsorted(numbers * change.leaf_bytes, change.result_bytes, "left"))
        for a, b in runs_of(numbers[:count]):
            first = int(numbers[a])
            self._update.put(first, leaf_digests(leaves[a:b].reshape(-1).data, first, change.leaf_bytes))

    def finish(self) -> bytes:
        """The root of the result."""
        change = self._change
        if change.after and change.result_bytes < change.base_bytes:
            self._update.truncate(change.after.count_leaves)
        return self._update.root(change.result_bytes)
