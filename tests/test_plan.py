"""The plan, tried for every combination of what the two sides can know."""

from __future__ import annotations

from itertools import product
from uuid import UUID

import msgspec
import pytest

from replica.errors import ConflictError, FencedError, ReplicaError
from replica.model import Consistency, DeltaId, Disk, DiskId, DiskState, Epoch, ReplicaId, State
from replica.plan import (
    Cancel,
    DiscardPending,
    Fold,
    Mode,
    PrimaryView,
    Readopt,
    ReplicaView,
    Ship,
    Step,
    Wait,
    next_step,
)

ME, OTHER = UUID(int=1), UUID(int=2)
EPOCH = Epoch(5, ME)
DISKS = (Disk(DiskId(UUID(int=10)), "os", 1 << 20), Disk(DiskId(UUID(int=11)), "data", 1 << 30))


def state(number: int, root: int = 0, disks: tuple[Disk, ...] = DISKS) -> State:
    roots = tuple(DiskState(disk, bytes([number, root]) * 16) for disk in disks)
    delta_id = DeltaId(UUID(int=100 + number))
    return State(ReplicaId(UUID(int=9)), delta_id, number, EPOCH, number, Consistency.CRASH, roots)


EMPTY = State.empty(ReplicaId(UUID(int=9)), EPOCH)
OLD, HEAD, PENDING, FOREIGN = state(3), state(4), state(5), state(77)
PRIMARY = PrimaryView("web-1", EPOCH, DISKS, HEAD)
REPLICA = ReplicaView(EPOCH, HEAD)


def decide(primary: PrimaryView, replica: ReplicaView) -> Step | type[ReplicaError]:
    try:
        return next_step(primary, replica)
    except ReplicaError as error:
        return type(error)


def expected(primary: PrimaryView, replica: ReplicaView) -> Step | type[ReplicaError]:
    """The rules once more, written the other way round: by outcome."""
    if replica.epoch != EPOCH:
        return ConflictError if replica.epoch.counter < EPOCH.counter else FencedError
    if replica.applying:
        return Wait(replica.applying)
    pending = primary.pending
    if pending:
        if replica.head == pending:
            return Fold(pending)
        return Cancel(pending.delta_id) if replica.receiving == pending.delta_id else DiscardPending(pending.delta_id)
    if primary.head not in (None, replica.head):
        assert primary.head is not None
        return Readopt(primary.head, replica.head)
    if replica.head.is_empty:
        return Ship(Mode.INITIAL, EMPTY)
    same = primary.head == replica.head and primary.trusted
    return Ship(Mode.INCREMENTAL if same else Mode.RESYNC, replica.head)


def test_every_combination() -> None:
    heads = (EMPTY, OLD, HEAD, PENDING, FOREIGN, state(4, root=1), state(5, root=1))
    deltas = (None, PENDING.delta_id, FOREIGN.delta_id)
    epochs = (EPOCH, Epoch(4, ME), Epoch(6, ME), Epoch(5, OTHER), Epoch(6, OTHER), Epoch(4, OTHER))
    seen = set()
    for own, pending, trusted, head, applying, receiving, epoch in product(
        (None, EMPTY, OLD, HEAD), (None, PENDING), (False, True), heads, deltas, deltas, epochs
    ):
        primary = PrimaryView("web-1", EPOCH, DISKS, own, pending, trusted)
        replica = ReplicaView(epoch, head, applying, receiving)
        found = decide(primary, replica)
        assert found == expected(primary, replica), (primary, replica)
        seen.add(found.mode if isinstance(found, Ship) else found if isinstance(found, type) else type(found))
    assert seen == {FencedError, ConflictError, Wait, Cancel, Fold, DiscardPending, Readopt, *Mode}


def test_every_decision_but_shipping_leads_on() -> None:
    """A lost acknowledgement, step by step: wait, fold, then ship on top of it."""
    assert next_step(
        msgspec.structs.replace(PRIMARY, pending=PENDING), ReplicaView(EPOCH, HEAD, PENDING.delta_id)
    ) == Wait(PENDING.delta_id)
    assert next_step(msgspec.structs.replace(PRIMARY, pending=PENDING), ReplicaView(EPOCH, PENDING)) == Fold(PENDING)
    step = next_step(msgspec.structs.replace(PRIMARY, head=PENDING), ReplicaView(EPOCH, PENDING))
    assert step == Ship(Mode.INCREMENTAL, PENDING)
    assert isinstance(step, Ship) and step.point == 6


def test_same_delta_with_other_roots_is_never_folded() -> None:
    primary = msgspec.structs.replace(PRIMARY, pending=PENDING)
    assert next_step(primary, ReplicaView(EPOCH, state(5, root=1))) == DiscardPending(PENDING.delta_id)
    assert next_step(PRIMARY, ReplicaView(EPOCH, state(4, root=1))) == Readopt(HEAD, state(4, root=1))


def test_first_copy_may_have_any_disks() -> None:
    primary = PrimaryView("web-1", EPOCH, DISKS[:1], None)
    assert next_step(primary, ReplicaView(EPOCH, EMPTY)) == Ship(Mode.INITIAL, EMPTY)


def test_a_head_that_moved_alone_is_adopted_before_anything_is_shipped() -> None:
    """A copied state directory, and either side put back to an earlier time, look the same from here."""
    for head in (OLD, FOREIGN, EMPTY):
        for trusted in (True, False):
            primary = msgspec.structs.replace(PRIMARY, trusted=trusted)
            assert next_step(primary, ReplicaView(EPOCH, head)) == Readopt(HEAD, head)
    adopted = msgspec.structs.replace(PRIMARY, head=FOREIGN, trusted=False)
    assert next_step(adopted, ReplicaView(EPOCH, FOREIGN)) == Ship(Mode.RESYNC, FOREIGN)


@pytest.mark.parametrize("head", [HEAD, FOREIGN], ids=["incremental", "resync"])
@pytest.mark.parametrize(
    "disks",
    [
        (DISKS[0], msgspec.structs.replace(DISKS[1], size_bytes=1 << 31)),
        (DISKS[0], msgspec.structs.replace(DISKS[1], size_bytes=1)),
        DISKS[:1],
        (*DISKS, Disk(DiskId(UUID(int=12)), "new", 5)),
        (DISKS[0], msgspec.structs.replace(DISKS[1], name="d2")),
    ],
    ids=["grown", "shrunk", "removed", "added", "renamed"],
)
def test_changed_disks_are_an_ordinary_point(head: State, disks: tuple[Disk, ...]) -> None:
    primary = msgspec.structs.replace(PRIMARY, head=head, disks=disks)
    assert next_step(primary, ReplicaView(EPOCH, head)) == Ship(Mode.INCREMENTAL, head)


def test_another_geometry_is_refused() -> None:
    primary = msgspec.structs.replace(PRIMARY, disks=(DISKS[0], msgspec.structs.replace(DISKS[1], grain_bytes=512)))
    with pytest.raises(ConflictError, match="'data'.*geometry") as caught:
        next_step(primary, REPLICA)
    assert caught.value.hint
