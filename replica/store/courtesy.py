"""Whoever reads much lets short commits go first.

A commit holds a kernel lock on `commit.lock` while it is at work. `restore` and `verify` look at it before every window
and wait while it is held, but no longer than `PATIENCE_SECONDS` for one commit: a commit of a tenth of a second has the
machine to itself, and one of minutes shares it. Without that, a commit is one thread among the many of its readers, and
its syncs wait for theirs.

A courtesy and no more: nothing that is read depends on it, and where the lock cannot be had or looked at, all go on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from replica.durable import FileSystem
from replica.errors import BusyError, StorageError
from replica.store.layout import Layout

PATIENCE_SECONDS = 0.5
POLL_SECONDS = 0.004


@contextmanager
def going_first(fs: FileSystem, layout: Layout) -> Iterator[None]:
    """For the length of the block, bulk readers wait. Never waits itself."""
    with ExitStack() as stack:
        with suppress(BusyError, StorageError):  # one who is just looking holds it for a moment
            stack.enter_context(fs.lock(layout.commit_lock))
        yield


class Courtesy:
    """Of one bulk reader, for all its threads."""

    def __init__(
        self,
        fs: FileSystem,
        layout: Layout,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._fs, self._layout = fs, layout
        self._clock, self._sleep = clock, sleep
        self._mutex = threading.Lock()
        self._spent = False
        """Waited long enough for the commit that is at work."""

    def wait(self) -> None:
        """Return when no commit is at work, or once this one has been waited for long enough. Thread-safe."""
        with self._mutex:
            until = self._clock() + PATIENCE_SECONDS
            while self._commit_at_work():
                if self._spent or self._clock() >= until:
                    self._spent = True
                    return
                self._sleep(POLL_SECONDS)
            self._spent = False

    def _commit_at_work(self) -> bool:
        try:
            self._fs.lock(self._layout.commit_lock, shared=True).release()
        except BusyError:
            return True
        except StorageError:
            return False
        return False
