"""What a run of other processes costs: wall, CPU of all of them, peak memory, bytes over loopback.

    isolate()                                     once, at the very start: network and mounts of our own
    with Group("btrfs") as group:
        process = group.start(["openssl", …])     descendants are counted, too, also those that daemonise
        with group.measured() as cost:
            …
        print(cost.wall_seconds, cost.cpu_seconds)

As root a group is a cgroup, and its CPU that of every process that was ever in it, in microseconds. Otherwise it is
what /proc says of the processes started here, in steps of 10 ms, and descendants count once their parent has waited for
them. What kernel threads do on their behalf (loop devices, btrfs workers, writeback) is in neither:
`system_cpu_seconds` is what all of the machine spent meanwhile, which on a quiet machine has it.

Peak memory is each process's VmHWM, looked at every 50 ms (`ru_maxrss` would count the memory of the process that
forked it). Bytes over loopback come from the interface's counter, both directions, TCP/IP headers included; in a
network namespace of its own nobody else's are in it.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_TICKS = os.sysconf("SC_CLK_TCK")
_SAMPLE_SECONDS = 0.05


def say(text: str) -> None:
    """Progress, on standard error."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def isolate() -> bool:
    """Give this process a network and mounts of its own, so that loopback counts us only and mounts end with us.

    Only before threads are started. False where that is not permitted: then everybody's loopback bytes are counted.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET | _CLONE_NEWNS):
        return False
    if libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None):
        raise OSError(ctypes.get_errno(), "cannot make the mounts private")
    with socket.socket() as any_socket:
        request = bytearray(struct.pack("16sH22x", b"lo", 0))
        fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request)
        flags = struct.unpack_from("H", request, 16)[0]
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", flags | _IFF_UP))
    return True


def loopback_bytes() -> int:
    """Bytes that went over the loopback interface so far, each once."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[0])
    return 0


def system_cpu_seconds() -> float:
    """Processor time that all of this machine has spent, kernel threads and interrupts included."""
    fields = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return (sum(fields[:3]) + sum(fields[5:7])) / _TICKS


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_listening(port: int, process: subprocess.Popen[bytes] | None = None, seconds: float = 20.0) -> None:
    """Until somebody listens on that TCP port; looks without connecting, since some servers take one connection."""
    deadline = time.monotonic() + seconds
    listening = re.compile(rf":{port:04X} [0-9A-F]+:0000 0A ")
    while not any(listening.search(Path(f"/proc/self/net/{name}").read_text()) for name in ("tcp", "tcp6")):
        if (process is not None and process.poll() is not None) or time.monotonic() > deadline:
            raise SystemExit(f"nothing listens on port {port}")
        time.sleep(0.005)


@dataclass
class Cost:
    """What one measured stretch took. `peak_bytes`: of the largest process; `peaks`: of each, by its command."""

    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    system_cpu_seconds: float = 0.0
    peak_bytes: int = 0
    wire_bytes: int = 0
    peaks: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Group:
    """Processes whose cost is counted together. A context manager: leaving it ends those that are left."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._processes: list[subprocess.Popen[bytes]] = []
        self._directory = _make_cgroup(f"replica-bench-{os.getpid()}-{name}")
        self._peaks: dict[int, tuple[str, int]] = {}
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample, name=f"sample-{name}", daemon=True)
        self._sampler.start()

    def start(self, command: Sequence[object], **options: Any) -> subprocess.Popen[bytes]:
        """Popen of it, in this group."""
        process = subprocess.Popen([str(part) for part in command], preexec_fn=self._enter, **options)
        self._processes.append(process)
        return process

    def run(self, command: Sequence[object], **options: Any) -> None:
        """Run it to its end. SystemExit, with what it said, if it fails."""
        process = self.start(command, stderr=subprocess.PIPE, **options)
        _, errors = process.communicate()
        if process.returncode:
            raise SystemExit(f"{' '.join(map(str, command))} failed: {errors.decode(errors='replace').strip()}")

    def cpu_seconds(self) -> float:
        """Processor time of every process that was in the group, so far."""
        if self._directory is not None:
            return int((self._directory / "cpu.stat").read_text().split()[1]) / 1e6
        children = os.times()
        return children.children_user + children.children_system + sum(map(_cpu_of, self._pids()))

    def peaks(self) -> dict[str, int]:
        """Peak memory by command so far: of the largest process of each."""
        self._look()
        largest: dict[str, int] = {}
        for command, peak in list(self._peaks.values()):
            largest[command] = max(peak, largest.get(command, 0))
        return largest

    @contextmanager
    def measured(self) -> Iterator[Cost]:
        """The cost of what happens inside, filled in at its end."""
        cost = Cost()
        cpu, system, wire = self.cpu_seconds(), system_cpu_seconds(), loopback_bytes()
        began = time.perf_counter()
        yield cost
        cost.wall_seconds = time.perf_counter() - began
        cost.cpu_seconds = self.cpu_seconds() - cpu
        cost.system_cpu_seconds = system_cpu_seconds() - system
        cost.wire_bytes = loopback_bytes() - wire
        cost.peaks = self.peaks()
        cost.peak_bytes = max(cost.peaks.values(), default=0)

    def close(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        for process in self._processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid in self._pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._ended.set()
        self._sampler.join()
        if self._directory is not None:
            _remove_cgroup(self._directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _enter(self) -> None:
        if self._directory is not None:
            (self._directory / "cgroup.procs").write_text("0")

    def _pids(self) -> list[int]:
        if self._directory is not None:
            return [int(pid) for pid in (self._directory / "cgroup.procs").read_text().split()]
        return [process.pid for process in self._processes if process.returncode is None]

    def _sample(self) -> None:
        while not self._ended.wait(_SAMPLE_SECONDS):
            self._look()

    def _look(self) -> None:
        for pid in self._pids():
            with suppress(OSError):
                text = Path(f"/proc/{pid}/status").read_text()
                found = re.search(r"VmHWM:\s+(\d+)", text)
                if found:  # what has ended, and waits for its parent, has none
                    command = text.split("\n", 1)[0].split("\t", 1)[1]
                    before, peak = self._peaks.get(pid, ("", 0))
                    self._peaks[pid] = (command, max(int(found[1]) * 1024, peak if command == before else 0))


def pipeline(group: Group, stages: Sequence[Sequence[object]], **ends: Any) -> list[subprocess.Popen[bytes]]:
    """Start a pipe of commands; `ends` may name `stdin` of the first, `stdout` of the last, `stderr` of all."""
    started: list[subprocess.Popen[bytes]] = []
    for number, stage in enumerate(stages):
        last = number == len(stages) - 1
        source = started[-1].stdout if started else ends.get("stdin", subprocess.DEVNULL)
        sink = ends.get("stdout") if last else subprocess.PIPE
        started.append(group.start(stage, stdin=source, stdout=sink, stderr=ends.get("stderr")))
        if number:
            source.close()
    return started


def wait_all(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Until all have ended. SystemExit if one failed."""
    for process in processes:
        if process.wait():
            raise SystemExit(f"{process.args!r} failed with {process.returncode}")


def _cpu_of(pid: int) -> float:
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS
    return 0.0


def _make_cgroup(name: str) -> Path | None:
    for root in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")):
        if (root / "cgroup.controllers").exists():
            with suppress(OSError):
                (root / name).mkdir()
                return root / name
    return None


def _remove_cgroup(directory: Path) -> None:
    for _ in range(100):
        with suppress(OSError):
            directory.rmdir()
            return
        time.sleep(0.02)
