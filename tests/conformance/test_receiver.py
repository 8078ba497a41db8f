"""What `transport.api` promises, held by every way to a site, over real stores."""

from __future__ import annotations

import random

import msgspec
import numpy as np
import pytest

from replica import _native
from replica.delta import DataKey
from replica.errors import (
    BaseMismatchError,
    ConflictError,
    DamageError,
    FencedError,
    ForbiddenError,
    KeyMissingError,
    PointGoneError,
    ProtocolError,
    ReplicaError,
    RootMismatchError,
    TransportError,
    UnknownMachineError,
)
from replica.merkle import MemoryNodes, MerkleTree, leaf_digests
from replica.model import DeltaId, DiskId, Epoch, ReplicaId, random_id
from replica.receipt import check_shipped, parse
from replica.signing import decode_public, verify
from replica.transport.wire import Adopt, Begin, Enrol, GrainQuery, ReplicaInfo, TreeQuery
from tests.conformance.conftest import Both, Way
from tests.store.small_primary import Made, SmallPrimary


def enrolment(primary: SmallPrimary, machine: str = "web-1") -> Enrol:
    return Enrol(machine, primary.key.id, primary.key.secret, primary.epoch)


def begin(receiver: Both, primary: SmallPrimary, made: Made) -> list[tuple[int, int]]:
    document = Begin(made.base.delta_id, primary.epoch, made.header)
    return receiver.begin(primary.replica_id, made.delta_id, document).received


def commit(receiver: Both, primary: SmallPrimary, made: Made) -> ReplicaInfo:
    done = receiver.commit(primary.replica_id, made.delta_id, made.tail, made.tail_offset, 30)
    assert done is not None
    return done


def sync(receiver: Both, primary: SmallPrimary) -> ReplicaInfo:
    made = primary.make()
    assert begin(receiver, primary, made) == []
    for segment in made.segments:
        receiver.put_segment(primary.replica_id, made.delta_id, *segment)
    done = commit(receiver, primary, made)
    assert done.head == made.result
    primary.acknowledge(made)
    return done


def content(receiver: Both, primary: SmallPrimary, point: int) -> dict[str, bytes]:
    return {name: b"".join(receiver.read(primary.replica_id, point, i)) for name, i in primary.ids.items()}


def test_the_life_of_a_replica(way: Way) -> None:
    receiver, primary = way.connect("hv-1"), way.primary()
    assert receiver.replicas() == []
    info = receiver.enrol(primary.replica_id, enrolment(primary))
    assert (info.owner, info.machine, info.epoch) == ("hv-1", "web-1", primary.epoch)
    assert info.head.is_empty
    for _ in range(7):
        primary.scribble()
        info = sync(receiver, primary)
    assert info == receiver.replica(primary.replica_id)
    assert receiver.replicas("web-1") == [msgspec.structs.replace(info, receipt=None)]
    points = receiver.points(primary.replica_id)
    assert [p.state.point for p in points] == [3, 4, 5, 6, 7]
    assert all(p.restorable for p in points)
    for point in (3, 5, 7):
        assert content(receiver, primary, point) == primary.copies[point]
    with pytest.raises(PointGoneError):
        list(receiver.read(primary.replica_id, 2, primary.ids["os"]))


def test_an_unchanged_machine_makes_a_point_and_costs_next_to_nothing(way: Way) -> None:
    receiver, primary = way.connect("hv-1"), way.primary()
    receiver.enrol(primary.replica_id, enrolment(primary))
    sync(receiver, primary)
    before = receiver.bytes_sent
    receiver.replica(primary.replica_id)
    assert sync(receiver, primary).head.point == 2
    assert receiver.bytes_sent - before < 4096
    assert (receiver.bytes_sent > 0) is (way.name == "https")


def test_every_call_may_be_made_again(way: Way) -> None:
    receiver, primary = way.connect("hv-1"), way.primary()
    for _ in range(2):
        receiver.enrol(primary.replica_id, enrolment(primary))
    primary.scribble()
    made = primary.make()
    assert [begin(receiver, primary, made) for _ in range(2)] == [[], []]
    for segment in made.segments * 2:
        receiver.put_segment(primary.replica_id, made.delta_id, *segment)
    assert [commit(receiver, primary, made).head for _ in range(2)] == [made.result] * 2
    for _ in range(2):
        receiver.discard(primary.replica_id, made.delta_id)
    assert receiver.replica(primary.replica_id).head == made.result


def test_segments_come_in_any_order_and_a_cut_costs_none_of_them(way: Way) -> None:
    receiver, primary = way.connect("hv-1"), way.primary({"os": 13 << 20})
    receiver.enrol(primary.replica_id, enrolment(primary))
    primary.content["os"][:] = random.Random(5).randbytes(13 << 20)
    made = primary.make()
    assert len(made.segments) == 4
    begin(receiver, primary, made)
    for number in (3, 0):
        receiver.put_segment(primary.replica_id, made.delta_id, *made.segments[number])
    receiver.close()
    assert begin(receiver, primary, made) == [(0, 1), (3, 4)]
    info = receiver.replica(primary.replica_id)
    assert (info.receiving, info.applying, info.head.point) == (made.delta_id, None, 0)
    for number in (2, 1):
        receiver.put_segment(primary.replica_id, made.delta_id, *made.segments[number])
    assert begin(receiver, primary, made) == [(0, 4)]
    assert commit(receiver, primary, made).head == made.result
    primary.acknowledge(made)
    assert content(receiver, primary, 1) == primary.copies[1]


def test_a_commit_with_a_segment_missing_says_so_and_can_be_completed(way: Way) -> None:
    receiver, primary = way.connect("hv-1"), way.primary()
    receiver.enrol(primary.replica_id, enrolment(primary))
    primary.scribble()
    made = primary.make()
    begin(receiver, primary, made)
    for segment in made.segments[1:]:
        receiver.put_segment(primary.replica_id, made.delta_id, *segment)
    with pytest.raises(ReplicaError, match="missing"):
        commit(receiver, primary, made)
    receiver.put_segment(primary.replica_id, made.delta_id, *made.segments[0])
    assert commit(receiver, primary, made).head == made.result


def test_a_newer_delta_takes_the_place_of_an_unfinished_one(way: Way) -> None:
    receiver, primary = way.connect("hv-1"), way.primary()
    receiver.enrol(primary.replica_id, enrolment(primary))
    primary.scribble()
    first = primary.make()
    begin(receiver, primary, first)
    receiver.put_segment(primary.replica_id, first.delta_id, *first.segments[0])
    sync(receiver, primary)
    with pytest.raises(ReplicaError):
        receiver.put_segment(primary.replica_id, first.delta_id, *first.segments[0])


def test_a_discarded_delta_is_gone(way: Way) -> None:
    receiver, primary = way.connect("hv-1"), way.primary()
    receiver.enrol(primary.replica_id, enrolment(primary))
    primary.scribble()
    made = primary.make()
    begin(receiver, primary, made)
    receiver.discard(primary.replica_id, made.delta_id)
    assert receiver.replica(primary.replica_id).receiving is None
    with pytest.raises(ProtocolError):
        receiver.put_segment(primary.replica_id, made.delta_id, *made.segments[0])


def test_a_wrong_base_is_refused_with_the_actual_head(way: Way) -> None:
    receiver, primary = way.connect("hv-1"), way.primary()
    receiver.enrol(primary.replica_id, enrolment(primary))
    old = primary.make()
    head = sync(receiver, primary).head
    with pytest.raises(BaseMismatchError) as caught:
        begin(receiver, primary, old)
    assert caught.value.head == head.delta_id


def test_a_segment_damaged_on_the_way_is_refused_and_sent_again(way: Way) -> None:
    receiver, primary = way.connect("hv-1"), way.primary()
    receiver.enrol(primary.replica_id, enrolment(primary))
    primary.scribble()
    made = primary.make()
    begin(receiver, primary, made)
    number, offset, digest, blob = made.segments[0]
    with pytest.raises(TransportError, match="damaged on the way"):
        receiver.put_segment(primary.replica_id, made.delta_id, number, offset, digest, blob[:-1] + b"\0\0")
    assert begin(receiver, primary, made) == []
    for segment in made.segments:
        receiver.put_segment(primary.replica_id, made.delta_id, *segment)
    assert commit(receiver, primary, made).head == made.result


def test_a_delta_that_does_not_make_the_roots_it_names_is_refused(way: Way) -> None:
    receiver, primary = way.connect("hv-1"), way.primary()
    receiver.enrol(primary.replica_id, enrolment(primary))
    primary.scribble()
    sync(receiver, primary)
    head = receiver.replica(primary.replica_id).head
    primary.sent["os"] = bytes(len(primary.content["os"]))
    primary.content["os"][:4096] = b"x" * 4096
    primary.sent["os"] = bytes(primary.content["os"])  # what the primary believes was sent already
    made = primary.make()
    begin(receiver, primary, made)
    for segment in made.segments:
        receiver.put_segment(primary.replica_id, made.delta_id, *segment)
    with pytest.raises(RootMismatchError):
        commit(receiver, primary, made)
    assert receiver.replica(primary.replica_id).head == head
    assert content(receiver, primary, 1) == primary.copies[1]


def test_a_damaged_manifest_is_refused(way: Way) -> None:
    receiver, primary = way.connect("hv-1"), way.primary()
    receiver.enrol(primary.replica_id, enrolment(primary))
    made = primary.make()
    begin(receiver, primary, made)
    for segment in made.segments:
        receiver.put_segment(primary.replica_id, made.delta_id, *segment)
    damaged = made.tail[:-40] + bytes([made.tail[-40] ^ 1]) + made.tail[-39:]
    with pytest.raises(DamageError):
        receiver.commit(primary.replica_id, made.delta_id, damaged, made.tail_offset, 30)
    assert receiver.replica(primary.replica_id).head.is_empty


def test_a_header_under_an_unknown_key_is_refused(way: Way) -> None:
    receiver, primary = way.connect("hv-1"), way.primary()
    receiver.enrol(primary.replica_id, enrolment(primary))
    primary.key = DataKey.generate()
    made = primary.make()
    with pytest.raises(KeyMissingError):
        begin(receiver, primary, made)
    with pytest.raises(ConflictError, match="another data key"):
        receiver.enrol(primary.replica_id, enrolment(primary))


def test_a_sender_that_lost_its_state_finds_and_adopts_its_replica(way: Way) -> None:
    receiver, primary = way.connect("hv-1"), way.primary()
    receiver.enrol(primary.replica_id, enrolment(primary))
    primary.scribble()
    sync(receiver, primary)
    [found] = receiver.replicas("web-1")
    lost = Epoch(0, random_id())
    with pytest.raises(FencedError, match="another sender"):
        receiver.begin(found.replica_id, DeltaId(random_id()), Begin(found.head.delta_id, lost, bytes(160)))
    info = receiver.adopt(found.replica_id, Adopt(found.epoch, lost.holder))
    assert info.epoch == Epoch(primary.epoch.counter + 1, lost.holder)
    assert receiver.adopt(found.replica_id, Adopt(found.epoch, lost.holder)) == info
    made = primary.make()
    with pytest.raises(FencedError):
        begin(receiver, primary, made)
    primary.epoch = info.epoch
    assert sync(receiver, primary).head.point == 2


def test_a_sender_that_was_replaced_in_the_middle_is_fenced(way: Way) -> None:
    receiver, primary = way.connect("hv-1"), way.primary()
    receiver.enrol(primary.replica_id, enrolment(primary))
    primary.scribble()
    made = primary.make()
    begin(receiver, primary, made)
    way.clock[0] += 61
    receiver.adopt(primary.replica_id, Adopt(primary.epoch, random_id()))
    with pytest.raises(FencedError):
        receiver.put_segment(primary.replica_id, made.delta_id, *made.segments[0])
    with pytest.raises(FencedError):
        receiver.commit(primary.replica_id, made.delta_id, made.tail, made.tail_offset, 30)
    assert receiver.replica(primary.replica_id).head.is_empty


def test_nobody_else_sees_or_writes_it(way: Way) -> None:
    receiver, primary = way.connect("hv-1"), way.primary()
    receiver.enrol(primary.replica_id, enrolment(primary))
    sync(receiver, primary)
    made = primary.make()
    other = way.connect("hv-2")
    assert other.replicas() == []
    for call in (
        lambda: other.replica(primary.replica_id),
        lambda: other.enrol(primary.replica_id, enrolment(primary)),
        lambda: other.adopt(primary.replica_id, Adopt(primary.epoch, random_id())),
        lambda: begin(other, primary, made),
        lambda: other.put_segment(primary.replica_id, made.delta_id, 0, 160, bytes(32), b"x"),
        lambda: commit(other, primary, made),
        lambda: other.discard(primary.replica_id, made.delta_id),
        lambda: other.points(primary.replica_id),
        lambda: list(other.read(primary.replica_id, 1, primary.ids["os"])),
        lambda: other.tree(primary.replica_id, primary.ids["os"], 0, 0, 1),
        lambda: other.receipt(primary.replica_id, 1),
    ):
        with pytest.raises((ForbiddenError, TransportError), match="belongs to another primary|damaged on the way"):
            call()
    for stranger in (way.connect("nas-1"),):
        with pytest.raises(ForbiddenError, match=r"no \[\[allow\]\] entry matches 'nas-1'"):
            stranger.replicas()


def test_a_replica_that_is_not_there(way: Way) -> None:
    receiver = way.connect("hv-1")
    with pytest.raises(UnknownMachineError):
        receiver.replica(ReplicaId(random_id()))


def test_the_tree_of_the_head_is_the_one_the_primary_would_compute(way: Way) -> None:
    receiver, primary = way.connect("hv-1"), way.primary({"os": 9_000_001})
    receiver.enrol(primary.replica_id, enrolment(primary))
    primary.scribble(count=40)
    sync(receiver, primary)
    nodes = MemoryNodes()
    update = MerkleTree(nodes).update(write=True)
    update.put(0, leaf_digests(bytes(primary.content["os"]), 0))
    update.root(9_000_001)
    for level, first, count in ((0, 0, 550), (1, 0, 3), (4, 0, 1), (0, 500, 1000)):
        expected = MerkleTree(nodes).level(level, first, count).tobytes()
        assert receiver.tree(primary.replica_id, primary.ids["os"], level, first, count) == expected
    with pytest.raises(ProtocolError):
        receiver.tree(primary.replica_id, primary.ids["os"], 4, 0, 2)
    with pytest.raises(UnknownMachineError):
        receiver.tree(primary.replica_id, DiskId(random_id()), 0, 0, 1)


def test_what_a_tracker_is_rebuilt_from(way: Way) -> None:
    """Nodes and keyed grain digests of the head by ranges; of no other head, and not more than is allowed."""
    receiver, primary = way.connect("hv-1"), way.primary({"os": 9_000_001})
    receiver.enrol(primary.replica_id, enrolment(primary))
    primary.scribble(count=40)
    head = sync(receiver, primary).head
    disk = head.disks[0].disk
    ranges = [(0, 3), (100, 50), (549, 1)]
    nodes = receiver.nodes(primary.replica_id, disk.id, TreeQuery(head.delta_id, 0, ranges))
    assert nodes == b"".join(receiver.tree(primary.replica_id, disk.id, 0, *one) for one in ranges)
    secret = bytes(range(192))
    answer = receiver.grains(primary.replica_id, disk.id, GrainQuery(head.delta_id, secret, ranges))
    padded = np.zeros(disk.count_leaves * disk.leaf_bytes, np.uint8)
    padded[: disk.size_bytes] = np.frombuffer(bytes(primary.content["os"]), np.uint8)
    expected, dirty = np.zeros(disk.count_leaves * 4, "<u8"), np.zeros(disk.count_leaves * 4, np.uint8)
    _native.scan(padded, disk.grain_bytes, secret, None, expected, dirty)
    rows = [expected[first * 4 : (first + count) * 4] for first, count in ranges]
    assert answer == np.concatenate(rows).tobytes() + bytes([1]) * 54
    with pytest.raises(BaseMismatchError) as caught:
        receiver.grains(primary.replica_id, disk.id, GrainQuery(DeltaId(random_id()), secret, ranges))
    assert caught.value.head == head.delta_id
    with pytest.raises(ProtocolError, match="has 550 leaves"):
        receiver.grains(primary.replica_id, disk.id, GrainQuery(head.delta_id, secret, [(549, 2)]))
    with pytest.raises(ProtocolError, match="4096 can be"):
        receiver.grains(primary.replica_id, disk.id, GrainQuery(head.delta_id, secret, [(0, 4097)]))
    with pytest.raises(ProtocolError):
        receiver.nodes(primary.replica_id, disk.id, TreeQuery(head.delta_id, 5, [(0, 1)]))
    with pytest.raises(UnknownMachineError):
        receiver.nodes(primary.replica_id, DiskId(random_id()), TreeQuery(head.delta_id, 0, [(0, 1)]))
    with pytest.raises(ForbiddenError):
        way.connect("hv-2").nodes(primary.replica_id, disk.id, TreeQuery(head.delta_id, 0, [(0, 1)]))
    for wrong in ([(1, 1), (0, 1)], [(0, 2), (1, 1)], [(0, 0)], [], [(i, 1) for i in range(0, 5000, 2)], [(0, 70000)]):
        with pytest.raises(ValueError, match="range"):
            TreeQuery(head.delta_id, 0, wrong)


def test_a_point_has_a_receipt_and_a_commit_is_answered_with_it(way: Way) -> None:
    receiver, primary = way.connect("hv-1"), way.primary()
    assert receiver.enrol(primary.replica_id, enrolment(primary)).receipt is None
    key = None
    for point in (1, 2):
        primary.scribble()
        made = primary.make()
        begin(receiver, primary, made)
        for number, offset, digest, blob in made.segments:
            receiver.put_segment(primary.replica_id, made.delta_id, number, offset, digest, blob)
        data = commit(receiver, primary, made).receipt
        primary.acknowledge(made)
        assert data is not None
        assert receiver.receipt(primary.replica_id, point) == data == receiver.replica(primary.replica_id).receipt
        key = key or decode_public((way.storage / "receipt.pub").read_bytes(), "it")
        verify(parse(data), key)
        check_shipped(parse(data), made.result)
        assert [info.receipt for info in receiver.replicas()] == [None]
    with pytest.raises(PointGoneError):
        receiver.receipt(primary.replica_id, 3)


def test_parts_of_a_disk(way: Way) -> None:
    receiver, primary = way.connect("hv-1"), way.primary({"os": 3_000_001})
    receiver.enrol(primary.replica_id, enrolment(primary))
    for _ in range(2):
        primary.scribble(count=30)
        sync(receiver, primary)
    whole, disk = primary.copies[1]["os"], primary.ids["os"]
    for offset, length in ((0, 1), (1, 4096), (2_999_000, 5000), (100, 0), (1_048_570, 1_048_590), (7, None)):
        got = b"".join(receiver.read(primary.replica_id, 1, disk, offset, length))
        assert got == whole[offset : None if length is None else offset + length]
