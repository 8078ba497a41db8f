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

Should it be killed itself, the command it runs goes on, and a freeze that ends
after the next one's thaw would hold for ever. So its commands run in its
session, and while one does, the lock's file names that session: the next
watchdog first ends whatever is left of it. If it cannot, it thaws and leaves
the mark, so that every cycle tries again and none freezes.

It imports the standard library only, in isolated mode, and removes its mark
with its own two system calls: the one exception to `durable` being the only door.
"""

from __future__ import annotations

import contextlib
import errno
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
_END_SECONDS = 10.0
"""How long what a killed watchdog left running may take to end after SIGKILL."""


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
            process_group=0,
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


class _Lock:
    """The lock on the machine's freezing, held until this process ends; its file says whose command is running."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def take(cls, path: str, wait_seconds: float) -> _Lock | None:
        """None if another watchdog still has it."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return cls(fd)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    return None
                time.sleep(0.05)

    def note(self) -> None:
        """From now on a command runs in this process's session. OSError if that cannot be noted."""
        stat = _stat(os.getpid())
        if not stat or not _where():
            raise OSError(errno.ENOENT, "/proc cannot be read")
        session = {"session": os.getpid(), "started": stat[_STARTED], "where": _where()}
        os.pwrite(self._fd, json.dumps(session).encode(), 0)

    def forget(self) -> None:
        """The command has ended, or was killed."""
        os.ftruncate(self._fd, 0)

    def end_other(self) -> bool:
        """End what a watchdog that was killed left running. False if some of it goes on."""
        try:
            noted = json.loads(os.pread(self._fd, 4096, 0))
            session, started, where = int(noted["session"]), str(noted["started"]), str(noted["where"])
        except (ValueError, TypeError, KeyError):  # nothing is noted, or the host went down while it was written
            where = ""
        if where and where == _where() and not _end_session(session, started):
            return False
        self.forget()
        return True


_STATE, _SESSION, _STARTED = 0, 3, 19


def _stat(pid: int) -> list[str]:
    """Of /proc/<pid>/stat what comes behind the name (proc_pid_stat(5), from field 3 on); empty: it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []


def _where() -> str:
    """Which host, since which start, and which of its process trees: elsewhere the same number is another process.

    Empty where there is no /proc.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _end_session(session: int, started: str) -> bool:
    """Kill every process of a session; False if some are still there after a while.

    A number is not given again while a process has it as its session, so another process of that number means that
    nothing is left. Seen empty twice: a process may fork while the list is read.
    """
    deadline = time.monotonic() + _END_SECONDS
    empty = 0
    while empty < 2:
        leader = _stat(session)
        if leader and leader[_STARTED] != started:
            return True
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        found = [pid for pid in pids if _is_of(_stat(pid), session)]
        empty = 0 if found else empty + 1
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if found and time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _is_of(stat: list[str], session: int) -> bool:
    return bool(stat) and stat[_SESSION] == str(session) and stat[_STATE] not in ("Z", "X")


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


def _thaw(order: dict[str, Any], cause: str, sender: _Output, lock: _Lock, left: str = "") -> None:
    """Thaw, and again if it failed: whatever stops the sender may have hit the thaw command, too.

    `left`: why the machine may be frozen again after it.
    """
    failure = ""
    if order["thaw"]:
        if not left:
            with contextlib.suppress(OSError):  # a thaw is run whatever can be written
                lock.note()
        started = time.monotonic()
        _, failure = _run(order["thaw"], order["environment"], order["thaw_limit"])
        for seconds in order["thaw_again"]:
            if not failure or time.monotonic() - started > order["thaw_limit"] / 2:
                break
            time.sleep(seconds)
            _, failure = _run(order["thaw"], order["environment"], order["thaw_limit"])
        if not left:
            lock.forget()
    failure = failure or left
    if not failure:
        _remove_mark(Path(order["mark"]))
    sender.tell("thawed", thawed=not failure, cause=cause, failure=failure)


def _freeze(order: dict[str, Any], lock: _Lock) -> tuple[str, str]:
    """Run the freeze command; (its output, why it failed or "")."""
    try:
        lock.note()
    except OSError as error:
        return "", f"that it runs cannot be noted in {order['lock']}: {error.strerror}"
    found = _run(order["freeze"], order["environment"], order["limit"])
    lock.forget()
    return found


def _obey(order: dict[str, Any], lines: _Input, sender: _Output) -> None:
    lock = _Lock.take(order["lock"], order["lock_wait"])
    if lock is None:
        _refuse(order, sender, "another watchdog's freeze or thaw of this machine has not ended")
        return
    left = "" if lock.end_other() else "what a killed watchdog was running cannot be ended and may freeze it again"
    started = time.monotonic()
    if order["freeze"] and left:
        _refuse(order, sender, left)
        return
    if order["freeze"]:
        output, failure = _freeze(order, lock)
        sender.tell("frozen", frozen=not failure, output=output, failure=failure)
        if failure:
            _thaw(order, "request", sender, lock)
            return
        line = lines.line(max(0.0, order["limit"] - (time.monotonic() - started)))
    elif Path(order["mark"]).exists():
        line = lines.line(None)
    else:
        sender.tell("thawed", thawed=True, cause="earlier", failure="")
        return
    _thaw(order, {b"": "orphan", b"\n": "limit"}.get(line, "request"), sender, lock, left)


def _refuse(order: dict[str, Any], sender: _Output, failure: str) -> None:
    if order["freeze"]:
        sender.tell("frozen", frozen=False, failure=failure)
    sender.tell("thawed", thawed=False, failure=failure)


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
