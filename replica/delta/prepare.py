"""The first pass of apply: check everything, change nothing, and make the inverse.

Leaf by leaf, in pieces of at most 4 MiB (`leaves`): the old leaves are read and
checked against the tree; what the delta covers of them goes to the inverse; then
the delta is laid over the same buffers and the new digests computed. Several
threads look at pieces, and what they found is taken in order. At the end the
roots that will result are known before a byte of the head has changed.

What the inverse carries, for a disk that goes from p to q grains: every grain
the delta covers, and every grain from q to p, which is cut off. It is canonical
as any delta: zeros at or after q are omitted, since growing back makes them.

A *rotten* leaf, whose content is not what the tree says, is never sealed as if it
were good. Where the delta replaces all of it, what it brings may tell what was there
(`recover`). The others that are met are reported together (RottenLeavesError), so that
they can be sent again. Only if a leaf was known to be rotten before (`rotten`), and the
delta replaces every grain of it, the delta passes all the same: its old grains are LOST
in the inverse. What the tree says is zero is known without the image; what it says of any old leaf
counts only if the head's committed root comes out of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from replica import _native
from replica.delta.change import Delta, DiskChange, check_roots, check_segment, total_bytes
from replica.delta.extents import DATA, LOST, ZERO, Rows, as_bytes, grains_of, rows_of, rows_of_grains, stop_of
from replica.delta.head import Head
from replica.delta.leaves import PIECE_BYTES, Blank, ByDisk, Piece, aligned, pieces, ranges_of
from replica.delta.pack import Packer, Sink
from replica.delta.recover import recover
from replica.delta.segment import Segment
from replica.errors import BaseMismatchError, FormatError, LeafDamageError
from replica.merkle import Digests, Leaves, MemoryNodes, MerkleTree, leaf_digests_at
from replica.model import DIGEST_BYTES, DamagedLeaves, DiskId, DiskState
from replica.pipeline import Bytes, in_order
from replica.progress import Progress, silent

Flags = npt.NDArray[np.bool_]

THREADS = 3
"""That look at pieces: one that waits for the device lets the others hash."""
MAX_DAMAGED = 1 << 16
"""Rotten leaves that one pass counts; what is beyond them is found the next time."""


class RottenLeavesError(LeafDamageError):
    """`LeafDamageError` where it is found: `leaves` are all of them, ascending per disk."""

    def __init__(self, message: str, leaves: tuple[DamagedLeaves, ...], trees: tuple[DiskId, ...] = ()) -> None:
        super().__init__(
            message,
            hint="the storage under the head lost or changed them; the next sync sends them again, and points that "
            "do not read them can be restored",
        )
        self.leaves = leaves
        self.trees = trees
        """Disks whose stored tree does not have the root that the head's state names."""


def prepare(
    head: Head,
    delta: Delta,
    sink: Sink,
    progress: Progress = silent,
    *,
    rotten: Collection[DamagedLeaves] = (),
) -> tuple[DiskState, ...]:
    """Pass 1: check everything and change nothing. Returns the result's disks with their roots.

    The inverse's segments (base: the delta's result, result: its base, the same disk table) go to `sink` in order.
    `rotten` are leaves that are known to be damaged and that nobody could send again.

    Raises BaseMismatchError (the head is not the delta's base), FormatError (not canonical), RottenLeavesError
    (old leaves are not what the tree says), RootMismatchError (another result than the manifest names).
    """
    if head.state != delta.base:
        raise BaseMismatchError(
            f"delta {delta.delta_id} starts from state {delta.base.delta_id}, the head is {head.state.delta_id}"
        )
    packer = Packer(sink)
    segments = ByDisk((s.disk, s) for s in delta.segments())
    total, done, roots = total_bytes(delta, progress), 0, []
    damaged: list[DamagedLeaves] = []
    unfit: list[DiskId] = []
    for index, change in enumerate(delta.disks):
        one = _PrepareDisk(head, index, change, packer, [r for r in rotten if r.disk_id == change.disk_id])
        plan = one.plan(one.parts(segments.take(index)))
        with closing(in_order(one.look, plan, PIECE_BYTES, THREADS)) as looks:
            for looked in looks:
                one.take(looked)
                done += 0 if isinstance(looked, Blank) else len(looked.piece.payload)
                progress(done, total)
        root = one.finish()
        damaged += one.damaged
        base = delta.base.disk(change.disk_id)
        if base is not None and one.root_before != base.root:
            unfit.append(change.disk_id)
        if change.after:
            roots.append(DiskState(change.after, root))
    segments.finish()
    packer.flush()
    if damaged or unfit:
        raise _rotten(delta, damaged, tuple(unfit))
    return check_roots(tuple(roots), delta.result)


def _rotten(delta: Delta, damaged: list[DamagedLeaves], unfit: tuple[DiskId, ...]) -> RottenLeavesError:
    if not damaged:
        names = ", ".join(repr(c.disk.name) for c in delta.disks if c.disk_id in unfit)
        return RottenLeavesError(f"the Merkle tree of disk {names} of the head is damaged", (), unfit)
    damaged = sorted(damaged, key=lambda leaves: (leaves.disk_id.bytes, leaves.first))
    disk = next(c for c in delta.disks if c.disk_id == damaged[0].disk_id)
    offset = damaged[0].first * disk.leaf_bytes
    length = min(damaged[0].stop * disk.leaf_bytes, disk.base_bytes) - offset
    more = f", and {len(damaged) - 1} more leaves" if len(damaged) > 1 else ""
    return RottenLeavesError(
        f"disk {disk.disk.name!r} of the head is damaged: {length} bytes at {offset} are not what its Merkle tree "
        f"says{more}",
        tuple(damaged),
        unfit,
    )


_Plan = tuple[Piece | Blank, Digests]
"""What is to be looked at, and what the tree says of its leaves."""
_NO_DIGESTS = np.empty((0, DIGEST_BYTES), dtype=np.uint8)


@dataclass(frozen=True, eq=False)
class _Rotten:
    """Leaves of which some (`bad`) are not what `stored` says: as they are, and as they will be."""

    old: Digests
    new: Digests
    stored: Digests
    bad: Flags
    covered: Flags
    grains: Leaves
    slots: Leaves
    places: Leaves


@dataclass(frozen=True, eq=False)
class _Looked:
    """What a piece leads to: its part of the inverse and its new digests, or why they are to be told otherwise."""

    piece: Piece
    inverse: tuple[Rows, memoryview] | None
    digests: Digests | None
    rotten: _Rotten | None


class _PrepareDisk:
    """One disk's part of pass 1: pieces are looked at by several threads, and taken in their order by one."""

    def __init__(self, head: Head, index: int, change: DiskChange, packer: Packer, rotten: list[DamagedLeaves]) -> None:
        self._head, self._index, self._change, self._packer = head, index, change, packer
        self.per_leaf = change.leaf_bytes // change.grain_bytes
        self.tree = head.tree(change.disk_id) if change.before else MerkleTree(MemoryNodes(), change.leaf_bytes)
        self._update = self.tree.update(write=False)
        self._before = self.tree.update(write=False)
        """Is put what the tree says of the old leaves: its root proves that they are those of the head's state."""
        self.root_before = b""
        """What `_before` proves; of no state if the tree contradicts itself."""
        self._covered_stop = 0
        self._rotten = rotten
        self.damaged: list[DamagedLeaves] = []
        self._boundary = _boundary_leaf(change)
        """The leaf where the disk ends before or after: read back at the end, so it is checked like the others."""

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

    def plan(self, parts: Iterator[tuple[Rows, memoryview]]) -> Iterator[_Plan]:
        """What is to be looked at, in order; the tree is asked here, in the caller's thread."""
        for rows, payload in aligned(parts, self.per_leaf, self._change.grain_bytes):
            for piece in pieces(rows, payload, self._change, self.tree):
                if isinstance(piece, Blank):
                    self._before.put_zeros(piece.first // self.per_leaf, piece.stop // self.per_leaf)
                    yield piece, _NO_DIGESTS
                    continue
                stored = self.tree.leaves_at(piece.leaves)
                self._before.put_at(piece.leaves, stored)
                yield piece, stored

    def look(self, plan: _Plan, memory: Bytes) -> _Looked | Blank:
        """Read and check the old leaves, make of them what goes to the inverse, and then the new ones. Thread-safe."""
        piece, stored = plan
        if isinstance(piece, Blank):
            return piece
        grains = grains_of(piece.rows).astype(np.int64)
        slots = np.searchsorted(piece.leaves, grains // self.per_leaf)
        places = slots * self.per_leaf + grains % self.per_leaf
        covered = self._covered(piece.leaves, slots[grains < self._change.base_grains])
        leaves = memory[: len(piece.leaves) * self._change.leaf_bytes].reshape(len(piece.leaves), -1)
        bad = self._read(piece.leaves, covered, stored, leaves)
        if bad.any():
            old, new = leaves.copy(), leaves.copy()  # the memory is the next one's
            self._lay(piece, new, places)
            return _Looked(piece, None, None, _Rotten(old, new, stored, bad, covered, grains, slots, places))
        inverse = self._inverse(leaves, grains, places, np.zeros(len(grains), dtype=np.bool_))
        self._lay(piece, leaves, places)
        return _Looked(piece, inverse, self._digests(piece.leaves, leaves), None)

    def take(self, looked: _Looked | Blank) -> None:
        """The inverse and the new digests of what was looked at, in order."""
        if isinstance(looked, Blank):
            self._take_blank(looked)
            return
        numbers, inverse, digests = looked.piece.leaves, looked.inverse, looked.digests
        if self._boundary in numbers:
            self._boundary = -1
        if (rotten := looked.rotten) is not None:
            lost = self._recover(numbers, rotten)
            self._report(numbers[rotten.bad & ~rotten.covered])
            inverse = self._inverse(rotten.old, rotten.grains, rotten.places, lost[rotten.slots])
            digests = self._digests(numbers, rotten.new)
        assert inverse is not None and digests is not None
        self._packer.add(self._index, self._change.grain_bytes, *inverse)
        self._update.put_at(numbers[: len(digests)], digests)

    def _take_blank(self, blank: Blank) -> None:
        if blank.first <= self._boundary * self.per_leaf < blank.stop:
            self._boundary = -1
        if blank.first < self._change.result_grains:
            rows = rows_of([(blank.first, blank.stop - blank.first, ZERO)])
            self._packer.add(self._index, self._change.grain_bytes, rows, b"")

    def _lay(self, piece: Piece, leaves: Digests, places: Leaves) -> None:
        """The delta's grains, over the old ones."""
        data = np.repeat(piece.rows["data"] == DATA, piece.rows["count"].astype(np.int64))
        view = leaves.reshape(-1, self._change.grain_bytes)
        view[places[data]] = as_bytes(piece.payload).reshape(-1, self._change.grain_bytes)
        view[places[~data]] = 0

    def _covered(self, numbers: Leaves, slots: Leaves) -> Flags:
        """Whether every grain that a leaf has in the base is replaced or cut off. `slots`: the leaf of each that is."""
        there = np.clip(self._change.base_grains - numbers * self.per_leaf, 0, self.per_leaf)
        return np.asarray(np.bincount(slots, minlength=len(numbers)) == there)

    def _read(self, numbers: Leaves, covered: Flags, stored: Digests, leaves: Digests) -> Flags:
        """Fill `leaves`, u8[n, leaf_bytes], with the old ones; which of them are not what `stored` says.

        A leaf that is covered as a whole and zero by the tree is not read: nothing of it will be left.
        """
        change = self._change
        wanted = np.flatnonzero((stored.any(axis=1) | ~covered) & (numbers * change.leaf_bytes < change.base_bytes))
        found = np.zeros_like(stored)
        all_wanted = len(wanted) == len(numbers)
        if not all_wanted:
            leaves[:] = 0
        if len(wanted):
            part = leaves if all_wanted else np.empty((len(wanted), change.leaf_bytes), np.uint8)
            places = ranges_of(numbers[wanted], change.leaf_bytes, change.base_bytes)
            flat, length = part.reshape(-1), sum(n for _, n in places)
            self._head.read_ranges(change.disk_id, places, flat[:length].data)
            flat[length:] = 0
            found[wanted] = leaf_digests_at(part.data, numbers[wanted], change.leaf_bytes)
            if part is not leaves:
                leaves[wanted] = part
        return np.asarray((found != stored).any(axis=1))

    def _recover(self, numbers: Leaves, rotten: _Rotten) -> Flags:
        """Put back into `old` what can be told of rotten ones that are replaced; the lost ones (zeros then)."""
        lost = np.zeros(len(numbers), dtype=np.bool_)
        known = self._is_rotten(numbers)
        for slot in np.flatnonzero(rotten.bad & rotten.covered).tolist():
            number, digest = int(numbers[slot]), rotten.stored[slot].tobytes()
            found = recover(rotten.old[slot], rotten.new[slot], self._change.grain_bytes, number, digest)
            if found is None and not known[slot]:
                self._report(numbers[slot : slot + 1])
            lost[slot] = found is None
            rotten.old[slot] = 0 if found is None else found
        return lost

    def _is_rotten(self, numbers: Leaves) -> Flags:
        known = np.zeros(len(numbers), dtype=np.bool_)
        for leaves in self._rotten:
            known |= (numbers >= leaves.first) & (numbers < leaves.stop)
        return known

    def _report(self, numbers: Leaves) -> None:
        room = MAX_DAMAGED - len(self.damaged)
        self.damaged += [DamagedLeaves(self._change.disk_id, n, n + 1) for n in numbers[:room].tolist()]

    def _inverse(self, leaves: Digests, grains: Leaves, places: Leaves, lost: Flags) -> tuple[Rows, memoryview]:
        """The covered grains' old content, as rows and payload; `lost`: which of them have none any more."""
        change = self._change
        zero = np.empty(leaves.size // change.grain_bytes, dtype=np.uint8)
        _native.zeros(leaves.data, change.grain_bytes, zero.data)
        data = (zero[places] == 0) & ~lost
        kept = (grains < change.base_grains) & (data | lost | (grains < change.result_grains))
        kinds = np.where(lost, np.uint8(LOST), np.where(data, np.uint8(DATA), np.uint8(ZERO)))
        rows = rows_of_grains(grains[kept].astype(np.uint64), kinds[kept])
        payload = leaves.reshape(-1, change.grain_bytes)[places[kept & data]]
        return rows, payload.reshape(-1).data

    def _digests(self, numbers: Leaves, leaves: Digests) -> Digests:
        """The new digests, of the leaves that will be there."""
        change = self._change
        count = int(np.searchsorted(numbers * change.leaf_bytes, change.result_bytes, "left"))
        return leaf_digests_at(leaves[:count].data, numbers[:count], change.leaf_bytes)

    def finish(self) -> bytes:
        """The root of the result."""
        change = self._change
        self.root_before = self._before.root(change.base_bytes)
        if self._boundary >= 0:
            number = np.array([self._boundary])
            leaf = np.empty((1, change.leaf_bytes), dtype=np.uint8)
            stored = self.tree.leaves_at(number)
            self._report(number[self._read(number, np.zeros(1, dtype=np.bool_), stored, leaf)])
            proof = self.tree.update(write=False)  # of its own, since larger leaves may have been put already
            proof.put(self._boundary, self.tree.leaves(self._boundary, 1))
            if proof.root(change.base_bytes) != self.root_before:
                self.root_before = b""
        if change.after and change.result_bytes < change.base_bytes:
            self._update.truncate(change.after.count_leaves)
        return self._update.root(change.result_bytes)


def _boundary_leaf(change: DiskChange) -> int:
    """The leaf in which a resized disk ends before or after, -1 if it ends between two of them."""
    smaller = min(change.base_bytes, change.result_bytes)
    inside = change.base_bytes != change.result_bytes and smaller % change.leaf_bytes
    return smaller // change.leaf_bytes if inside else -1
