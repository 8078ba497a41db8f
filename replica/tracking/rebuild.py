"""Rebuilding a tracker that was lost or is not believed: it comes to describe the replica's head, nothing is shipped.

    rebuilt = rebuild(fs, machine_directory, state, delta_id, image, head)

What a tracker holds is the keyed digest of every grain and the Merkle leaves of
*the replica's* disk. The source holds nearly the same content, so:

1. The local image is read once, as in a fresh scan, and its digests and leaves
   become the tracker's, under an id of no state.
2. Both trees are walked from the root down; only the children of nodes that
   differ are asked for, many nodes in one request. Equal leaves have equal
   grains, so there the local digests describe the head as well.
3. For the leaves that differ the head's digests are asked for, keyed with this
   tracker's secret, and take the place of the local ones.
4. The root that came of it must be the head's. Only then, everything synced,
   the digests say whose they are.

What follows is an ordinary incremental scan. A crash at any step leaves digests
that are nobody's, and the next attempt starts over. Both passes are folds (see
`fold`) whose records come from a scan and from the other side instead of a journal.

The source need not stand still: what is written of a leaf comes from one
buffer, and says what the head holds only where that buffer's leaf is the head's.

What the other side says is taken for no more than it proves. Nodes must hash to
the node above them, up to the root that names the head. Of a leaf that it calls
damaged, or that differs although none of its grains does, nothing is known: its
grains get digests that no content has, and are shipped. A lie about a single
grain makes the next delta's root differ at the receiver, which refuses it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from replica import _native
from replica.durable import FileSystem
from replica.errors import DamageError, ProtocolError
from replica.images import Image
from replica.merkle import DEPTH, FAN_OUT, FileNodes, MerkleTree, root_of
from replica.model import DIGEST_BYTES, DeltaId, Disk, DiskState, random_id
from replica.tracking.digests import count_windows
from replica.tracking.fold import Target
from replica.tracking.hash import HashTracker
from replica.tracking.journal import WINDOW_BYTES, JournalRecord, grains_per_window

NODES_AT_ONCE = 256
"""Nodes whose children are asked for in one request: 2 MiB."""
LEAVES_AT_ONCE = 2048
BYTES_AT_ONCE = 64 << 20
"""Leaves whose grains are asked for in one request, and what the other side reads for it (docs/PROTOCOL.md)."""

Ranges = list[tuple[int, int]]
Numbers = NDArray[np.int64]
Digests = NDArray[np.uint8]  # (n, 32)
Grains = NDArray[np.uint64]  # (n leaves, grains per leaf)


class Head(Protocol):
    """One disk of the replica's head: that of the named delta, or the call raises."""

    def nodes(self, level: int, ranges: Ranges) -> bytes:
        """Digests of its Merkle tree, 32 bytes each."""

    def grains(self, secret: bytes, ranges: Ranges) -> bytes:
        """u64 per grain of these leaves, then a byte per leaf: 0 if it is damaged."""


class Windows:
    """The windows with leaves that differ, as a scan's `candidates`. A byte per window."""

    def __init__(self, disk: Disk) -> None:
        self._grains = grains_per_window(disk)
        self._marked = np.zeros(count_windows(disk) + 2, np.int8)

    def add(self, window: int) -> None:
        self._marked[window + 1] = 1

    def runs(self) -> Iterator[tuple[int, int]]:
        """(first grain, count), ascending; the last one may reach past the disk's end."""
        edges = np.flatnonzero(np.diff(self._marked))
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            yield int(start) * self._grains, int(stop - start) * self._grains


@dataclass(frozen=True)
class Rebuilt:
    """`bytes_differing`: of the leaves that differ; `leaves_unknown` of them the other side could not answer for."""

    windows: Windows
    bytes_read: int
    bytes_differing: int
    leaves_unknown: int


def rebuild(
    fs: FileSystem,
    machine_directory: Path,
    state: DiskState,
    delta_id: DeltaId,
    image: Image,
    head: Head,
    check: Callable[[], None] = lambda: None,
    report: Callable[[int], None] = lambda _done: None,
) -> Rebuilt:
    """Make the tracker of a disk describe `state`, the disk as delta `delta_id` left it at the replica.

    `image` may have another size by now. `report` gets the bytes read so far; `check` stops by raising.
    Raises DamageError (what the head says does not fit together), and what the image, the head and the store raise.
    """
    disk, local_id = state.disk, DeltaId(random_id())
    tracker = HashTracker(fs, machine_directory, disk, None)
    with Target(fs, tracker.directory, state, None, disk, local_id) as target:
        scan = tracker.scan(image, _Into(target), 0, fresh=True, check=check)
        for _ in scan:
            report(scan.bytes_read)
        target.finish(scan.root)
    windows, differing, unknown = Windows(disk), 0, 0
    with Target(fs, tracker.directory, state, local_id, disk, delta_id) as target:
        if scan.root != state.root:
            with fs.open(tracker.directory / "digests") as digests, fs.open(tracker.directory / "leaves") as leaves:
                tree = MerkleTree(FileNodes(leaves), disk.leaf_bytes)
                for found in _answered(differing_leaves(tree, head, state), head, tracker.secret, disk):
                    check()
                    local = np.zeros(min(grains_per_window(disk), disk.count_grains - found.first_grain), "<u8")
                    digests.read_into(found.first_grain * 8, local.data)
                    record, lost = _record(found, local, disk)
                    target.put(record)
                    windows.add(found.first_grain // grains_per_window(disk))
                    differing += len(found.leaves) * disk.leaf_bytes
                    unknown += lost
        target.finish(state.root)
    return Rebuilt(windows, scan.bytes_read, differing, unknown)


class _Into:
    """A scan's records, folded at once."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def add(self, record: JournalRecord) -> None:
        if len(record.grains):
            self._target.put(record)


# --- walking the trees ---


def differing_leaves(local: MerkleTree, head: Head, state: DiskState) -> Iterator[tuple[Numbers, Digests]]:
    """Every leaf that is not the head's, ascending, in batches, with the head's digests; all of them proven.

    What was yielded may be changed in `local` before more is asked for. DamageError if the head's tree does not have
    its root.
    """
    top = np.zeros(1, np.int64)
    return _below(local, head, state, DEPTH, top, np.zeros((1, DIGEST_BYTES), np.uint8))


def _below(
    local: MerkleTree, head: Head, state: DiskState, level: int, nodes: Numbers, digests: Digests
) -> Iterator[tuple[Numbers, Digests]]:
    """The leaves below `nodes` of `level`, which differ and have these digests at the head."""
    for start in range(0, len(nodes), NODES_AT_ONCE):
        some = nodes[start : start + NODES_AT_ONCE]
        children = _children(head, state, level, some, digests[start : start + NODES_AT_ONCE])
        own = np.concatenate([local.level(level - 1, int(node) * FAN_OUT, FAN_OUT) for node in some])
        differ = np.flatnonzero((children != own).any(axis=1))
        numbers = some[differ // FAN_OUT] * FAN_OUT + differ % FAN_OUT
        found = children[differ]
        del own, children
        if level == 1:
            if len(numbers) and int(numbers[-1]) >= state.disk.count_leaves:
                raise _damaged(state, "it has leaves past the disk's end")
            if len(numbers):
                yield numbers, found
        else:
            yield from _below(local, head, state, level - 1, numbers, found)


def _children(head: Head, state: DiskState, level: int, nodes: Numbers, digests: Digests) -> Digests:
    """The digests below these nodes, asked for where there is anything but zeros, and proven."""
    asked = np.flatnonzero(digests.any(axis=1)) if level < DEPTH else np.zeros(1, np.int64)
    children = np.zeros((len(nodes), FAN_OUT, DIGEST_BYTES), np.uint8)
    if len(asked):
        ranges = [(first * FAN_OUT, count * FAN_OUT) for first, count in _joined(nodes[asked])]
        body = head.nodes(level - 1, ranges)
        if len(body) != len(asked) * FAN_OUT * DIGEST_BYTES:
            raise ProtocolError(f"the receiver answered {len(body)} bytes for {len(asked) * FAN_OUT} nodes of a tree")
        children[asked] = np.frombuffer(body, np.uint8).reshape(-1, FAN_OUT, DIGEST_BYTES)
    for index in asked:
        digest = _native.hash_node(children[index], level)
        if level == DEPTH:
            fits = root_of(digest, state.disk.size_bytes, state.disk.leaf_bytes) == state.root
        else:
            fits = digest == digests[index].tobytes()
        if not fits:
            raise _damaged(state, f"nodes of level {level - 1} are not what the node above them says")
    return children.reshape(-1, DIGEST_BYTES)


def _damaged(state: DiskState, why: str) -> DamageError:
    return DamageError(
        f"the Merkle tree of disk {state.disk.name!r} at the replica is damaged: {why}",
        hint="look at the replica with `replica verify`",
    )


def _joined(numbers: Numbers) -> Ranges:
    """Ascending numbers as (first, count)."""
    bounds = (0, *(int(b) for b in np.flatnonzero(np.diff(numbers) != 1) + 1), len(numbers))
    return [(int(numbers[start]), stop - start) for start, stop in pairwise(bounds)]


# --- the head's grains ---


@dataclass(frozen=True)
class _Found:
    """The leaves of one window that differ, and what the head says of them."""

    first_grain: int
    leaves: Numbers
    digests: Digests
    grains: Grains
    whole: Digests  # u8 per leaf


def _answered(batches: Iterable[tuple[Numbers, Digests]], head: Head, secret: bytes, disk: Disk) -> Iterator[_Found]:
    """Window by window; the grains of many windows are asked for at once."""
    limit = max(1, min(LEAVES_AT_ONCE, BYTES_AT_ONCE // disk.leaf_bytes))
    held: list[tuple[Numbers, Digests]] = []
    count = 0
    for leaves, digests in _by_window(batches, WINDOW_BYTES // disk.leaf_bytes):
        if held and count + len(leaves) > limit:
            yield from _ask(held, head, secret, disk, limit)
            held, count = [], 0
        held.append((leaves, digests))
        count += len(leaves)
    if held:
        yield from _ask(held, head, secret, disk, limit)


def _by_window(batches: Iterable[tuple[Numbers, Digests]], per_window: int) -> Iterator[tuple[Numbers, Digests]]:
    """The same leaves, cut where windows end and nowhere else."""
    rest: tuple[Numbers, Digests] | None = None
    for leaves, digests in batches:
        if rest is not None:
            leaves, digests = np.concatenate((rest[0], leaves)), np.concatenate((rest[1], digests))
        bounds = (0, *(int(b) for b in np.flatnonzero(np.diff(leaves // per_window)) + 1))
        for start, stop in pairwise(bounds):
            yield leaves[start:stop], digests[start:stop]
        rest = leaves[bounds[-1] :], digests[bounds[-1] :]
    if rest is not None:
        yield rest


def _ask(held: list[tuple[Numbers, Digests]], head: Head, secret: bytes, disk: Disk, limit: int) -> Iterator[_Found]:
    """The head's grains of these windows. A leaf of zeros needs no question."""
    leaves = np.concatenate([part for part, _ in held])
    asked = np.flatnonzero(np.concatenate([part for _, part in held]).any(axis=1))
    grains = np.zeros((len(leaves), disk.grains_per_leaf), "<u8")
    whole = np.ones(len(leaves), np.uint8)
    for start in range(0, len(asked), limit):
        some = asked[start : start + limit]
        body = head.grains(secret, _joined(leaves[some]))
        split = len(some) * disk.grains_per_leaf * 8
        if len(body) != split + len(some):
            raise ProtocolError(f"the receiver answered {len(body)} bytes for the grains of {len(some)} leaves")
        grains[some] = np.frombuffer(body, "<u8", split // 8).reshape(len(some), -1)
        whole[some] = np.frombuffer(body, np.uint8, len(some), split)
    done = 0
    for part, digests in held:
        stop = done + len(part)
        first = int(part[0]) * disk.grains_per_leaf // grains_per_window(disk) * grains_per_window(disk)
        yield _Found(first, part, digests, grains[done:stop], whole[done:stop])
        done = stop


def _record(found: _Found, local: Grains, disk: Disk) -> tuple[JournalRecord, int]:
    """What the tracker becomes in that window, and of how many leaves nothing is known."""
    per_leaf = disk.grains_per_leaf
    first_leaf = found.first_grain // per_leaf
    leaves = found.leaves - first_leaf
    which = (leaves[:, None] * per_leaf + np.arange(per_leaf)).reshape(-1)
    inside = which < len(local)
    here = np.zeros(len(which), "<u8")
    here[inside] = local[which[inside]]
    same = (here.reshape(-1, per_leaf) == found.grains).all(axis=1)
    unknown = np.flatnonzero((found.whole != 1) | same)
    grains = found.grains.copy()
    grains[unknown] = _nothing_has(len(unknown), per_leaf)
    return (
        JournalRecord(
            0,
            found.first_grain,
            which[inside].astype(np.uint16),
            grains.reshape(-1)[inside],
            leaves.astype(np.uint16),
            found.digests,
        ),
        len(unknown),
    )


def _nothing_has(count_leaves: int, per_leaf: int) -> Grains:
    """Random digests, none of them that of zeros: whatever is there, it is not this."""
    return (np.frombuffer(os.urandom(count_leaves * per_leaf * 8), "<u8") | np.uint64(1)).reshape(-1, per_leaf)
