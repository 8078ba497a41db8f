"""The sender's end of the watchdog process: what `instant` talks to.

One `Guard` is one process, for one freeze and thaw (or for a thaw alone). When
the sender dies, the kernel closes its pipe, and the watchdog thaws; closing it
on purpose (`end`) is the same and always safe.
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

THAW_LIMIT_SECONDS = 60.0
"""How long a thaw command may take before it counts as failed."""

_GRACE_SECONDS = 5.0


class Answer(msgspec.Struct, frozen=True):
    """What the watchdog says: after the freeze (`frozen`), and after the thaw (`thawed`, `cause`).

    `cause` is why it thawed: `request`, `limit`, `orphan`, or `earlier` (another watchdog did).
    """

    frozen: bool = False
    thawed: bool = False
    output: str = ""
    failure: str = ""
    cause: str = ""


class Guard:
    """Starts the watchdog, which runs `freeze` (unless empty) at once. Not thread-safe."""

    def __init__(
        self, mark: Path, freeze: list[str], thaw: list[str], limit_seconds: float, environment: dict[str, str]
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("watchdog.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        self._unread = b""
        order = {
            "freeze": freeze,
            "thaw": thaw,
            "limit": limit_seconds,
            "thaw_limit": THAW_LIMIT_SECONDS,
            "environment": environment,
            "mark": str(mark.absolute()),
            "lock": str(mark.absolute().with_name(mark.name + ".lock")),
            "lock_wait": limit_seconds + THAW_LIMIT_SECONDS,
        }
        self._send(json.dumps(order).encode() + b"\n")

    def request_thaw(self) -> None:
        self._send(b"now thaw\n")

    def ask(self, limit_seconds: float) -> Answer:
        """Its next answer; one that only says `failure` if it gives none in time."""
        pipe = self._pipe(self._process.stdout)
        deadline = time.monotonic() + limit_seconds
        while b"\n" not in self._unread:
            if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return Answer(failure=f"the watchdog process did not answer within {limit_seconds:g} s")
            data = os.read(pipe.fileno(), 65536)
            if not data:
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
