"""A commit that is cut anywhere, at any number of operations, and done again or rolled back.

What may happen to the head in a crash: any prefix of the writes was done, the
next one in part; of the tree's nodes any subset was stored (they are flushed in
no order). What survived before: the delta, and the inverse that `prepare` made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replica.delta import MemoryDelta, Rows, Segment, apply, prepare, settle, write
from replica.delta.head import MemoryHead
from replica.merkle import Digests, MemoryNodes, MerkleTree
from replica.model import DeltaId, Disk, DiskId, State, random_id
from tests.laws.machines import Contents, content_of, head_of, histories, leaves_of, model_delta

if TYPE_CHECKING:
    from typing_extensions import Buffer

BITS = st.integers(0, (1 << 61) - 1)


class Crash(Exception):
    """The machine stops here."""


class CrashingNodes(MemoryNodes):
    """Tree nodes that are lost where `keep` has a 0 bit, as long as the head is going to crash."""

    def __init__(self, head: CrashingHead) -> None:
        super().__init__()
        self._head = head

    def write(self, level: int, block: int, digests: Digests) -> None:
        if self._head.step():
            super().write(level, block, digests)

    def clear(self, level: int, first_block: int) -> None:
        if self._head.step():
            super().clear(level, first_block)


class CrashingHead(MemoryHead):
    """Stops after `left` operations (None: never)."""

    def __init__(self, state: State) -> None:
        self.left: int | None = None
        self.keep = -1
        super().__init__(state)

    def step(self) -> bool:
        """Count one operation; returns whether a node that is written now survives."""
        if self.left is None:
            return True
        if self.left == 0:
            raise Crash
        self.left -= 1
        return bool(self.keep >> (self.left % 61) & 1)

    def write(self, disk_id: DiskId, offset: int, data: Buffer) -> None:
        if self.left == 0:
            half = memoryview(data)[: memoryview(data).nbytes // 2]
            super().write(disk_id, offset, half)
        self.step()
        super().write(disk_id, offset, data)

    def zero(self, disk_id: DiskId, offset: int, length: int) -> None:
        if self.left == 0:
            super().zero(disk_id, offset, length // 2)
        self.step()
        super().zero(disk_id, offset, length)

    def set_disks(self, disks: Sequence[Disk]) -> None:
        wanted = {d.id: d for d in disks}
        for disk_id in sorted(wanted.keys() | self._disks.keys()):
            self.step()
            now = self._disks | ({disk_id: wanted[disk_id]} if disk_id in wanted else {})
            super().set_disks([d for i, d in now.items() if i != disk_id or disk_id in wanted])
        for disk_id, tree in self._trees.items():
            if not isinstance(tree._nodes, CrashingNodes):
                self._trees[disk_id] = MerkleTree(CrashingNodes(self), self._disks[disk_id].leaf_bytes)


class OnlyInverse:
    """What is known of the delta when it is lost: it touched nothing outside of its inverse."""

    def __init__(self, inverse: MemoryDelta) -> None:
        self._inverse = inverse

    def extents(self) -> Iterator[tuple[int, Rows]]:
        for disk, rows in self._inverse.extents():
            marked = rows.copy()
            marked["data"] = 1
            yield disk, marked


def crashing(contents: Contents, point: int) -> CrashingHead:
    plain = head_of(contents, point)
    head = CrashingHead(plain.state)
    for disk, content in contents.items():
        head._contents[disk.id][:] = content
        head._hash(disk)
    return head


def interrupted(
    history: list[Contents], reported: int, left: int, keep: int
) -> tuple[CrashingHead, MemoryDelta, MemoryDelta]:
    """A head whose commit was cut after `left` operations, the delta, and the inverse made before."""
    head, after = crashing(history[0], 0), head_of(history[1], 1)
    delta = model_delta(head, after, reported)
    parts: list[Segment] = []
    prepare(head, delta, parts.append)
    inverse = MemoryDelta(DeltaId(random_id()), delta.result, delta.base, tuple(parts))
    head.left, head.keep = left, keep
    with suppress(Crash):  # a commit that was finished before its crash may be repeated as well
        write(head, delta)
        settle(head, delta, inverse)
    head.left = None
    return head, delta, inverse


HOW = (histories(), BITS, st.integers(0, 25), BITS)


@given(*HOW)
def test_redo_ends_in_the_result(history: list[Contents], reported: int, left: int, keep: int) -> None:
    head, delta, inverse = interrupted(history, reported, left, keep)
    write(head, delta)
    settle(head, delta, inverse)
    head.commit(delta.result)
    assert content_of(head) == history[1]
    assert leaves_of(head) == leaves_of(head_of(history[1], 1))
    apply(head, inverse)
    assert content_of(head) == history[0]


@given(*HOW)
def test_rollback_ends_in_the_base(history: list[Contents], reported: int, left: int, keep: int) -> None:
    head, delta, inverse = interrupted(history, reported, left, keep)
    write(head, inverse)
    settle(head, inverse, delta)
    assert content_of(head) == history[0]
    assert leaves_of(head) == leaves_of(head_of(history[0], 0))


@given(*HOW)
def test_rollback_needs_no_delta(history: list[Contents], reported: int, left: int, keep: int) -> None:
    """The delta itself is damaged: its inverse alone leads back."""
    head, _, inverse = interrupted(history, reported, left, keep)
    write(head, inverse)
    settle(head, inverse, OnlyInverse(inverse))
    assert content_of(head) == history[0]
    assert leaves_of(head) == leaves_of(head_of(history[0], 0))


@given(*HOW, st.integers(0, 25))
def test_a_crash_in_the_redo_is_a_crash(
    history: list[Contents], reported: int, left: int, keep: int, again: int
) -> None:
    head, delta, inverse = interrupted(history, reported, left, keep)
    head.left = again
    with suppress(Crash):
        write(head, delta)
        settle(head, delta, inverse)
    head.left = None
    write(head, delta)
    settle(head, delta, inverse)
    assert content_of(head) == history[1]
    assert leaves_of(head) == leaves_of(head_of(history[1], 1))


def test_the_crashes_are_reached() -> None:
    """The head really stops: otherwise everything above would prove nothing."""
    disk = Disk(DiskId(random_id()), "os", 8192)
    head = crashing({disk: b"\x01" * 8192}, 0)
    head.left = 1
    with pytest.raises(Crash):
        head.write(disk.id, 0, b"\x02" * 512)
        head.write(disk.id, 512, b"\x02" * 512)
    assert head.content(disk.id) == b"\x02" * 768 + b"\x01" * (8192 - 768)
