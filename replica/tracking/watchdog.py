"""The process that thaws, whatever becomes of the sender. Run as a program, never imported by it.

A guest that stays frozen is an outage made by its own disaster recovery. So
neither freeze nor thaw is run by the sender: this child runs both, in a session
of its own, and is linked to the sender by two pipes only.

    sender -> watchdog   one JSON line (`freeze`, `thaw`, `limit`, `thaw_limit`, `environment`, `mark`, `lock`),
                         later one line: "now thaw"
    watchdog -> sender   one JSON line when frozen ({"frozen": true, "output": …}) or when that failed,
                         one JSON line when thawed ({"thawed": true, "cause": "request" | "limit" | "orphan"})

It thaws on request, when its input ends (the sender died, even by SIGKILL) and
when the limit has passed, each only after the freeze command has ended or was
killed, so that a late freeze never follows a thaw. After a successful thaw it
removes the durable mark; until then the mark makes the next sender thaw first.
The lock is held all the time, so that sender waits for this thaw to end.

It imports the standard library only, in isolated mode, and removes its mark
with its own two system calls: the one exception to `durable` being the only door.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

_TAIL_BYTES = 2000
_OUTPUT_BYTES = 1 << 20


def _run(argv: list[str], environment: dict[str, str], limit_seconds: float) -> tuple[str, str]:
    """Run a command; (its output, why it failed or ""). It goes to memory files: a daemon left behind may hold them."""
    output, errors = os.memfd_create("output"), os.memfd_create("errors")
    try:
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        try:
            code = child.wait(max(limit_seconds, 0.01))
            failure = "" if code == 0 else f"it ended with status {code}"
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            failure = f"it did not end within {limit_seconds:g} s and was killed"
        said = os.pread(errors, _TAIL_BYTES, max(0, os.fstat(errors).st_size - _TAIL_BYTES)).decode(errors="replace")
        if failure and said.strip():
            failure += f": {' '.join(said.split())}"
        return os.pread(output, _OUTPUT_BYTES, 0).decode(errors="replace"), failure
    except OSError as error:
        return "", f"it cannot be run: {error.strerror}"
    finally:
        os.close(output)
        os.close(errors)


def _tell(answer: dict[str, Any]) -> None:
    """Answer the sender, which may be gone."""
    with contextlib.suppress(OSError):
        os.write(1, json.dumps(answer).encode() + b"\n")


def _take_lock(path: str, wait_seconds: float) -> bool:
    """Hold the lock until this process ends. False if another watchdog still has it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)


class _Input:
    """Lines from the sender."""

    def __init__(self) -> None:
        self._unread = b""

    def line(self, limit_seconds: float | None) -> bytes:
        """The next line; b"" when the sender's end is closed, b"\\n" when the limit passed."""
        deadline = None if limit_seconds is None else time.monotonic() + limit_seconds
        while b"\n" not in self._unread:
            rest = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([0], [], [], rest)[0]:
                return b"\n"
            data = os.read(0, 65536)
            if not data:
                return b""
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line


def _remove_mark(mark: Path) -> None:
    mark.unlink(missing_ok=True)
    fd = os.open(mark.parent, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(fd)
    os.close(fd)


def _thaw(order: dict[str, Any], cause: str) -> None:
    failure = ""
    if order["thaw"]:
        _, failure = _run(order["thaw"], order["environment"], order["thaw_limit"])
    if not failure:
        _remove_mark(Path(order["mark"]))
    _tell({"thawed": not failure, "cause": cause, "failure": failure})


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    sender = _Input()
    line = sender.line(None)
    if not line:
        return
    order = json.loads(line)
    if not _take_lock(order["lock"], order["lock_wait"]):
        failure = "another watchdog's freeze or thaw of this machine has not ended"
        if order["freeze"]:
            _tell({"frozen": False, "failure": failure})
        _tell({"thawed": False, "failure": failure})
        return
    started = time.monotonic()
    if order["freeze"]:
        output, failure = _run(order["freeze"], order["environment"], order["limit"])
        _tell({"frozen": not failure, "output": output, "failure": failure})
        if failure:
            _thaw(order, "request")
            return
        line = sender.line(max(0.0, order["limit"] - (time.monotonic() - started)))
    elif not Path(order["mark"]).exists():
        _tell({"thawed": True, "cause": "earlier", "failure": ""})
        return
    _thaw(order, {b"": "orphan", b"\n": "limit"}.get(line, "request"))


if __name__ == "__main__":
    main()
