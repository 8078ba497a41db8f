"""Connections to receivers, kept from one cycle to the next.

    with Connections(tls) as connections:
        with connections.lend(machine) as receiver:
            …                                     # one cycle; nobody else has this connection meanwhile

A thousand machines that go to one receiver need no thousand handshakes per
interval. A connection comes back when its cycle ended well and is lent again,
the one used last first, so that those that are too many fall idle and are
closed. One whose cycle failed is closed: what it carried last is not known.
Whether a kept one still lives is found out by using it: a request on a
connection that the other side has closed is made once more on a new one
(`transport.connection`).

A receiver looks at a certificate when a connection begins, and this side reads
its own then; so no connection is used for longer than `LIFE_SECONDS`: that is
how long a certificate that was renewed, or has expired, may go unnoticed.

Thread-safe. There are never more kept connections than cycles were at work at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from replica.primary.spec import MachineSpec
from replica.transport.api import Receiver
from replica.transport.client import HttpReceiver
from replica.transport.tls import TlsFiles

Connect = Callable[[MachineSpec], Receiver]
"""Opens the way to a machine's receiver; it is closed after the cycle."""

IDLE_SECONDS = 45.0
"""The other side closes an idle connection after 75 s; a request never lets one rest for longer than 50 s."""
LIFE_SECONDS = 600.0


@dataclass(frozen=True)
class _Kept:
    receiver: Receiver
    made_at: float
    used_at: float


class Connections:
    """What a sender has open. `close` ends those that are kept, not those that are lent."""

    def __init__(self, tls: TlsFiles, connect: Connect | None = None, clock: Callable[[], float] = time.monotonic):
        """`connect`: another way to the receivers, whose connections are not kept but made for each cycle."""
        self._tls, self._connect, self._clock = tls, connect, clock
        self._mutex = threading.Lock()
        self._kept: dict[str, list[_Kept]] = {}

    @contextmanager
    def lend(self, machine: MachineSpec) -> Iterator[Receiver]:
        """A receiver for one cycle, by one thread."""
        if self._connect is not None:
            receiver = self._connect(machine)
            try:
                yield receiver
            finally:
                receiver.close()
            return
        receiver, made_at = self._take(machine.to)
        try:
            yield receiver
        except BaseException:
            receiver.close()
            raise
        self._give_back(machine.to, receiver, made_at)

    def _take(self, url: str) -> tuple[Receiver, float]:
        self.close_idle()
        with self._mutex:
            kept = self._kept.get(url)
            if kept:
                last = kept.pop()
                return last.receiver, last.made_at
        return HttpReceiver(url, self._tls), self._clock()

    def _give_back(self, url: str, receiver: Receiver, made_at: float) -> None:
        now = self._clock()
        if now - made_at > LIFE_SECONDS:
            receiver.close()
            return
        with self._mutex:
            self._kept.setdefault(url, []).append(_Kept(receiver, made_at, now))

    def close_idle(self) -> None:
        """Close what nobody wanted for `IDLE_SECONDS`, or is too old."""
        now = self._clock()
        with self._mutex:
            old = [k for all_of_url in self._kept.values() for k in all_of_url if not _usable(k, now)]
            if old:
                usable = {url: [k for k in kept if _usable(k, now)] for url, kept in self._kept.items()}
                self._kept = {url: kept for url, kept in usable.items() if kept}
        for kept in old:
            kept.receiver.close()

    def __len__(self) -> int:
        """Connections kept now, and lent to nobody."""
        with self._mutex:
            return sum(map(len, self._kept.values()))

    def close(self) -> None:
        """Close all that are kept."""
        with self._mutex:
            kept, self._kept = self._kept, {}
        for all_of_url in kept.values():
            for entry in all_of_url:
                entry.receiver.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _usable(kept: _Kept, now: float) -> bool:
    return now - kept.used_at <= IDLE_SECONDS and now - kept.made_at <= LIFE_SECONDS
