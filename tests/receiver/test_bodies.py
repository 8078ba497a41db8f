"""Bodies share a bounded memory, first come, first served, and nobody takes it all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import pytest

from replica.errors import BusyError
from replica.receiver import bodies
from replica.receiver.bodies import BodyBudget
from replica.receiver.http_api import preferred_wait
from replica.receiver.reading import RangeError, parse_range


class Holder:
    """A task that holds room until it is let go."""

    def __init__(self, budget: BodyBudget, identity: str, count: int) -> None:
        self.holds = False
        self._release = asyncio.Event()
        self.task = asyncio.create_task(self._run(budget, identity, count))

    async def _run(self, budget: BodyBudget, identity: str, count: int) -> None:
        async with budget.hold(identity, count):
            self.holds = True
            await self._release.wait()
        self.holds = False

    def release(self) -> None:
        self._release.set()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def run(main: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(10):
            await main

    asyncio.run(bounded())


def test_room_is_given_up_to_the_total_and_then_in_order() -> None:
    async def main() -> None:
        budget = BodyBudget(100)
        holders = [Holder(budget, f"hv-{n}", 40) for n in range(4)]
        await settle()
        assert [h.holds for h in holders] == [True, True, False, False]
        assert budget.free_bytes == 20
        holders[1].release()
        await settle()
        assert [h.holds for h in holders] == [True, False, True, False]
        for holder in holders:
            holder.release()
        await asyncio.gather(*(h.task for h in holders))
        assert budget.free_bytes == 100

    run(main())


def test_who_does_not_fit_is_passed_by_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        budget = BodyBudget(100)
        first, second = Holder(budget, "a", 45), Holder(budget, "b", 45)
        large = Holder(budget, "c", 50)
        small = Holder(budget, "d", 10)
        await settle()
        assert (first.holds, second.holds, large.holds, small.holds) == (True, True, False, True)
        monkeypatch.setattr(bodies, "AGE_SECONDS", 0.0)
        small.release()
        await small.task
        later = Holder(budget, "d", 10)
        await settle()
        assert (large.holds, later.holds) == (False, False)
        first.release()
        await settle()
        assert (large.holds, later.holds) == (True, False)
        for holder in (second, large, later):
            holder.release()
        await asyncio.gather(second.task, large.task, later.task)
        assert budget.free_bytes == 100

    run(main())


def test_an_old_body_above_its_share_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "AGE_SECONDS", 0.0)

    async def main() -> None:
        budget = BodyBudget(100)
        greedy = [Holder(budget, "greedy", 50) for _ in range(3)]
        await settle()
        other = Holder(budget, "other", 50)
        await settle()
        assert [h.holds for h in [*greedy, other]] == [True, False, False, True]
        for holder in [*greedy, other]:
            holder.release()
        await asyncio.gather(*(h.task for h in [*greedy, other]))

    run(main())


def test_one_identity_has_so_many_bodies_and_no_more() -> None:
    async def main() -> None:
        budget = BodyBudget(100)
        holders = [Holder(budget, "greedy", 50) for _ in range(bodies.MAX_BODIES)]
        await settle()
        with pytest.raises(bodies.TooManyBodiesError):
            await Holder(budget, "greedy", 1).task
        other = Holder(budget, "other", 1)
        await settle()
        assert other.holds
        for holder in [*holders, other]:
            holder.release()
        await asyncio.gather(*(h.task for h in [*holders, other]))
        again = Holder(budget, "greedy", 1)
        await settle()
        assert again.holds
        again.release()
        await again.task

    run(main())


def test_one_identity_holds_at_most_half() -> None:
    async def main() -> None:
        budget = BodyBudget(100)
        greedy = [Holder(budget, "greedy", 25) for _ in range(4)]
        other = Holder(budget, "other", 40)
        await settle()
        assert [h.holds for h in greedy] == [True, True, False, False]
        assert other.holds
        for holder in [*greedy, other]:
            holder.release()
        await asyncio.gather(*(h.task for h in [*greedy, other]))
        assert budget.free_bytes == 100

    run(main())


def test_a_body_larger_than_the_budget_gets_half_of_it() -> None:
    async def main() -> None:
        budget = BodyBudget(100)
        huge = Holder(budget, "a", 1000)
        await settle()
        assert huge.holds
        assert budget.free_bytes == 50
        huge.release()
        await huge.task
        assert budget.free_bytes == 100

    run(main())


def test_whoever_waits_too_long_is_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "ROOM_SECONDS", 0.05)

    async def main() -> None:
        budget = BodyBudget(100)
        first, second = Holder(budget, "a", 100), Holder(budget, "a", 1)
        with pytest.raises(BusyError):
            await second.task
        first.release()
        await first.task
        assert budget.free_bytes == 100
        third = Holder(budget, "b", 100)
        await settle()
        assert third.holds
        third.release()
        await third.task

    run(main())


def test_whoever_goes_away_leaves_no_trace() -> None:
    async def main() -> None:
        budget = BodyBudget(100)
        first, second = Holder(budget, "a", 100), Holder(budget, "b", 1)
        await settle()
        for holder in (second, first):
            holder.task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await holder.task
        assert budget.free_bytes == 100

    run(main())


@pytest.mark.parametrize(
    ("prefer", "seconds"),
    [
        ("", 0),
        ("wait=5", 5),
        ("respond-async, wait=7", 7),
        ("Wait = 7 ; x=y", 7),
        ('wait="9"', 9),
        ("wait=99999", 60),
        ("wait=-1", 0),
        ("wait=x", 0),
        ("await=5", 0),
    ],
)
def test_prefer_is_read_as_rfc_7240_says(prefer: str, seconds: int) -> None:
    assert preferred_wait(prefer) == seconds


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, (0, 1000, False)),
        ("bytes=0-0", (0, 1, True)),
        ("bytes=10-19", (10, 20, True)),
        ("bytes=990-", (990, 1000, True)),
        ("bytes=990-5000", (990, 1000, True)),
        ("bytes=-10", (990, 1000, True)),
        ("bytes=-5000", (0, 1000, True)),
    ],
)
def test_a_range_is_read_as_rfc_9110_says(header: str | None, expected: tuple[int, int, bool]) -> None:
    assert parse_range(header, 1000) == expected


@pytest.mark.parametrize(
    "header", ["bytes=-", "bytes=1000-", "bytes=5-4", "bytes=-0", "bytes=0-1,3-4", "lines=0-1", ""]
)
def test_a_range_outside_the_disk_is_refused(header: str) -> None:
    with pytest.raises(RangeError):
        parse_range(header, 1000)
