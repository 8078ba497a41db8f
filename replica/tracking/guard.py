"""The sender's end of the watchdog process: what `instant` talks to.

One `Guard` is one process, for one freeze and thaw (or for a thaw alone). It is
started first and given its order later, so that a host that cannot start it
has nothing frozen and nothing marked. When the sender dies, the kernel closes
its pipe, and the watchdog thaws; closing it on purpose (`end`) is the same and
always safe.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

import msgspec

from replica.errors import FreezeError

THAW_LIMIT_SECONDS = 60.0
"""How long a thaw command may take before it counts as failed."""

THAW_AGAIN_SECONDS = (1.0, 2.0, 4.0, 8.0)
"""The waits before a thaw that failed is tried again, all in less than the limit above together with the tries."""

_START_SECONDS = 30.0
_GRACE_SECONDS = 5.0


class Answer(msgspec.Struct, frozen=True):
    """What the watchdog says: `ready`, after the freeze (`frozen`), and after the thaw (`thawed`, `cause`).

    `about` says which of the three it is. `cause` is why it thawed: `request`,
    `limit`, `orphan`, or `earlier` (another watchdog did).
    """

    about: str = ""
    frozen: bool = False
    thawed: bool = False
    output: str = ""
    failure: str = ""
    cause: str = ""


class Guard:
    """The watchdog process. FreezeError if it cannot be started; nothing was frozen then. Not thread-safe."""

    def __init__(self) -> None:
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(Path(__file__).with_name("watchdog.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
            )
        except OSError as error:
            raise _not_started(error.strerror or str(error)) from error
        self._unread = b""
        answer = self.ask("ready", _START_SECONDS)
        if answer.about != "ready":
            self.end()
            raise _not_started(answer.failure)

    def order(
        self,
        mark: Path,
        freeze: list[str],
        thaw: list[str],
        limit_seconds: float,
        environment: dict[str, str],
        *,
        again_seconds: tuple[float, ...] = (),
    ) -> None:
        """Run `freeze` (unless empty) now, `thaw` when the time has come, and that again after each wait given."""
        order = {
            "freeze": freeze,
            "thaw": thaw,
            "limit": limit_seconds,
            "thaw_limit": THAW_LIMIT_SECONDS,
            "thaw_again": again_seconds,
            "environment": environment,
            "mark": str(mark.absolute()),
            "lock": str(mark.absolute().with_name(mark.name + ".lock")),
            "lock_wait": limit_seconds + THAW_LIMIT_SECONDS,
        }
        self._send(json.dumps(order).encode() + b"\n")

    def request_thaw(self) -> None:
        self._send(b"now thaw\n")

    def alive(self) -> bool:
        """Whether the process is there; cheap."""
        return self._process.poll() is None

    def ask(self, about: str, limit_seconds: float) -> Answer:
        """Its next answer about that, others passed over; one that only says `failure` if it gives none in time."""
        deadline = time.monotonic() + limit_seconds
        while True:
            answer = self._next(deadline, limit_seconds)
            if answer.about in (about, ""):
                return answer

    def _next(self, deadline: float, limit_seconds: float) -> Answer:
        pipe = self._pipe(self._process.stdout)
        while b"\n" not in self._unread:
            if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return Answer(failure=f"the watchdog process did not answer within {limit_seconds:g} s")
            data = os.read(pipe.fileno(), 65536)
            if not data:
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(_GRACE_SECONDS)
                return Answer(failure="the watchdog process ended without an answer")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return msgspec.json.decode(line, type=Answer)

    def end(self) -> None:
        """Close both pipes and collect the process; one that does not end soon is left to finish by itself."""
        self._pipe(self._process.stdin).close()
        self._pipe(self._process.stdout).close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_SECONDS)

    def _send(self, line: bytes) -> None:
        with suppress(BrokenPipeError):
            self._pipe(self._process.stdin).write(line)

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        assert pipe is not None
        return pipe


def _not_started(why: str) -> FreezeError:
    return FreezeError(
        f"the watchdog process, which freezes and thaws, cannot be started: {why}",
        hint="nothing was frozen by this cycle; see to the host's memory and limits of processes and open files",
    )
