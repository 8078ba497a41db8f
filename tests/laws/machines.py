"""Machines for the laws: small, several disks, every odd size, and a model of a delta that is a dict.

`histories` draws a line of states of one machine: disks come, go, grow and
shrink to any byte, grains are written whole, in part, or with zeros. Their
content is kept as plain bytes, which is what everything is compared with.
"""

from __future__ import annotations

from collections.abc import Iterator
from uuid import UUID

import msgspec
import numpy as np
from hypothesis import strategies as st

from replica.delta import MemoryDelta, Packer, Segment, disk_changes, rows_of
from replica.delta.change import DiskChange
from replica.delta.head import MemoryHead
from replica.model import DeltaId, Disk, DiskId, Epoch, ReplicaId

REPLICA = ReplicaId(UUID(int=0xABC))
EPOCH = Epoch(1, UUID(int=0xDEF))

Contents = dict[Disk, bytes]


@st.composite
def disks(draw: st.DrawFn, number: int, grains: tuple[int, ...]) -> Disk:
    """A disk of size 0: its identity and its geometry."""
    grain = draw(st.sampled_from(grains))
    leaf = grain * draw(st.sampled_from((1, 2, 4)))
    return Disk(DiskId(UUID(int=number + 1)), f"disk-{number}", 0, grain_bytes=grain, leaf_bytes=leaf)


def sizes(disk: Disk) -> st.SearchStrategy[int]:
    """Whole grains, odd sizes and nothing at all."""
    grain = disk.grain_bytes
    whole = st.integers(0, 40).map(lambda n: n * grain)
    return st.one_of(st.just(0), whole, st.builds(lambda n, odd: n + odd, whole, st.integers(1, grain - 1)))


def fillings(grain: int) -> st.SearchStrategy[bytes]:
    """Content for one grain: zeros, a pattern, or a single byte somewhere."""
    single = st.integers(0, grain - 1).map(lambda at: bytes(at) + b"\x01" + bytes(grain - at - 1))
    pattern = st.integers(1, 255).map(lambda value: bytes([value]) * grain)
    return st.one_of(st.just(bytes(grain)), pattern, single)


@st.composite
def changed(draw: st.DrawFn, disk: Disk, content: bytes) -> tuple[Disk, bytes]:
    """The disk after a change of size, perhaps, and some runs of written grains."""
    size = draw(st.one_of(st.just(len(content)), sizes(disk)))
    grain = disk.grain_bytes
    count = -(-size // grain)
    padded = bytearray(content[:size] + bytes(count * grain - len(content[:size])))
    for _ in range(draw(st.integers(0, 4)) if count else 0):
        first = draw(st.integers(0, count - 1))
        length = draw(st.integers(1, min(12, count - first)))
        padded[first * grain : (first + length) * grain] = draw(fillings(grain)) * length
    return msgspec.structs.replace(disk, size_bytes=size), bytes(padded[:size])


@st.composite
def histories(draw: st.DrawFn, states: int = 2, grains: tuple[int, ...] = (512, 1024, 4096)) -> list[Contents]:
    """Contents of `states` states of one machine, one after the other."""
    pool = [draw(disks(number, grains)) for number in range(draw(st.integers(1, 3)))]
    history: list[Contents] = []
    held: dict[DiskId, tuple[Disk, bytes]] = {}
    for _ in range(states):
        for disk in pool:
            if draw(st.integers(0, 5)) == 0:
                held.pop(disk.id, None)
            else:
                held[disk.id] = draw(changed(*held.get(disk.id, (disk, b""))))
        history.append(dict(held.values()))
    return history


def head_of(contents: Contents, point: int) -> MemoryHead:
    return MemoryHead.of(REPLICA, EPOCH, contents, point=point, delta_id=DeltaId(UUID(int=point + 1)))


def content_of(head: MemoryHead) -> Contents:
    return {disk: head.content(disk.id) for disk in head.disks}


def grains_of(disk: Disk, content: bytes) -> list[bytes]:
    """Whole grains, the last one filled up with zeros."""
    padded = content + bytes(disk.count_grains * disk.grain_bytes - len(content))
    return [padded[i : i + disk.grain_bytes] for i in range(0, len(padded), disk.grain_bytes)]


def model_delta(before: MemoryHead, after: MemoryHead, reported: int = 0) -> MemoryDelta:
    """The delta by its definition, grain by grain. Bits of `reported` add grains that did not change."""
    segments: list[Segment] = []
    packer = Packer(segments.append)
    for index, change in enumerate(disk_changes(before.state, after.state)):
        old = grains_of(change.before, before.content(change.disk_id)) if change.before else []
        new = grains_of(change.after, after.content(change.disk_id)) if change.after else []
        blank = bytes(change.grain_bytes)
        for number, grain in enumerate(new):
            same = grain == (old[number] if number < len(old) else blank)
            if same and not reported >> (number % 61) & 1:
                continue
            if grain != blank:
                packer.add(index, change.grain_bytes, rows_of([(number, 1, 1)]), grain)
            elif number < len(old):
                packer.add(index, change.grain_bytes, rows_of([(number, 1, 0)]), b"")
    packer.flush()
    return MemoryDelta(after.state.delta_id, before.state, after.state, tuple(segments))


def extents_of(delta: MemoryDelta) -> Iterator[tuple[DiskChange, int, bool]]:
    """Every grain that a delta covers: (disk, grain, data)."""
    for disk, rows in delta.extents():
        for first, count, data in rows.tolist():
            for grain in range(first, first + count):
                yield delta.disks[disk], grain, bool(data)


def leaves_of(head: MemoryHead) -> dict[DiskId, bytes]:
    """All leaf digests that are stored, and every node above: a tree is right only if all of it is."""
    found = {}
    for disk in head.disks:
        tree = head.tree(disk.id)
        levels = [tree.level(level, 0, min(256 ** (4 - level), 1024)) for level in range(5)]
        found[disk.id] = np.concatenate(levels).tobytes()
    return found
