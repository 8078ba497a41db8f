"""Connections that are kept: one per cycle at work, lent again, and closed when they are idle, old or in doubt."""

from __future__ import annotations

from pathlib import Path

import pytest
from primary_lab import Lab

from replica.primary.connections import IDLE_SECONDS, LIFE_SECONDS, Connections
from replica.primary.spec import DiskSpec, MachineSpec
from replica.transport.client import HttpReceiver
from replica.transport.tls import TlsFiles

TLS = TlsFiles(Path("ca"), Path("cert"), Path("key"))


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def machine(name: str, to: str = "https://dr-1:8443") -> MachineSpec:
    return MachineSpec(name, to, (DiskSpec("os", Path("image")),))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def connections(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Connections:
    """`closed` of the fixture's `HttpReceiver`s tells whether they were; none of them connects."""
    monkeypatch.setattr(HttpReceiver, "closed", False, raising=False)
    monkeypatch.setattr(HttpReceiver, "close", lambda receiver: setattr(receiver, "closed", True))
    return Connections(TLS, clock=clock)


def test_one_after_the_other_takes_the_same(connections: Connections) -> None:
    with connections.lend(machine("a")) as first:
        pass
    with connections.lend(machine("b")) as second:
        assert len(connections) == 0
    assert second is first and len(connections) == 1
    connections.close()
    assert first.closed and len(connections) == 0  # type: ignore[attr-defined]


def test_two_at_once_never_share(connections: Connections) -> None:
    with connections.lend(machine("a")) as first, connections.lend(machine("b")) as second:
        assert first is not second
    assert len(connections) == 2


def test_another_receiver_is_another_connection(connections: Connections) -> None:
    with connections.lend(machine("a")) as first:
        pass
    with connections.lend(machine("b", "https://dr-2:8443")) as second:
        assert second is not first


def test_what_failed_is_not_lent_again(connections: Connections) -> None:
    with pytest.raises(RuntimeError), connections.lend(machine("a")) as first:
        raise RuntimeError
    assert first.closed and len(connections) == 0  # type: ignore[attr-defined]


def test_the_last_used_is_lent_and_the_others_fall_idle(connections: Connections, clock: Clock) -> None:
    with connections.lend(machine("a")) as spare, connections.lend(machine("b")) as busy:
        pass
    with connections.lend(machine("a")) as again:
        assert again is spare  # given back last
    clock.now += IDLE_SECONDS - 1
    with connections.lend(machine("a")):
        pass
    clock.now += 2
    connections.close_idle()
    assert len(connections) == 1
    assert busy.closed and not spare.closed  # type: ignore[attr-defined]


def test_none_is_used_for_ever(connections: Connections, clock: Clock) -> None:
    with connections.lend(machine("a")) as first:
        pass
    for _ in range(int(LIFE_SECONDS / IDLE_SECONDS) + 1):
        clock.now += IDLE_SECONDS - 1
        with connections.lend(machine("a")) as last:
            pass
    assert last is not first and first.closed  # type: ignore[attr-defined]


def test_another_way_is_made_and_closed_for_each_cycle(lab: Lab) -> None:
    links = []

    def connect(_machine: MachineSpec) -> object:
        links.append(lab.link())
        return links[-1]

    connections = Connections(TLS, connect)  # type: ignore[arg-type]
    for name in "ab":
        with connections.lend(machine(name)) as receiver:
            assert receiver is links[-1]
    assert [link.calls for link in links] == [["close"], ["close"]]
