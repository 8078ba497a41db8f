"""The process that thaws, whatever becomes of the sender. Run as a program, never imported by it.

A guest that stays frozen is an outage made by its own disaster recovery. So
neither freeze nor thaw is run by the sender: this child runs both, in a session
of its own, and is linked to the sender by two pipes only.

    watchdog -> sender   one JSON line when it is ready ({"about": "ready"})
    sender -> watchdog   one JSON line (`freeze`, `thaw`, `limit`, `thaw_limit`, `thaw_again`, `environment`, `mark`,
                         `lock`), later one line: "now thaw"
    watchdog -> sender   one JSON line when frozen ({"about": "frozen", "frozen": true, "output": …}) or when that
                         failed, one when thawed ({"about": "thawed", "cause": "request" | "limit" | "orphan"})

It thaws on request, when its input ends (the sender died, even by SIGKILL) and
when the limit has passed, each only after the freeze command has ended or was
killed, so that a late freeze never follows a thaw. A thaw that fails is tried
again a few times. Neither a sender that does not read its answers nor a command
that prints without end keeps it from that. After a successful thaw it
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
import queue
import select
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import IO, Any

_TAIL_BYTES = 2000
_HEAD_BYTES = 1 << 20
_PIPE_READS = 17
"""Enough reads for all that a pipe holds by Linux' limit (1 MiB), and bounded."""

_LINGER_SECONDS = 5.0


class _Kept:
    """What is kept of a command's output: the first MiB and the last 2 KB. A command may print without end."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self.pipe = pipe
        self.head, self.tail = b"", b""

    def take(self) -> bool:
        """Read once; False when everybody closed the other end."""
        data = os.read(self.pipe.fileno(), 65536)
        self.head += data[: max(0, _HEAD_BYTES - len(self.head))]
        self.tail = (self.tail + data)[-_TAIL_BYTES:]
        return bool(data)

    def take_rest(self) -> None:
        """Take what stands in the pipe. A daemon left behind may hold it: its output is then read and dropped."""
        for _ in range(_PIPE_READS):
            if not select.select([self.pipe], [], [], 0)[0]:
                break
            if not self.take():
                self.pipe.close()
                return
        threading.Thread(target=_drop, args=(self.pipe,), daemon=True).start()


def _drop(pipe: IO[bytes]) -> None:
    while os.read(pipe.fileno(), 65536):
        pass
    pipe.close()


def _run(argv: list[str], environment: dict[str, str], limit_seconds: float) -> tuple[str, str]:
    """Run a command; (its output, why it failed or "")."""
    deadline = time.monotonic() + max(limit_seconds, 0.01)
    try:
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    except OSError as error:
        return "", f"it cannot be run: {error.strerror}"
    except ValueError as error:
        return "", f"it cannot be run: {error}"
    assert child.stdout is not None and child.stderr is not None
    output, errors = _Kept(child.stdout), _Kept(child.stderr)
    if _wait(child, [output, errors], deadline):
        failure = "" if child.returncode == 0 else f"it ended with status {child.returncode}"
    else:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        failure = f"it did not end within {limit_seconds:g} s and was killed"
    output.take_rest()
    errors.take_rest()
    said = errors.tail.decode(errors="replace")
    if failure and said.strip():
        failure += f": {' '.join(said.split())}"
    return output.head.decode(errors="replace"), failure


def _wait(child: subprocess.Popen[bytes], kept: list[_Kept], deadline: float) -> bool:
    """Read what the command prints until it has ended; False at the deadline. Its pipes need not end with it."""
    ended = os.pidfd_open(child.pid)
    by_pipe: dict[Any, _Kept] = {one.pipe: one for one in kept}
    try:
        while (rest := deadline - time.monotonic()) > 0:
            readable = select.select([ended, *by_pipe], [], [], rest)[0]
            if ended in readable:
                child.wait()
                return True
            for pipe in readable:
                if not by_pipe[pipe].take():
                    del by_pipe[pipe]
        return False
    finally:
        os.close(ended)


class _Output:
    """Answers to the sender. It may be gone, stopped or slow: no answer is ever waited for before the thaw."""

    def __init__(self) -> None:
        self._answers: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def tell(self, about: str, **answer: Any) -> None:
        self._answers.put(json.dumps({"about": about, **answer}).encode() + b"\n")

    def end(self) -> None:
        """Give the sender a little time to take the answers that do not fit into the pipe."""
        self._answers.put(None)
        self._thread.join(_LINGER_SECONDS)

    def _write(self) -> None:
        with contextlib.suppress(OSError):
            while (answer := self._answers.get()) is not None:
                while answer:
                    answer = answer[os.write(1, answer) :]


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


def _thaw(order: dict[str, Any], cause: str, sender: _Output) -> None:
    """Thaw, and again if it failed: whatever stops the sender may have hit the thaw command, too."""
    failure = ""
    if order["thaw"]:
        started = time.monotonic()
        _, failure = _run(order["thaw"], order["environment"], order["thaw_limit"])
        for seconds in order["thaw_again"]:
            if not failure or time.monotonic() - started > order["thaw_limit"] / 2:
                break
            time.sleep(seconds)
            _, failure = _run(order["thaw"], order["environment"], order["thaw_limit"])
    if not failure:
        _remove_mark(Path(order["mark"]))
    sender.tell("thawed", thawed=not failure, cause=cause, failure=failure)


def _obey(order: dict[str, Any], lines: _Input, sender: _Output) -> None:
    if not _take_lock(order["lock"], order["lock_wait"]):
        failure = "another watchdog's freeze or thaw of this machine has not ended"
        if order["freeze"]:
            sender.tell("frozen", frozen=False, failure=failure)
        sender.tell("thawed", thawed=False, failure=failure)
        return
    started = time.monotonic()
    if order["freeze"]:
        output, failure = _run(order["freeze"], order["environment"], order["limit"])
        sender.tell("frozen", frozen=not failure, output=output, failure=failure)
        if failure:
            _thaw(order, "request", sender)
            return
        line = lines.line(max(0.0, order["limit"] - (time.monotonic() - started)))
    elif Path(order["mark"]).exists():
        line = lines.line(None)
    else:
        sender.tell("thawed", thawed=True, cause="earlier", failure="")
        return
    _thaw(order, {b"": "orphan", b"\n": "limit"}.get(line, "request"), sender)


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    lines, sender = _Input(), _Output()
    sender.tell("ready")
    line = lines.line(None)
    if line:
        _obey(json.loads(line), lines, sender)
    sender.end()


if __name__ == "__main__":
    main()
