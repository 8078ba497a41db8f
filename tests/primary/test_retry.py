"""Patience: bounded from the first failure in a row, and interruptible."""

from __future__ import annotations

import threading

import pytest

from replica.errors import BusyError, FencedError, TransportError
from replica.primary.retry import Patience, Stopped


class Clock:
    """Time that passes by waiting only."""

    def __init__(self) -> None:
        self.now, self.waits = 0.0, []

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        self.now += seconds
        return False


def patience(retry_seconds: float) -> tuple[Patience, Clock]:
    clock = Clock()
    made = Patience(retry_seconds, clock=clock)
    made._stop = clock  # type: ignore[assignment]
    return made, clock


def test_back_off_doubles_and_ends() -> None:
    p, clock = patience(20)
    with pytest.raises(TransportError):
        while True:
            p.failed(TransportError("x"))
    assert clock.waits == [0.2, 0.4, 0.8, 1.6, 3.2, 5, 5]
    p.succeeded()
    p.failed(TransportError("x"))
    assert clock.waits[-1] == 0.2


def test_call_waits_for_what_may_pass_and_for_nothing_else() -> None:
    p, clock = patience(20)
    errors = [TransportError("x"), BusyError("y")]

    def work() -> str:
        if errors:
            raise errors.pop()
        return "done"

    assert p.call(work) == "done" and clock.waits == [0.2, 0.4]

    def fenced() -> None:
        raise FencedError("z")

    with pytest.raises(FencedError):
        p.call(fenced)
    assert clock.waits == [0.2, 0.4]


def test_no_patience_at_all() -> None:
    p, clock = patience(0)
    with pytest.raises(TransportError):
        p.failed(TransportError("x"))
    assert clock.waits == []


def test_stopping_interrupts() -> None:
    stop = threading.Event()
    p = Patience(60, stop)
    threading.Timer(0.05, stop.set).start()
    with pytest.raises(Stopped):
        p.pause(30)
    with pytest.raises(Stopped):
        p.check()
