"""Ending a cycle soon, whatever the other side does.

A call to a receiver that hangs would hold a stop up for as long as an answer is
waited for. So while a cycle runs, a thread watches `stop`; when the cycle has
not ended a second after it was set, every call that it still is in is aborted.
What such a call was about is as open as after a cut, and settled the same way.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from replica.errors import TransportError
from replica.primary.retry import Stopped
from replica.transport.api import Receiver

GRACE_SECONDS = 1.0
"""What a call may still take once a stop was asked for: an answer that is on its way is worth having."""
_TICK_SECONDS = 0.1


@contextmanager
def stopping(stop: threading.Event | None, receiver: Receiver) -> Iterator[None]:
    """Abort the receiver's calls in this block soon after `stop`; a link that broke then raises Stopped."""
    if stop is None:
        yield
        return
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(stop, ended, receiver), name="stop", daemon=True)
    watcher.start()
    try:
        yield
    except TransportError as error:
        if stop.is_set():
            raise Stopped from error
        raise
    finally:
        ended.set()
        watcher.join()


def _watch(stop: threading.Event, ended: threading.Event, receiver: Receiver) -> None:
    while not stop.is_set():
        if ended.wait(_TICK_SECONDS):
            return
    ended.wait(GRACE_SECONDS)
    while not ended.wait(_TICK_SECONDS):
        receiver.abort()
