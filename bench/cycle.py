"""The product beside its peers, cycle by cycle, in one run on one machine; and whether it is as good as it must be.

    python -m bench.cycle [--size-mib 4096] [--runs 3] [--scenarios first,idle,grains,runs,rewrite]
                          [--peers btrfs,nbdcopy,rsync] [--json FILE] [--plots DIR] [--dir DIR]

Ours are `replica serve` with `replica run` (called daemon) and with a fresh `replica sync` (called fresh): from contact
over freeze to the committed point, every leaf read back. The peers are in `bench.peers`. In every round each gets the
same kind of change (`bench.workload`) in its own image, one after the other; a peer with an image of its own the very
bytes that the daemon ships. The image to be read is read once before, so that every cache is warm. A peer that reads
our image is brought up to date first, so that it ships one change, too. Medians of `--runs` rounds; peers that are slow
by an order (`ONCE`) are measured in the first one only. Peak memory is a process's since it began, so the receiver's is
that of all rounds so far.

A criterion (`bench.criteria`) is a ratio within this run. On a machine that is busy with other things all of them are
slower, and not all by the same factor: the load is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import zstandard

from bench import report
from bench.criteria import judge
from bench.limits import openssl_seconds, pread_all, pread_allocated
from bench.measure import Cost, Group, isolate, say
from bench.peers import PEERS, Peer
from bench.site import Cycle, Lab
from bench.stages import ScanBench
from bench.tls import REPLICA, Certificates
from bench.wire import segments_seconds
from bench.workload import GRAIN, MIB, change, make_image, places

SCENARIOS = ("first", "idle", "grains", "runs", "rewrite")
ONCE = ("rsync", "borg", "restic")
"""Peers so slow that one round must do."""
COPIES_ALL = ("first", "rewrite")
"""Where a peer that copies everything is measured."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cycle", description=__doc__.splitlines()[0])
    parser.add_argument("--size-mib", type=int, default=4096, help="size of the image (default 4096)")
    parser.add_argument("--runs", type=int, default=3, help="rounds, the median counts (default 3)")
    parser.add_argument("--scenarios", default=",".join(SCENARIOS), help="which (default: all)")
    parser.add_argument("--peers", default="btrfs,nbdcopy,rsync", help=f"of {','.join(PEERS)}, or nothing")
    parser.add_argument("--json", type=Path, help="write everything measured there")
    parser.add_argument("--plots", type=Path, help="write plots there as PNG, if matplotlib is installed")
    parser.add_argument("--dir", type=Path, help="where to work (default: a temporary directory)")
    options = parser.parse_args()
    isolated = isolate()
    peers = [name for name in options.peers.split(",") if name]
    with tempfile.TemporaryDirectory(prefix="replica-bench-", dir=options.dir) as directory:
        figures = measure(
            Path(directory), options.size_mib * MIB, options.runs, options.scenarios.split(","), peers
        )  # fmt: skip
    figures["isolated"] = isolated
    finish(figures, options.json, options.plots)


def finish(figures: dict[str, Any], document: Path | None, plots: Path | None) -> None:
    """The tables, and what else was asked for."""
    verdicts = judge(figures)
    figures["criteria"] = [verdict.as_dict() for verdict in verdicts]
    report.show(figures, verdicts)
    if document:
        document.write_text(json.dumps(figures, indent=2) + "\n")
    if plots:
        report.plot(figures, verdicts, plots)


def measure(directory: Path, size: int, runs: int, scenarios: list[str], peers: list[str]) -> dict[str, Any]:
    with Bench(directory, size, runs, peers) as bench:
        for scenario in scenarios:
            bench.scenario(scenario)
        bench.singles()
        return bench.figures


class Bench:
    """The image, our two processes, and the peers that can be measured here."""

    def __init__(self, directory: Path, size: int, runs: int, peers: list[str]) -> None:
        self._directory, self._runs, self._seed = directory, runs, 100
        say(f"making an image of {size // MIB} MiB")
        self._image = directory / "disk.raw"
        make_image(self._image, size)
        self._certificates = Certificates(directory / "pki")
        self._stack = ExitStack()
        self._lab: Lab | None = None
        self._peers: list[Peer] = []
        self.figures: dict[str, Any] = {
            "size_bytes": size, "runs": runs, "scenarios": {}, "single": {}, "peers": {}, "skipped": {},
            "machine": {
                "cpus": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version(),
                "load": os.getloadavg()[0], "nice": os.nice(0),
            },
        }  # fmt: skip
        try:
            for name in peers:
                self._add(PEERS[name])
        except BaseException:
            self._stack.close()
            raise

    def _add(self, kind: type[Peer]) -> None:
        missing = kind.missing()
        if missing:
            say(f"{kind.name} is left out: {missing}")
            self.figures["skipped"][kind.name] = missing
            return
        peer = self._stack.enter_context(kind(self._directory / kind.name, self._image, self._certificates))
        self._peers.append(peer)
        self.figures["peers"][kind.name] = {"version": peer.version(), "commands": {}}

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lab is not None:
            self._lab.close()
        self._stack.close()

    # --- the scenarios ---

    def scenario(self, name: str) -> None:
        for number in range(self._runs):
            say(f"{name}, round {number + 1} of {self._runs}")
            if name == "first":
                self._first(number)
            else:
                self._changed(name, number)

    def _first(self, number: int) -> None:
        for who in ("daemon", "fresh"):
            if self._lab is not None:
                self._lab.close()
                shutil.rmtree(self._lab.directory)
            self._lab = Lab(self._directory / "lab", self._image)
            pread_all(self._image, 1)
            if who == "daemon":
                with self._lab.daemon() as daemon:
                    self._keep("first", who, daemon.cycle())
            else:
                self._keep("first", who, self._lab.fresh())
        for peer in self._measured("first", number):
            self._peer("first", peer, peer.first_copy)

    def _changed(self, scenario: str, number: int) -> None:
        lab = self._ready()
        with lab.daemon() as daemon:
            for _ in range(2):  # what others changed meanwhile, and one for the connection
                daemon.cycle()
            seed = self._change(self._image, scenario)
            packed = {} if scenario == "idle" else {"packed_bytes": self._packed(scenario, seed)}
            self._keep(scenario, "daemon", daemon.cycle(), packed)
        self._change(self._image, scenario)
        self._keep(scenario, "fresh", lab.fresh())
        for peer in self._measured(scenario, number):
            if peer.image == self._image and peer.ships_changes:
                peer.ship()
            if peer.image != self._image:  # what the daemon shipped, byte for byte
                self._change(peer.image, scenario, seed)
            elif peer.ships_changes:
                self._change(peer.image, scenario)
            self._peer(scenario, peer, peer.ship)

    def _ready(self) -> Lab:
        """A lab with a first copy, also where that is not measured; the same for every peer."""
        if self._lab is None:
            say("first copies")
            self._lab = Lab(self._directory / "lab", self._image)
            self._lab.fresh()
            for peer in self._peers:
                peer.first_copy()
        return self._lab

    def _measured(self, scenario: str, number: int) -> list[Peer]:
        return [
            peer
            for peer in self._peers
            if (peer.ships_changes or scenario in COPIES_ALL) and (number == 0 or peer.name not in ONCE)
        ]

    def _change(self, image: Path, scenario: str, seed: int | None = None) -> int:
        """Change it, with a new seed if none is given, and read it once; the seed."""
        if seed is None:
            self._seed += 1
            seed = self._seed
        change(image, scenario, seed)
        pread_all(image, 1)
        return seed

    def _peer(self, scenario: str, peer: Peer, work: Callable[[], Cost]) -> None:
        pread_all(peer.image, 1)
        say(f"  {peer.name}")
        cost = work()
        peer.check()
        self._add_run(scenario, peer.name, cost.as_dict())
        self.figures["peers"][peer.name]["commands"][scenario] = peer.commands

    def _keep(self, scenario: str, who: str, cycle: Cycle, more: dict[str, int] | None = None) -> None:
        run = cycle.cost.as_dict() | {"changed_bytes": cycle.changed_bytes, "http_bytes": cycle.http_bytes}
        self._add_run(scenario, who, run | (more or {}))

    def _add_run(self, scenario: str, who: str, run: dict[str, Any]) -> None:
        run["load"] = os.getloadavg()[0]
        entry = self.figures["scenarios"].setdefault(scenario, {}).setdefault(who, {"runs": []})
        entry["runs"].append(run)
        names = [name for name, value in run.items() if isinstance(value, int | float)]
        entry["median"] = {name: statistics.median(each[name] for each in entry["runs"]) for name in names}
        say(f"  {who}: {run['wall_seconds']:.2f} s, CPU {run['cpu_seconds']:.2f} s, load {run['load']:.0f}")

    def _packed(self, scenario: str, seed: int) -> int:
        """What `zstd -1` makes of the changed grains packed together, plus 8 bytes for each."""
        compressor, total = zstandard.ZstdCompressor(level=1).compressobj(), 0
        with self._image.open("rb") as file:
            for offset, length in places(self._image.stat().st_size, scenario, seed):
                total += len(compressor.compress(os.pread(file.fileno(), length, offset))) + 8 * (length // GRAIN)
        return total + len(compressor.flush())

    # --- what is measured alone ---

    def singles(self) -> None:
        """Scan, TLS, restore and verify, each beside its limit, in turn."""
        lab, size = self._ready(), self._image.stat().st_size
        lab.fresh()
        times: dict[str, list[float]] = {}

        def timed(name: str, work: Callable[[], object]) -> None:
            began = time.perf_counter()
            value = work()
            seconds = time.perf_counter() - began
            times.setdefault(name, []).append(value if isinstance(value, float) else seconds)

        scan = ScanBench(self._directory / "scan", self._image)
        scan.remember()
        stream = self._directory / "stream"
        with stream.open("wb") as file:
            for _ in range(min(size, 1024 * MIB) // (16 * MIB)):
                file.write(os.urandom(16 * MIB))
        head, out = lab.head(), self._directory / "restored"
        for number in range(self._runs):
            say(f"scan, TLS, restore, verify: round {number + 1} of {self._runs}")
            for _ in range(3):
                pread_all(self._image, 1)
                timed("pread", lambda: pread_all(self._image, 2))
                timed("pread_allocated", lambda: pread_allocated(self._image, 2))
                timed("scan", scan.scan)
            timed("cat_cpu", self._cat)
            timed("segments", lambda: segments_seconds(self._directory, stream.stat().st_size))
            timed("tls_openssl", lambda: openssl_seconds(self._certificates, stream))
            pread_all(head, 1)
            timed("cp", lambda: _run("cp", "--sparse=always", head, out))
            timed("sync_of_cp", lambda: _run("sync", out))
            out.unlink()
            timed("restore", lambda: _run(*REPLICA, "restore", "web-1", "--to", out, "-c", lab.receiver_toml))
            shutil.rmtree(out)
            timed("verify", lambda: _run(*REPLICA, "verify", "web-1", "--restart", "-c", lab.receiver_toml))
            if shutil.which("b3sum"):
                pread_all(head, 1)
                timed("b3sum", lambda: _run("b3sum", "--num-threads", "2", head))
                _drop(head)
                timed("b3sum_cold", lambda: _run("b3sum", "--num-threads", "2", head))
        stream.unlink()
        self.figures["single"].update({name: statistics.median(values) for name, values in times.items()})
        self.figures["single_runs"] = times

    def _cat(self) -> float:
        """Processor seconds of `cat image > /dev/null`."""
        with Group("cat") as group, group.measured() as cost:
            group.run(["cat", self._image], stdout=subprocess.DEVNULL)
        return cost.cpu_seconds


def _drop(path: Path) -> None:
    """Out of the page cache, so that the next read comes from the device, as every read of `verify` does."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
