"""A replica site and a sender for a benchmark: the real processes, over loopback, and what they cost.

    with Lab(directory, image) as lab:
        cycle = lab.fresh()                       a fresh `replica sync`
        with lab.daemon() as daemon:
            cycle = daemon.cycle()                the next cycle of `replica run`

The running sender is stopped (SIGSTOP) between the cycles that are asked for, so that an image can be changed, or
somebody else measured, meanwhile; `every` is the shortest, so it goes on at once when it may.
"""

from __future__ import annotations

import compileall
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import replica
from bench.measure import Cost, Group, free_port, wait_listening
from bench.tls import REPLICA, Certificates

_CYCLE = re.compile(r"machine 'web-1': point (\d+) of \S+, (\d+) bytes changed, (\d+) sent, ([\d.]+) s$")
_FAILED = re.compile(r" (ERROR|CRITICAL) ")


@dataclass(frozen=True)
class Cycle:
    """One point made: its cost, the grains that changed, and HTTP bytes before TLS. `cost.peaks`: per side."""

    cost: Cost
    changed_bytes: int
    http_bytes: int


class Lab:
    """PKI, configuration, a running receiver; senders as they are asked for."""

    def __init__(self, directory: Path, image: Path, *, storage: Path | None = None) -> None:
        """`storage`: where the replicas lie; in `directory` without it."""
        compileall.compile_dir(Path(replica.__file__).parent, quiet=1)  # as an installation has it
        directory.mkdir(exist_ok=True)
        self.directory, self.image = directory, image
        self.certificates = Certificates(directory / "pki")
        self.port = free_port()
        self.receiver_toml, self.sender_toml = directory / "receiver.toml", directory / "sender.toml"
        self.storage = storage or directory / "replicas"
        self.receiver_toml.write_text(
            f'listen = "127.0.0.1:{self.port}"\n'
            '[tls]\nca = "pki/ca.crt"\ncert = "pki/dr-1.crt"\nkey = "pki/dr-1.key"\n'
            f'[[storage]]\nname = "bench"\npath = "{self.storage}/"\n[[allow]]\nprimary = "hv-*"\nstorage = "bench"\n'
            'trust_group = "bench"\n'
        )
        self.sender_toml.write_text(
            'name = "hv-1"\nstate = "state/"\n[tls]\nca = "pki/ca.crt"\ncert = "pki/hv-1.crt"\nkey = "pki/hv-1.key"\n'
            f'[[machine]]\nname = "web-1"\nto = "https://127.0.0.1:{self.port}"\nevery = "1s"\n'
            f'[[machine.disk]]\nname = "os"\nimage = "{image}"\nformat = "raw"\n'
        )
        self.receivers, self.senders = Group("receiver"), Group("sender")
        self._log = (directory / "receiver.log").open("wb")
        serve = [*REPLICA, "serve", "-c", self.receiver_toml]
        try:
            wait_listening(self.port, self.receivers.start(serve, stderr=self._log))
        except BaseException:
            self.close()
            print((directory / "receiver.log").read_text(), file=sys.stderr)
            raise

    def fresh(self) -> Cycle:
        """One `replica sync` as a fresh process, from its start to its end."""
        with self.measured() as cost:
            process = self.senders.start(
                [*REPLICA, "sync", "web-1", "-c", self.sender_toml, "--json"], stdout=subprocess.PIPE
            )
            output, _ = process.communicate()
        if process.returncode:
            raise SystemExit("sync failed")
        result = json.loads(output)[0]
        return Cycle(cost, result["bytes_changed"], result["bytes_wire"])

    @contextmanager
    def measured(self) -> Iterator[Cost]:
        """What both sides cost together; peaks by side."""
        total = Cost()
        with self.receivers.measured() as receiver, self.senders.measured() as sender:
            yield total
        vars(total).update(vars(replace(sender, cpu_seconds=sender.cpu_seconds + receiver.cpu_seconds)))
        total.peaks = {"sender": sender.peak_bytes, "receiver": receiver.peak_bytes}
        total.peak_bytes = max(total.peaks.values())

    @contextmanager
    def daemon(self) -> Iterator[Daemon]:
        """`replica run`, which makes a cycle when asked; the first one begins with it."""
        process = self.senders.start([*REPLICA, "run", "-c", self.sender_toml], stderr=subprocess.PIPE)
        daemon = Daemon(self, process)
        try:
            yield daemon
        finally:
            for number in (signal.SIGCONT, signal.SIGTERM):
                os.kill(process.pid, number)
            process.communicate()

    def head(self) -> Path:
        """The image file of the newest point at the replica."""
        return next(self.storage.glob("*/head/*.img"))

    def close(self) -> None:
        self.senders.close()
        self.receivers.close()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class Daemon:
    """A `replica run` that stands still until its next cycle is asked for."""

    def __init__(self, lab: Lab, process: subprocess.Popen[bytes]) -> None:
        self._lab, self._process = lab, process

    def cycle(self) -> Cycle:
        """Let it make one cycle. The wall time is its own, from contact over freeze to the committed point and fold.

        Its processor time and bytes are of the whole stretch until it says so: a schedule's ticks, and a new
        connection where the receiver has closed the old one, are in them.
        """
        with self._lab.measured() as cost:
            os.kill(self._process.pid, signal.SIGCONT)
            changed, sent, seconds = self._next_line()
            os.kill(self._process.pid, signal.SIGSTOP)
        cost.wall_seconds = seconds
        return Cycle(cost, changed, sent)

    def _next_line(self) -> tuple[int, int, float]:
        assert self._process.stderr is not None
        for raw in self._process.stderr:
            line = raw.decode().rstrip()
            found = _CYCLE.search(line)
            if found:
                return int(found[2]), int(found[3]), float(found[4])
            if _FAILED.search(line):
                raise SystemExit(f"`replica run` says: {line}")
        raise SystemExit("`replica run` ended")
