"""apply beyond the laws: what it refuses, what it names, and what it does not do."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from uuid import UUID

import msgspec
import numpy as np
import pytest

from replica.delta import LOST, MemoryDelta, Segment, apply, diff, prepare, rows_of, settle, write
from replica.delta.head import MemoryHead
from replica.delta.prepare import RottenLeavesError
from replica.errors import BaseMismatchError, FormatError, LeafDamageError, LostError, RootMismatchError
from replica.merkle import MemoryNodes, MerkleTree, leaf_digests
from replica.model import DamagedLeaves, DeltaId, Disk, DiskId, DiskState, State, random_id
from tests.laws.machines import Contents, content_of, head_of

if TYPE_CHECKING:
    from typing_extensions import Buffer

OS = Disk(DiskId(UUID(int=1)), "os", 1 << 20)
LOG = Disk(DiskId(UUID(int=2)), "log", 1 << 20)
CONTENT = os.urandom(1 << 20)


class WatchedHead(MemoryHead):
    """Notes what is read and written."""

    def __init__(self, state: State) -> None:
        self.reads: list[tuple[int, int]] = []
        self.writes = 0
        super().__init__(state)

    def read_into(self, disk_id: DiskId, offset: int, buffer: Buffer) -> None:
        self.reads.append((offset, memoryview(buffer).nbytes))
        super().read_into(disk_id, offset, buffer)

    def write(self, disk_id: DiskId, offset: int, data: Buffer) -> None:
        self.writes += 1
        super().write(disk_id, offset, data)

    def zero(self, disk_id: DiskId, offset: int, length: int) -> None:
        self.writes += 1


def watched(contents: Contents) -> WatchedHead:
    head = WatchedHead(head_of(contents, 0).state)
    for disk, content in contents.items():
        head._contents[disk.id][:] = content
        head._hash(disk)
    return head


def resized(disk: Disk, size_bytes: int) -> Disk:
    return msgspec.structs.replace(disk, size_bytes=size_bytes)


def prepared(head: MemoryHead, delta: MemoryDelta) -> MemoryDelta:
    parts: list[Segment] = []
    prepare(head, delta, parts.append)
    return MemoryDelta(DeltaId(random_id()), delta.result, delta.base, tuple(parts))


def changed(content: bytes, offset: int, data: bytes) -> bytes:
    return content[:offset] + data + content[offset + len(data) :]


def test_another_base_is_refused() -> None:
    delta = diff(head_of({OS: CONTENT}, 0), head_of({OS: bytes(1 << 20)}, 1))
    head = head_of({OS: CONTENT}, 2)
    with pytest.raises(BaseMismatchError, match=str(head.state.delta_id)):
        apply(head, delta)
    assert content_of(head) == {OS: CONTENT}


@pytest.mark.parametrize("offset", [0, 16384 + 17, (1 << 20) - 1])
def test_rot_in_a_leaf_that_changes_is_named(offset: int) -> None:
    """Nothing is written, and nothing of it gets into an inverse."""
    contents = {OS: CONTENT, LOG: CONTENT}
    delta = diff(head_of(contents, 0), head_of({OS: CONTENT, LOG: bytes(1 << 20)}, 1))
    head = watched(contents)
    head._contents[LOG.id][offset] ^= 1
    leaf = offset // 16384
    with pytest.raises(RottenLeavesError, match=f"'log'.* 16384 bytes at {leaf * 16384} ") as caught:
        apply(head, delta)
    assert caught.value.leaves == (DamagedLeaves(LOG.id, leaf, leaf + 1),)
    assert head.writes == 0


def test_a_lost_leaf_that_becomes_zero_is_zero_in_the_tree() -> None:
    """Neither the delta nor its inverse has data there, and the leaf changes all the same."""
    zeros = changed(CONTENT, 16384, bytes(16384))
    delta = diff(head_of({OS: CONTENT}, 0), head_of({OS: zeros}, 1))
    head = watched({OS: CONTENT})
    head._contents[OS.id][16384] ^= 1
    parts: list[Segment] = []
    prepare(head, delta, parts.append, rotten=[DamagedLeaves(OS.id, 1, 2)])
    inverse = MemoryDelta(DeltaId(random_id()), delta.result, delta.base, tuple(parts))
    assert [s.extents.tolist() for s in inverse.segments()] == [[(4, 4, LOST)]]
    write(head, delta)
    head._contents[OS.id][16384:32768] = bytes(16384)
    settle(head, delta, inverse)
    with pytest.raises(LostError):
        write(head, inverse)


def test_rot_in_a_leaf_of_zeros_is_named_where_part_of_it_stays() -> None:
    """The tree says it is zero, the head says otherwise; what the delta does not cover would stay wrong."""
    zeros = {OS: bytes(1 << 20)}
    delta = diff(head_of(zeros, 0), head_of({OS: changed(zeros[OS], 0, b"new")}, 1))
    head = watched(zeros)
    head._contents[OS.id][16000] = 1
    with pytest.raises(LeafDamageError, match="os"):
        apply(head, delta)
    assert head.writes == 0


def test_a_leaf_of_zeros_that_is_replaced_is_not_read() -> None:
    head = watched({OS: bytes(1 << 20)})
    prepared(head, diff(head_of({OS: bytes(1 << 20)}, 0), head_of({OS: CONTENT}, 1)))
    assert head.reads == []


def test_rot_beside_what_changes_is_not_looked_for() -> None:
    delta = diff(head_of({OS: CONTENT}, 0), head_of({OS: changed(CONTENT, 0, b"new")}, 1))
    head = watched({OS: CONTENT})
    head._contents[OS.id][16384] ^= 1
    apply(head, delta)
    assert set(head.reads) == {(0, 16384)}


def test_rot_that_appears_while_writing_is_seen_in_the_end() -> None:
    delta = diff(head_of({OS: CONTENT}, 0), head_of({OS: changed(CONTENT, 0, b"new")}, 1))
    head = watched({OS: CONTENT})
    inverse = prepared(head, delta)
    write(head, delta)
    head._contents[OS.id][5000] ^= 1
    with pytest.raises(RootMismatchError, match="os"):
        settle(head, delta, inverse)


def test_another_result_than_promised_is_refused() -> None:
    delta = diff(head_of({OS: CONTENT}, 0), head_of({OS: bytes(1 << 20)}, 1))
    lie = msgspec.structs.replace(delta.result, disks=(DiskState(OS, bytes(32)),))
    head = watched({OS: CONTENT})
    with pytest.raises(RootMismatchError):
        apply(head, MemoryDelta(delta.delta_id, delta.base, lie, delta.parts))
    assert head.writes == 0


def bad_segments() -> dict[str, list[Segment]]:
    grain = bytes([1]) * 4096
    good = Segment(0, rows_of([(3, 1, 1)]), grain)
    return {
        "zeros as data": [Segment(0, rows_of([(0, 1, 1)]), bytes(4096))],
        "past the end": [Segment(0, rows_of([(256, 1, 1)]), grain)],
        "empty extent": [Segment(0, rows_of([(0, 0, 0)]), b"")],
        "no extents": [Segment(0, rows_of([]), b"")],
        "not coalesced": [Segment(0, rows_of([(0, 1, 1), (1, 1, 1)]), grain * 2)],
        "overlapping": [Segment(0, rows_of([(0, 2, 1), (1, 1, 0)]), grain * 2)],
        "short payload": [Segment(0, rows_of([(0, 2, 1)]), grain)],
        "overflow": [Segment(0, rows_of([((1 << 64) - 1, 2, 0)]), b"")],
        "twice": [good, good],
        "descending": [Segment(0, rows_of([(5, 1, 1)]), grain), good],
        "disk goes back": [Segment(1, rows_of([(3, 1, 1)]), grain), good],
        "no such disk": [Segment(2, rows_of([(3, 1, 1)]), grain)],
    }


@pytest.mark.parametrize("name", bad_segments())
def test_a_delta_that_is_not_canonical_is_refused(name: str) -> None:
    before, after = head_of({OS: CONTENT, LOG: CONTENT}, 0), head_of({OS: CONTENT, LOG: CONTENT}, 1)
    delta = MemoryDelta(after.state.delta_id, before.state, after.state, tuple(bad_segments()[name]))
    with pytest.raises(FormatError):
        prepare(before, delta, lambda segment: None)


def test_zeros_behind_the_base_are_refused() -> None:
    before, after = head_of({OS: CONTENT}, 0), head_of({resized(OS, 2 << 20): CONTENT + bytes(1 << 20)}, 1)
    delta = MemoryDelta(after.state.delta_id, before.state, after.state, (Segment(0, rows_of([(256, 1, 0)]), b""),))
    with pytest.raises(FormatError, match="past the base"):
        prepare(before, delta, lambda segment: None)


def test_content_behind_the_end_is_refused() -> None:
    small = resized(OS, 4096 + 100)
    before, after = head_of({small: bytes(4196)}, 0), head_of({small: bytes(4196)}, 1)
    bad = Segment(0, rows_of([(1, 1, 1)]), bytes(100) + b"\x01" + bytes(4096 - 101))
    with pytest.raises(FormatError, match="past its end"):
        prepare(before, MemoryDelta(after.state.delta_id, before.state, after.state, (bad,)), lambda segment: None)


def test_a_cut_inside_a_grain_needs_the_grain() -> None:
    before, after = head_of({OS: CONTENT}, 0), head_of({resized(OS, 5000): CONTENT[:5000]}, 1)
    delta = diff(before, after)
    assert delta.parts[0].extents.tolist() == [(1, 1, 1)]
    with pytest.raises(FormatError, match="inside a grain"):
        prepare(before, MemoryDelta(delta.delta_id, delta.base, delta.result, ()), lambda segment: None)


def test_a_leaf_that_got_data_behind_the_old_end_is_rolled_back_without_the_delta() -> None:
    """The delta wrote only behind the old end: the inverse does not mention the leaf, which changed all the same."""
    small = resized(OS, 4096)
    base, result = {small: CONTENT[:4096]}, {resized(OS, 8192): CONTENT[:8192]}
    head = head_of(base, 0)
    delta = diff(head, head_of(result, 1))
    inverse = prepared(head, delta)
    assert inverse.parts == ()
    write(head, delta)
    settle(head, delta, inverse)
    write(head, inverse)
    settle(head, inverse, MemoryDelta(delta.delta_id, delta.base, delta.result, ()))
    assert content_of(head) == base


HUGE_LEAF = 123_456_789


class HugeHead(WatchedHead):
    """64 TiB with one leaf that is not zero; the content is not held."""

    def set_disks(self, disks: object) -> None:
        pass

    def _check(self, disk_id: DiskId, offset: int, length: int) -> None:
        pass

    def read_into(self, disk_id: DiskId, offset: int, buffer: Buffer) -> None:
        self.reads.append((offset, memoryview(buffer).nbytes))
        target = np.frombuffer(memoryview(buffer), dtype=np.uint8)
        target[:] = 1 if self.writes == 0 and offset == HUGE_LEAF * 16384 else 0


@pytest.mark.parametrize("how", ["zeroed", "removed", "cut"])
def test_a_huge_zero_extent_costs_the_leaves_that_are_not_zero(how: str) -> None:
    size, leaf = 64 << 40, HUGE_LEAF
    huge = resized(OS, size)
    tree = MerkleTree(MemoryNodes())
    update = tree.update(write=True)
    update.put(leaf, leaf_digests(bytes([1]) * 16384, leaf))
    base = State(*_names(0), (DiskState(huge, update.root(size)),))
    kept = {"zeroed": size, "cut": 16384, "removed": 0}[how]
    after = resized(OS, kept)
    blank = () if how == "removed" else (DiskState(after, MerkleTree(MemoryNodes()).root(kept)),)
    head = HugeHead(base)
    head._trees = {OS.id: tree}
    extents = (Segment(0, rows_of([(0, size // 4096, 0)]), b""),) if how == "zeroed" else ()
    delta = MemoryDelta(DeltaId(UUID(int=2)), base, State(*_names(1), blank), extents)
    inverse = prepared(head, delta)
    assert head.reads == [(leaf * 16384, 16384)]
    rows = [row for _, rows in inverse.extents() for row in rows.tolist()]
    data = (leaf * 4, 4, 1)
    before, behind = (0, leaf * 4, 0), (leaf * 4 + 4, size // 4096 - leaf * 4 - 4, 0)
    assert rows == ([before, data, behind] if how == "zeroed" else [data])
    head.writes = 1
    head.reads.clear()
    settle(head, delta, inverse)
    assert head.reads == ([(leaf * 16384, 16384)] if how == "zeroed" else head.reads)
    assert len(head.reads) < 2


def _names(point: int) -> tuple[object, ...]:
    state = head_of({}, point).state
    return tuple(getattr(state, name) for name in State.__struct_fields__[:6])


def test_adjacent_leaves_are_read_at_once() -> None:
    head = watched({OS: CONTENT})
    prepared(head, diff(head_of({OS: CONTENT}, 0), head_of({OS: bytes(1 << 20)}, 1)))
    assert head.reads == [(0, 1 << 20)]


def test_progress_reaches_its_total() -> None:
    seen: list[tuple[int, int]] = []
    head, after = head_of({OS: bytes(1 << 20), LOG: bytes(1 << 20)}, 0), head_of({OS: CONTENT, LOG: CONTENT}, 1)
    delta = diff(head, after)
    parts: list[Segment] = []
    prepare(head, delta, parts.append, lambda done, total: seen.append((done, total)))
    write(head, delta, lambda done, total: seen.append((done, total)))
    inverse = MemoryDelta(delta.delta_id, delta.result, delta.base, tuple(parts))
    settle(head, delta, inverse, lambda done, total: seen.append((done, total)))
    assert seen.count((2 << 20, 2 << 20)) >= 2
    assert all(done <= total == 2 << 20 for done, total in seen)
