"""Many small machines on one receiver: what a start, an idle cycle and their memory cost.

    python -m bench.machines [--count 1000] [--fresh-runs 20] [--parallel 4] [--json FILE] [--dir DIR]

Makes `--count` images of 64 MiB (sparse, with a little content of their own),
copies them through real processes (`replica serve`, `replica sync`, TLS on
loopback), starts the receiver anew and measures:

- the start: until it answers a request, and until every replica is recovered;
- the receiver's memory, descriptors and threads then, and after idle cycles;
- an idle cycle of all of them by one `replica run` and by one `replica sync`
  without a name: processor time of both processes, and wall time;
- `replica sync MACHINE` in a fresh process each, `--fresh-runs` of them, times the count: what the others are held
  against. The limit is a tenth of it.

`--connections 500` adds: the receiver's memory with that many idle connections over TLS.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.site import REPLICA
from bench.workload import MIB
from replica.transport.client import HttpReceiver
from replica.transport.tls import TlsFiles, client_context

IMAGE_BYTES = 64 * MIB
CONTENT_BYTES = 64 << 10
TICKS = os.sysconf("SC_CLK_TCK")
PATIENCE_SECONDS = 1800.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.machines", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="how many machines (default 1000)")
    parser.add_argument("--fresh-runs", type=int, default=20, help="fresh `sync MACHINE` processes (default 20)")
    parser.add_argument("--parallel", type=int, default=4, help="the sender's `parallel` (default 4)")
    parser.add_argument("--connections", type=int, default=0, help="idle connections to measure, too (at most 500)")
    parser.add_argument("--json", type=Path, help="write the figures there as JSON, too")
    parser.add_argument("--dir", type=Path, help="where to work (default: a temporary directory)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="replica-bench-", dir=options.dir) as directory:
        figures = measure(Path(directory), options)
    report(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


@dataclass(frozen=True)
class Usage:
    """What a process has used, and has, at one moment."""

    cpu_seconds: float
    resident_bytes: int
    descriptors: int
    threads: int

    @classmethod
    def of(cls, pid: int) -> Usage:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        cpu = (int(fields[11]) + int(fields[12])) / TICKS
        return cls(cpu, resident, sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()), int(fields[17]))


class Fleet:
    """The images, both configurations and the two sites' processes."""

    def __init__(self, directory: Path, count: int, parallel: int) -> None:
        self.directory, self.count, self.parallel = directory, count, parallel
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        pki = directory / "pki"
        self.command("pki", "init", pki)
        self.command("pki", "issue", pki, "dr-1", "--host", "127.0.0.1", "--host", "localhost")
        self.command("pki", "issue", pki, "hv-1")
        self.tls = TlsFiles(pki / "ca.crt", pki / "hv-1.crt", pki / "hv-1.key")
        self.sender, self.receiver = directory / "sender.toml", directory / "receiver.toml"
        self._make_images()
        self._write_configurations()
        self.log = directory / "serve.log"
        self.server: subprocess.Popen[bytes] | None = None

    def name(self, number: int) -> str:
        return f"vm-{number:04d}"

    def _image(self, number: int) -> Path:
        return self.directory / "images" / f"{self.name(number)}.raw"

    def _make_images(self) -> None:
        generator = np.random.default_rng(1)
        (self.directory / "images").mkdir()
        for number in range(self.count):
            with self._image(number).open("wb") as file:
                os.truncate(file.fileno(), IMAGE_BYTES)
                os.pwrite(file.fileno(), generator.bytes(CONTENT_BYTES), int(generator.integers(0, 1000)) * 65536)

    def _write_configurations(self) -> None:
        tls = '[tls]\nca = "pki/ca.crt"\ncert = "pki/{0}.crt"\nkey = "pki/{0}.key"\n'
        self.receiver.write_text(
            f'listen = "127.0.0.1:{self.port}"\n{tls.format("dr-1")}'
            '[[storage]]\nname = "bench"\npath = "replicas/"\n'
            '[[allow]]\nprimary = "hv-*"\nstorage = "bench"\ntrust_group = "bench"\n'
        )
        machines = (
            f'[[machine]]\nname = "{self.name(n)}"\nto = "https://127.0.0.1:{self.port}"\nevery = "1s"\n'
            f'[[machine.disk]]\nname = "os"\nimage = "{self._image(n)}"\nformat = "raw"\n'
            for n in range(self.count)
        )
        self.sender.write_text(
            f'name = "hv-1"\nstate = "state/"\nparallel = {self.parallel}\n{tls.format("hv-1")}{"".join(machines)}'
        )

    def command(self, *arguments: object) -> str:
        done = subprocess.run([*REPLICA, *map(str, arguments)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"replica {' '.join(map(str, arguments))} failed: {done.stderr}")
        return done.stdout

    def serve(self) -> tuple[float, float]:
        """Start the receiver: seconds until it answers a request, and until every replica is recovered."""
        began = time.perf_counter()
        with self.log.open("wb") as log:
            self.server = subprocess.Popen([*REPLICA, "serve", "-c", str(self.receiver)], stderr=log)
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                break
            except OSError:
                self._check(began)
                time.sleep(0.01)
        client = HttpReceiver(f"https://127.0.0.1:{self.port}", self.tls)
        client.replicas("nobody")
        client.close()
        answers = time.perf_counter() - began
        while not re.search(r" replicas, \d+ stopped", self.log.read_text()):
            self._check(began)
            time.sleep(0.01)
        return answers, time.perf_counter() - began

    def _check(self, began: float) -> None:
        assert self.server is not None
        if self.server.poll() is not None or time.perf_counter() - began > PATIENCE_SECONDS:
            raise SystemExit(f"the receiver does not start: {self.log.read_text()}")

    def stop(self) -> float:
        """End the receiver in good order; the seconds that took."""
        assert self.server is not None
        began = time.perf_counter()
        self.server.terminate()
        self.server.wait(120)
        self.server = None
        return time.perf_counter() - began

    def usage(self) -> Usage:
        assert self.server is not None
        return Usage.of(self.server.pid)

    def sync(self, *machine: str) -> dict[str, float]:
        """One `replica sync` process: processor time of both sides, wall time, the sender's peak memory."""
        before, began = self.usage(), time.perf_counter()
        process = subprocess.Popen(
            [*REPLICA, "sync", *machine, "-c", str(self.sender), "--json"], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = status
        if status:
            raise SystemExit("sync failed")
        return {
            "sender_cpu_seconds": used.ru_utime + used.ru_stime,
            "receiver_cpu_seconds": self.usage().cpu_seconds - before.cpu_seconds,
            "wall_seconds": time.perf_counter() - began,
            "sender_peak_bytes": used.ru_maxrss * 1024,
        }

    def run(self) -> dict[str, float]:
        """`replica run`: the second cycle of every machine, after a first one that is not measured."""
        log = self.directory / "run.log"
        with log.open("wb") as target:
            process = subprocess.Popen([*REPLICA, "run", "-c", str(self.sender)], stderr=target)
        try:
            self._await_cycles(process, log, self.count)
            before, sender, began = self.usage(), Usage.of(process.pid), time.perf_counter()
            done = self._await_cycles(process, log, 2 * self.count) - self.count
            wall, after, sender_after = time.perf_counter() - began, self.usage(), Usage.of(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(120)
        share = self.count / done
        return {
            "sender_cpu_seconds": (sender_after.cpu_seconds - sender.cpu_seconds) * share,
            "receiver_cpu_seconds": (after.cpu_seconds - before.cpu_seconds) * share,
            "wall_seconds": wall * share,
            "sender_resident_bytes": sender_after.resident_bytes,
            "sender_descriptors": sender_after.descriptors,
            "sender_threads": sender_after.threads,
        }

    def _await_cycles(self, process: subprocess.Popen[bytes], log: Path, count: int) -> int:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (done := log.read_bytes().count(b" bytes changed, ")) < count:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"run does not get on: {log.read_text()[-2000:]}")
            time.sleep(0.05)
        return done

    def idle_connections(self, count: int) -> dict[str, float]:
        """Memory that `count` connections cost which have made a request and wait."""
        before = self.usage()
        with contextlib.ExitStack() as stack:
            for number in range(count):
                address = (f"127.0.1.{number // 50 + 1}", 0)  # the receiver takes at most 64 of one address
                raw = socket.create_connection(("127.0.0.1", self.port), 10, source_address=address)
                tls = client_context(self.tls).wrap_socket(raw, server_hostname="127.0.0.1")
                stack.callback(tls.close)
                _ask(tls)
            after = self.usage()
        return {
            "count": count,
            "resident_bytes": after.resident_bytes - before.resident_bytes,
            "descriptors": after.descriptors - before.descriptors,
            "threads": after.threads - before.threads,
        }


def _ask(connection: ssl.SSLSocket) -> None:
    connection.sendall(b"GET /v1/replicas?machine=nobody HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    if not connection.recv(4096).startswith(b"HTTP/1.1 200"):
        raise SystemExit("the receiver does not answer")


def measure(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    say(f"making {options.count} images")
    fleet = Fleet(directory, options.count, options.parallel)
    figures: dict[str, Any] = {"count": options.count, "parallel": options.parallel}
    try:
        fleet.serve()
        say("first copies")
        figures["first_copies"] = fleet.sync()
        figures["after_first_copies"] = vars(fleet.usage())
        figures["stop_seconds"] = fleet.stop()
        say("starting the receiver anew")
        figures["answers_seconds"], figures["recovered_seconds"] = fleet.serve()
        figures["after_start"] = vars(fleet.usage())
        say("fresh processes")
        fresh = [fleet.sync(fleet.name(number % options.count)) for number in range(options.fresh_runs)]
        figures["fresh"] = {key: statistics.median(run[key] for run in fresh) for key in fresh[0]}
        say("idle cycle, one `replica sync`")
        figures["sync"] = fleet.sync()
        say("idle cycles, `replica run`")
        figures["run"] = fleet.run()
        figures["after_cycles"] = vars(fleet.usage())
        if options.connections:
            say("idle connections")
            figures["connections"] = fleet.idle_connections(min(options.connections, 500))
        figures["stop_again_seconds"] = fleet.stop()
    finally:
        if fleet.server is not None:
            fleet.server.kill()
    return figures


def report(figures: dict[str, Any]) -> None:
    count, fresh = figures["count"], figures["fresh"]
    print(f"\n{count} machines of {IMAGE_BYTES // MIB} MiB, {os.cpu_count()} CPUs, parallel = {figures['parallel']}")
    print(f"start: answers after {figures['answers_seconds']:.2f} s, all recovered after "
          f"{figures['recovered_seconds']:.2f} s; an orderly end {figures['stop_again_seconds']:.2f} s")  # fmt: skip
    for what in ("after_first_copies", "after_start", "after_cycles"):
        usage = figures[what]
        print(f"receiver {what.replace('_', ' ')}: {usage['resident_bytes'] / MIB:.0f} MiB, "
              f"{usage['descriptors']} descriptors, {usage['threads']} threads")  # fmt: skip
    print(f"{'an idle cycle of all':28} {'sender s':>9} {'receiver s':>11} {'CPU s':>8} {'wall s':>8} {'x fresh':>8}")
    whole = fresh["sender_cpu_seconds"] + fresh["receiver_cpu_seconds"]
    rows = [(f"{count} x sync MACHINE, fresh", {key: value * count for key, value in fresh.items()})]
    rows += [("one sync of all", figures["sync"]), ("run", figures["run"])]
    for what, row in rows:
        cpu = row["sender_cpu_seconds"] + row["receiver_cpu_seconds"]
        print(f"{what:28} {row['sender_cpu_seconds']:9.2f} {row['receiver_cpu_seconds']:11.2f} {cpu:8.2f} "
              f"{row['wall_seconds']:8.2f} {cpu / (whole * count):8.3f}")  # fmt: skip
    if "connections" in figures:
        idle = figures["connections"]
        print(f"{idle['count']} idle connections: {idle['resident_bytes'] / MIB:.1f} MiB "
              f"({idle['resident_bytes'] / idle['count'] / 1024:.0f} KiB each), {idle['threads']} threads")  # fmt: skip


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
