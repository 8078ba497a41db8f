"""Repair of the head in place: rotten leaves, and trees that are not the image's.

What is right is decided by the committed Merkle root and nothing else: a digest is a
leaf's if the root comes out when it is put in the leaf's place (`_proves`). Where a
leaf and the tree differ, the leaf's candidates are asked in this order, and the first
that is proven wins:

    what the image has                    then the tree's own digest is what rotted
    zeros
    what the sender sent, and every mixture of its grains with the image's (`delta.recover`)

and image and tree become it: written, synced, read back past the page cache, compared.
None of them may be: then the leaf stays marked, and so does the rest of the world.

A tree that proves nothing at all (lost, cut, an older copy, rot in its inner nodes) is
made anew and compared with the committed root before it takes the old one's place
(`rebuild_tree`): from the stored leaves; from the image; from whichever of both a block's
node speaks for. So rot on one side only, or on both in different places, leaves the other
side to prove it.

Only the process with the replica's lock repairs, never during a commit, and readers may
read meanwhile: what changes under them was not what they should have read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from replica import _native
from replica.delta.ranges import union
from replica.delta.recover import Leaf, digest_of, mixtures
from replica.durable import FileSystem
from replica.errors import DamageError, ProtocolError
from replica.images.flat import FlatImage
from replica.merkle import FAN_OUT, Digests, FileNodes, MemoryNodes, MerkleTree, leaf_digests
from replica.model import DIGEST_BYTES, DamagedLeaves, Disk, DiskId, State
from replica.store import damage
from replica.store.head import FileHead
from replica.store.layout import HeadFormat, Layout

log = logging.getLogger(__name__)

MAX_LEAVES = 4096
"""That are looked at, or asked for, in one go: 64 MiB."""


class _Fix(NamedTuple):
    """What a leaf is to become. `write`: its image, too; else only the tree's digest is wrong."""

    number: int
    content: Leaf
    write: bool


class HeadRepair:
    """Repairs one head between two commits. Not thread-safe; whoever makes one keeps commits away."""

    def __init__(self, fs: FileSystem, layout: Layout, head: FileHead) -> None:
        self._fs, self._layout, self._head = fs, layout, head

    # --- leaves ---

    def put(self, disk_id: DiskId, first: int, content: memoryview) -> tuple[DamagedLeaves, ...]:
        """Use `content`, what the source holds in consecutive leaves from `first` on, to repair them.

        Returns those that are damaged still. Idempotent. ProtocolError if the disk has no such leaves.
        """
        disk = self._disk(disk_id)
        offset = first * disk.leaf_bytes
        stop = min(offset + len(content), disk.size_bytes)
        if (
            not 0 <= offset < stop
            or offset + len(content) != stop
            or (stop % disk.leaf_bytes and stop < disk.size_bytes)
        ):
            raise ProtocolError(f"{len(content)} bytes from leaf {first} on are no leaves of disk {disk.name!r}")
        count = -(-len(content) // disk.leaf_bytes)
        sent = np.zeros((count, disk.leaf_bytes), dtype=np.uint8)
        sent.reshape(-1)[: len(content)] = np.frombuffer(content, dtype=np.uint8)
        return self._repair(disk, [(first + index, sent[index]) for index in range(count)])

    def heal(self, leaves: Iterable[DamagedLeaves], trees: Iterable[DiskId] = ()) -> bool:
        """Repair what needs nothing from the other side: these, and the trees that are marked. Whether any was."""
        wanted = damage.first_of(leaves, MAX_LEAVES)
        healed = False
        for entry in self._head.state.disks:
            disk, marked = entry.disk, entry.disk.id in {*trees, *damage.load(self._fs, self._layout).trees}
            mine = [n for d in wanted if d.disk_id == disk.id for n in range(d.first, d.stop)]
            numbers = [n for n in mine if n < disk.count_leaves]
            left = self._repair(disk, [(n, None) for n in numbers])
            if (marked and self.rebuild_tree(disk.id)) or (
                left and (self.tree_fits(disk.id) or self.rebuild_tree(disk.id))
            ):
                healed |= marked
                left = self._repair(disk, [(n, None) for n in numbers])
            healed |= sum(d.stop - d.first for d in left) < len(numbers)
        return healed

    def _repair(self, disk: Disk, leaves: Sequence[tuple[int, Leaf | None]]) -> tuple[DamagedLeaves, ...]:
        good: list[int] = []
        bad: list[int] = []
        fixes: list[_Fix] = []
        for number, sent in leaves:
            fix = self._judge(disk, number, sent)
            if fix is None:
                bad.append(number)
            elif fix.write or self._stored(disk, number) != digest_of(fix.content, number):
                fixes.append(fix)
            else:
                good.append(number)
        if fixes:
            with self._fs.lock(self._layout.head_lock, wait=True):
                self._write(disk, fixes)
        repaired = [DamagedLeaves(disk.id, n, n + 1) for n in (*good, *(fix.number for fix in fixes))]
        damage.clear(self._fs, self._layout, repaired)
        return damage.joined(DamagedLeaves(disk.id, n, n + 1) for n in bad)

    def _judge(self, disk: Disk, number: int, sent: Leaf | None) -> _Fix | None:
        """The content of a leaf that the committed root proves; None if none of what is at hand is it."""
        own = self._read(disk, number)
        candidates = [own, np.zeros_like(own)]
        if sent is not None:
            candidates += mixtures(own, sent, disk.grain_bytes)
        tried: set[bytes] = set()
        for candidate in candidates:
            digest = digest_of(candidate, number)
            if digest not in tried and self._proves(disk, number, digest):
                return _Fix(number, candidate, write=candidate is not own)
            tried.add(digest)
        return None

    def _proves(self, disk: Disk, number: int, digest: bytes) -> bool:
        """Whether the committed root is what comes out with `digest` as this leaf's."""
        update = self._head.tree(disk.id).update(write=False)
        update.put(number, np.frombuffer(digest, dtype=np.uint8).reshape(1, DIGEST_BYTES))
        return update.root(disk.size_bytes) == self._root(disk)

    def _write(self, disk: Disk, fixes: list[_Fix]) -> None:
        """Image and tree, each its barrier; then both are what the committed root says, or DamageError."""
        update = self._head.tree(disk.id).update(write=True)
        for number, content, write in fixes:
            if write:
                offset = number * disk.leaf_bytes
                self._head.write(disk.id, offset, content[: disk.size_bytes - offset].data)
            update.put(number, leaf_digests(content.data, number, disk.leaf_bytes))
        update.root(disk.size_bytes)
        self._head.flush()
        for number, content, _ in fixes:
            if not np.array_equal(self._read(disk, number), content):
                offset = number * disk.leaf_bytes
                raise DamageError(
                    f"disk {disk.name!r} of the head cannot be repaired: what was written at {offset} is not what is "
                    "read there",
                    hint="the storage under the head fails; move the replica's directory to another one",
                )

    def _read(self, disk: Disk, number: int) -> Leaf:
        """The leaf as the device has it: after a sync that failed the page cache may have what is nowhere else."""
        leaf = np.zeros(disk.leaf_bytes, dtype=np.uint8)
        offset = number * disk.leaf_bytes
        self._head.drop_cache(disk.id, offset, disk.leaf_bytes)
        self._head.read_into(disk.id, offset, leaf[: disk.size_bytes - offset].data)
        return leaf

    def _stored(self, disk: Disk, number: int) -> bytes:
        return bytes(self._head.tree(disk.id).leaves(number, 1)[0])

    # --- trees ---

    def contradicting(self, marks: damage.Marks) -> list[DiskId]:
        """Disks of marked leaves, not marked themselves, whose tree does not even prove its own digest of the first."""
        found: list[DiskId] = []
        for entry in self._head.state.disks:
            disk, marked = entry.disk, marks.of(entry.disk.id)
            if not marked or disk.id in marks.trees or marked[0].first >= disk.count_leaves:
                continue
            number = marked[0].first
            if not self._proves(disk, number, self._stored(disk, number)):
                found.append(disk.id)
        return found

    def tree_fits(self, disk_id: DiskId) -> bool:
        """Whether the stored leaves and the stored root both give the committed root."""
        disk = self._disk(disk_id)
        tree = self._head.tree(disk_id)
        fits = tree.root(disk.size_bytes) == self._root(disk)
        fits = fits and self._root_of(disk, self._stored_blocks(disk)) == self._root(disk)
        if fits:
            damage.clear(self._fs, self._layout, (), [disk_id])
        return fits

    def rebuild_tree(self, disk_id: DiskId) -> bool:
        """Make the tree anew if some way of making it gives the committed root; whether there was one."""
        disk = self._disk(disk_id)
        for blocks in (self._stored_blocks, self._image_blocks, self._mixed_blocks):
            path = self._layout.head / f".{disk.id}.tree.tmp"
            self._fs.unlink(path)
            try:
                with self._fs.create(path) as file:
                    update = MerkleTree(FileNodes(file), disk.leaf_bytes).update(write=True)
                    for block, digests in blocks(disk):
                        update.put(block * FAN_OUT, digests)
                    if update.root(disk.size_bytes) != self._root(disk):
                        continue
                    file.sync()
                with self._fs.lock(self._layout.head_lock, wait=True):
                    self._fs.publish(path, self._layout.tree(disk.id))
                self._head.reopen_tree(disk.id)
                damage.clear(self._fs, self._layout, (), [disk.id])
                return True
            finally:
                self._fs.unlink(path)
        return False

    def _root_of(self, disk: Disk, blocks: Iterator[tuple[int, Digests]]) -> bytes:
        update = MerkleTree(MemoryNodes(), disk.leaf_bytes).update(write=False)
        for block, digests in blocks:
            update.put(block * FAN_OUT, digests)
        return update.root(disk.size_bytes)

    def _stored_blocks(self, disk: Disk) -> Iterator[tuple[int, Digests]]:
        """(block, its 256 digests) as they are stored; what is left out is zero."""
        tree = self._head.tree(disk.id)
        for first, stop in tree.stored_leaves(disk.count_leaves):
            for number in range(first, stop, FAN_OUT):
                count = min(FAN_OUT, disk.count_leaves - number)
                yield number // FAN_OUT, tree.leaves(number, count)

    def _image_blocks(self, disk: Disk) -> Iterator[tuple[int, Digests]]:
        """The same as the image has them; a hole is zero."""
        for block in _blocks(disk, self._head.allocated(disk.id)):
            yield block, self._of_image(disk, block)

    def _mixed_blocks(self, disk: Disk) -> Iterator[tuple[int, Digests]]:
        """Per block what its stored node speaks for: the stored digests, else the image's."""
        tree = self._head.tree(disk.id)
        leaf = disk.leaf_bytes
        stored = ((first * leaf, stop * leaf) for first, stop in tree.stored_leaves(disk.count_leaves))
        for block in _blocks(disk, union(self._head.allocated(disk.id), stored)):
            count = min(FAN_OUT, disk.count_leaves - block * FAN_OUT)
            whole = np.zeros((FAN_OUT, DIGEST_BYTES), np.uint8)
            whole[:count] = tree.leaves(block * FAN_OUT, count)
            fits = _native.hash_node(whole, 1) == bytes(tree.level(1, block, 1)[0])
            yield block, whole[:count] if fits else self._of_image(disk, block)

    def _of_image(self, disk: Disk, block: int) -> Digests:
        offset = block * FAN_OUT * disk.leaf_bytes
        buffer = np.empty(min(FAN_OUT * disk.leaf_bytes, disk.size_bytes - offset), dtype=np.uint8)
        self._head.read_into(disk.id, offset, buffer.data)
        return leaf_digests(buffer.data, block * FAN_OUT, disk.leaf_bytes)

    # --- what is committed ---

    def _disk(self, disk_id: DiskId) -> Disk:
        found = self._head.state.disk(disk_id)
        if found is None:
            raise ProtocolError(f"the head has no disk {disk_id}")
        return found.disk

    def _root(self, disk: Disk) -> bytes:
        found = self._head.state.disk(disk.id)
        assert found is not None
        return found.root


def _blocks(disk: Disk, ranges: Iterable[tuple[int, int]]) -> Iterator[int]:
    """The blocks of 256 leaves that ascending ranges of bytes touch, each once."""
    span, reached = FAN_OUT * disk.leaf_bytes, 0
    for start, stop in ranges:
        for block in range(max(reached, start // span), -(-min(stop, disk.size_bytes) // span)):
            yield block
            reached = block + 1


def make_missing(fs: FileSystem, layout: Layout, state: State, head_format: HeadFormat) -> None:
    """Images and trees of the head that are gone are made anew: a tree from its image, an image of nothing but marks.

    Call it between two commits only: in the middle of one, what is not there may not have been made yet.
    """
    images = [d.disk for d in state.disks if not fs.exists(layout.image(d.disk.id))]
    trees = [d.disk for d in state.disks if not fs.exists(layout.tree(d.disk.id))]
    if not images and not trees:
        return
    # The marks first: an image of zeros without them would pass for good after a crash.
    damage.note(fs, layout, [_all_of(disk) for disk in images], [disk.id for disk in trees])
    for disk in images:
        log.error("%s is gone: it is made anew, and its content asked for", layout.image(disk.id))
        with FlatImage.create(fs, layout.image(disk.id), head_format, disk.size_bytes, disk.id) as image:
            image.sync()
    for disk in trees:
        log.error("%s is gone: it is made anew from the image", layout.tree(disk.id))
        fs.create(layout.tree(disk.id)).close()
    fs.sync_directory(layout.head)
    with FileHead.open(fs, layout, state, head_format) as head:
        HeadRepair(fs, layout, head).heal(())
        for disk in images:
            good: list[DamagedLeaves] = []
            reached = 0
            for first, stop in head.tree(disk.id).stored_leaves(disk.count_leaves):
                good += [DamagedLeaves(disk.id, reached, first)] if reached < first else []
                reached = stop
            good += [DamagedLeaves(disk.id, reached, disk.count_leaves)] if reached < disk.count_leaves else []
            if disk not in trees:
                damage.clear(fs, layout, good)


def _all_of(disk: Disk) -> DamagedLeaves:
    return DamagedLeaves(disk.id, 0, max(1, disk.count_leaves))
