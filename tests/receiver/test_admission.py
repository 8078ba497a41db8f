"""The decisions about who may do what, as values."""

from __future__ import annotations

from uuid import UUID

import pytest

from replica.errors import BusyError, ConflictError, FencedError, ForbiddenError
from replica.model import DeltaId, Epoch, ReplicaId
from replica.receiver.admission import (
    ACTIVE_SECONDS,
    Activity,
    authorise,
    check_adopt,
    check_again,
    check_delta,
    check_new,
    check_owner,
)
from replica.receiver.spec import AllowSpec
from replica.store import Identity

RID = ReplicaId(UUID(int=1))
DELTA = DeltaId(UUID(int=2))
MINE, OTHER = UUID(int=3), UUID(int=4)


def identity(machine: str = "web-1", owner: str = "hv-1") -> Identity:
    return Identity(RID, machine, owner, "prod", "raw", 0)


ALLOW = [AllowSpec("hv-1", "fast", "a"), AllowSpec("hv-*", "tier1", "b"), AllowSpec("[xy]?", "tier2", "c")]


@pytest.mark.parametrize(
    ("name", "storage"),
    [("hv-1", "fast"), ("hv-10", "tier1"), ("hv-", "tier1"), ("x1", "tier2")],
)
def test_the_first_matching_entry_counts(name: str, storage: str) -> None:
    assert authorise(ALLOW, name).storage == storage


@pytest.mark.parametrize("name", ["HV-1", "xhv-1", "hv", "z1", "", "x12"])
def test_who_matches_no_entry_is_refused(name: str) -> None:
    with pytest.raises(ForbiddenError, match=r"no \[\[allow\]\] entry matches"):
        authorise(ALLOW, name)


def test_no_entries_let_nobody_in() -> None:
    with pytest.raises(ForbiddenError):
        authorise([], "hv-1")


def test_another_owner_is_refused_and_not_told_whose_it_is() -> None:
    check_owner("hv-1", "hv-1", RID)
    for owner in ("hv-2", "HV-1", "hv-*"):
        with pytest.raises(ForbiddenError) as caught:
            check_owner(owner, "hv-1", RID)
        assert owner not in str(caught.value)


def test_one_owner_has_one_replica_of_a_name() -> None:
    check_new([identity("web-2"), identity(owner="hv-2")], "hv-1", "web-1")
    with pytest.raises(ConflictError, match="adopt") as caught:
        check_new([identity()], "hv-1", "web-1")
    assert str(RID) in str(caught.value)


def test_enrolling_again_changes_nothing_and_replaces_nothing() -> None:
    check_again(identity(), "hv-1", "web-1", same_key=True)
    with pytest.raises(ConflictError, match="never replaced"):
        check_again(identity(), "hv-1", "web-1", same_key=False)
    with pytest.raises(ConflictError, match="'web-1', not 'web-2'"):
        check_again(identity(), "hv-1", "web-2", same_key=True)
    with pytest.raises(ForbiddenError):
        check_again(identity(owner="hv-2"), "hv-1", "web-1", same_key=True)


@pytest.mark.parametrize("idle_seconds", [0.0, ACTIVE_SECONDS - 0.1])
def test_nobody_is_replaced_in_the_middle_of_a_delta(idle_seconds: float) -> None:
    active = Activity(DELTA, Epoch(1, OTHER), 1000.0)
    with pytest.raises(BusyError, match="in the middle of a delta"):
        check_adopt(active, MINE, 1000.0 + idle_seconds)


@pytest.mark.parametrize(
    ("active", "idle_seconds"),
    [
        (None, 0.0),
        (Activity(DELTA, Epoch(1, OTHER), 1000.0), ACTIVE_SECONDS),
        (Activity(DELTA, Epoch(1, MINE), 1000.0), 0.0),
    ],
)
def test_adopting_need_not_wait(active: Activity | None, idle_seconds: float) -> None:
    check_adopt(active, MINE, 1000.0 + idle_seconds)


def test_a_delta_counts_in_its_epoch_only() -> None:
    active = Activity(DELTA, Epoch(1, OTHER), 0.0)
    check_delta(active, DELTA, Epoch(1, OTHER))
    check_delta(None, DELTA, Epoch(2, MINE))
    check_delta(active, DeltaId(UUID(int=9)), Epoch(2, MINE))
    for epoch in (Epoch(2, MINE), Epoch(1, MINE)):
        with pytest.raises(FencedError, match="took this replica over"):
            check_delta(active, DELTA, epoch)


def test_one_owner_has_so_many_replicas_and_no_more() -> None:
    present = [identity(f"m-{n}") for n in range(3)]
    check_new(present, "hv-1", "web-1", 4)
    check_new(present, "hv-2", "web-1", 3)
    with pytest.raises(ConflictError, match="has 3 replicas already") as caught:
        check_new(present, "hv-1", "web-1", 3)
    assert "max_replicas" in str(caught.value)
