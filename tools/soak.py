"""Soak: real processes under load for as long as told, and every point held against what the machine really was.

    python tools/soak.py kills --count 200 --seed 1         # SIGKILLs of either process at random moments
    python tools/soak.py readers --seconds 600 --seed 1     # restore and verify in loops beside a commit a second

A machine with two disks (`writer`) never stops writing; `replica serve` and
`replica run` (or `sync`) replicate it over TLS on loopback, and the receiver
rotates at every cycle by `RETENTION`. Checked, now and then and at the end:

- every listed point restores to exactly what the machine was when that point was frozen, all disks of one instant;
- every point that a sender was told is committed is listed, unless the policy let it go;
- the next sync succeeds, `verify` finds nothing, and neither side keeps temporary files, deltas or marks.

After some kills the store is read as the dead process left it, before any recovery.

Every line of output names the seed: the same seed makes the same choices, though not the same race.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "e2e"))

from lab import Lab
from writer import Writer

from replica.config import load_sender
from replica.durable import FileSystem
from replica.errors import PointGoneError
from replica.model import DeltaId, ReplicaId, rfc3339
from replica.primary.runner import run
from replica.primary.spec import MachineSpec
from replica.store import ReplicaReader, restore_point
from replica.transport.client import HttpReceiver
from replica.transport.wire import ReplicaInfo

MACHINE = "web-1"
DISKS = {"os": 24 << 20, "data": 8 << 20}
KEEP_LAST = 5
RETENTION = f"[retention]\nkeep_last = {KEEP_LAST}\nhourly = 2\nmax_points_per_hour = 100000\n"
"""The receiver's policy. The checks rely on nothing of it but that the last `KEEP_LAST` points stay."""
EVERY = "1s"
CHECK_EVERY = 10
SLOWEST = 10
TIDY_SECONDS = 10.0
"""How long the receiver may go on tidying up after it has acknowledged."""
PATIENCE_SECONDS = 90.0
_REPORTED = re.compile(r"machine '[^']+': point (\d+) of (\S+?),")


class SoakError(AssertionError):
    """Something was lost, is wrong, or was left behind."""


class SoakLab(Lab):
    """A lab whose receiver rotates by `RETENTION`."""

    @property
    def receiver(self) -> Path:
        path = super().receiver
        path.write_text(path.read_text().partition("[retention]")[0] + RETENTION)
        return path


class Soak:
    """A lab, its writer, and what senders were told."""

    def __init__(self, lab: Lab, writer: Writer, seed: int, say: Callable[[str], None]) -> None:
        self.lab, self.writer, self.random, self.say = lab, writer, random.Random(seed), say
        self.fs = FileSystem()
        self.acknowledged: dict[int, str] = {}
        self.restored = 0
        self._outputs = 0
        lab.machine(MACHINE, writer.images, freeze=writer.freeze, thaw=writer.thaw, every=EVERY)

    @property
    def reader(self) -> ReplicaReader:
        (directory,) = self.lab.replica_directories()
        return ReplicaReader(self.fs, directory)

    # --- senders ---

    def start(self, *command: str) -> Sender:
        self._outputs += 1
        return Sender(self, command, self.lab.root / f"sender-{self._outputs}.log")

    def sync(self) -> None:
        """A cycle that must succeed."""
        sender = self.start("sync")
        code = sender.process.wait(PATIENCE_SECONDS)
        sender.end()
        if code:
            raise SoakError(f"a sync that nothing disturbs ended with {code}: {sender.said}")

    # --- checks ---

    def check(self) -> None:
        """Nothing is at work, or this sees to it: the next sync succeeds, and all is as it must be."""
        self.sync()
        points = self.check_all_points()
        newest = points[-1]
        missing = [n for n in self.acknowledged if n > newest - KEEP_LAST and n not in points]
        if missing or points != sorted(set(points)):
            raise SoakError(f"points {missing} are lost: they were acknowledged; listed are {points}")
        self.check_nothing_left()
        if self.lab.json("verify", MACHINE, "-c", self.lab.receiver)["ok"] is not True:
            raise SoakError("verify found damage")

    def check_all_points(self) -> list[int]:
        """Restore every point, once more from the list on where rotation, which goes on behind, was faster."""
        while True:
            try:
                return self.check_points()
            except PointGoneError as error:
                self.say(f"{error}; once more")

    def check_points(self, most: int | None = None) -> list[int]:
        """Restore every listed point (or some, at random): the number of each one listed."""
        infos = self.reader.points()
        for info in infos if most is None else self.random.sample(infos, min(most, len(infos))):
            if not info.restorable:
                raise SoakError(f"point {info.state.point} is listed as not restorable")
            told = self.acknowledged.get(info.state.point)
            if told not in (None, rfc3339(info.state.frozen_at_ns)):
                raise SoakError(f"point {info.state.point} was acknowledged as of {told}: {info.state}")
            try:
                self.compare(info.state.frozen_at_ns, restored(self.fs, self.reader, info.state.point, self.lab.root))
            except PointGoneError:
                if most is None:
                    raise
        return [info.state.point for info in infos]

    def compare(self, frozen_at_ns: int, found: dict[str, str]) -> None:
        expected = self.writer.expected(frozen_at_ns)
        if found != expected:
            wrong = [disk for disk in expected if found.get(disk) != expected[disk]]
            raise SoakError(f"the point of {rfc3339(frozen_at_ns)} is wrong on {wrong}; {self.writer.name_of(found)}")
        self.restored += 1

    def check_nothing_left(self) -> None:
        """After a sync that succeeded, with no sender at work."""
        deadline = time.monotonic() + TIDY_SECONDS
        while left := self._left():
            if time.monotonic() > deadline:
                raise SoakError(f"left behind: {left}")
            time.sleep(0.05)

    def _left(self) -> list[Path]:
        (store,) = self.lab.replica_directories()
        state = self.lab.root / "state" / MACHINE
        left = [path for root in (store, state) for path in root.rglob(".*")]
        left += (store / "incoming").iterdir()
        left += [path for name in ("pending", "folding", "frozen") if (path := state / name).exists()]
        links = list((store / "points").iterdir())
        return left if len(links) <= len(self.reader.points()) else left + links


class Sender:
    """`replica run` or `replica sync`, as a process of its own."""

    def __init__(self, soak: Soak, command: tuple[str, ...], log: Path) -> None:
        self._soak, self.log = soak, log
        arguments = ["--json", MACHINE] if command[0] == "sync" else []
        with log.open("wb") as target:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "replica", *command, *arguments, "-c", str(soak.lab.sender)],
                stdout=target,
                stderr=subprocess.STDOUT,
            )

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.end()

    def stop(self) -> None:
        """SIGTERM, and an end in good time."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(PATIENCE_SECONDS)
        self.end()

    def end(self) -> None:
        """Note what it was told; a process that was killed may have been told more than it could say."""
        if "Traceback" in self.said:
            raise SoakError(self.said)
        for number, moment in _REPORTED.findall(self.said):
            self._soak.acknowledged[int(number)] = moment
        with suppress(json.JSONDecodeError, LookupError):
            (entry,) = json.loads(self.said)
            self._soak.acknowledged[entry["point"]] = entry["frozen_at"]


def restored(fs: FileSystem, reader: ReplicaReader, number: int, scratch: Path) -> dict[str, str]:
    """Restore a point beside whatever goes on: disk -> SHA-256 of what was written. PointGoneError."""
    with tempfile.TemporaryDirectory(dir=scratch, prefix="restored-") as directory:
        with reader.open_point(number) as point:
            files = restore_point(fs, point, Path(directory) / "out", "raw")
        return {disk: digest(path) for disk, path in files.items()}


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- kills ---


def kills(soak: Soak, count: int) -> None:
    """SIGKILL either process, at a random moment, `count` times; a sender is always at work."""
    lab, choose = soak.lab, soak.random
    lab.serve()
    soak.sync()
    sender = soak.start("run")
    for number in range(1, count + 1):
        wait_for_a_moment(soak, sender)
        victim = choose.choice(("receiver", "sender", "receiver", "sender", "both"))
        if victim != "sender":
            lab.kill()
        if victim != "receiver":
            sender.kill()
        if victim != "sender":
            if choose.random() < 0.3:
                soak.check_points(most=2)  # as it lies there, before any recovery
            time.sleep(choose.choice((0.0, 0.0, 0.5)))
            lab.serve()
        if sender.process.poll() is not None:
            sender.end()
            sender = soak.start(choose.choice(("run", "run", "sync")))
        if number % CHECK_EVERY == 0 or number == count:
            end(sender)
            soak.check()
            soak.say(f"{number} kills; {len(soak.acknowledged)} points acknowledged, {soak.restored} restores exact")
            sender = soak.start("run")
    end(sender)
    soak.check()


def end(sender: Sender) -> None:
    """An orderly end; one that just ended by itself is as good."""
    if sender.process.poll() is None:
        sender.stop()
    else:
        sender.end()


def wait_for_a_moment(soak: Soak, sender: Sender) -> None:
    """Any moment of three seconds, or one soon after a delta began to arrive, or after its inverse got its name.

    Half of the time a point may be committed, and others rotated out, before.
    """
    if soak.random.random() < 0.5:
        head, deadline = soak.reader.head, time.monotonic() + 10.0
        while soak.reader.head == head and sender.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
    (store,) = soak.lab.replica_directories()
    moment, started = soak.random.choice(("any", "arriving", "applying")), time.monotonic()
    seconds = soak.random.uniform(0.0, 3.0) if moment == "any" else 10.0
    before = set((store / "points").iterdir())
    while time.monotonic() < started + seconds and sender.process.poll() is None:
        if moment == "arriving" and any((store / "incoming").iterdir()):
            time.sleep(soak.random.uniform(0.0, 0.3))
            return
        if moment == "applying" and any(p.name[0] != "." for p in set((store / "points").iterdir()) - before):
            time.sleep(soak.random.uniform(0.0, 0.05))
            return
        time.sleep(0.001)


# --- readers ---


def readers(soak: Soak, seconds: float, restore_to: Path | None = None) -> dict[str, float]:
    """Tell and return commit times without readers and with them, in seconds; every restore of the readers is compared.

    `restore_to`: another file system than the store's, say: what is restored there does not share its journal.
    """
    lab = soak.lab
    lab.serve()
    soak.sync()
    quiet: list[float] = []
    with committing(soak, quiet):
        time.sleep(max(3.0, seconds / 5))
    busy: list[float] = []
    with committing(soak, busy), reading(soak, restore_to or lab.root) as done:
        time.sleep(seconds)
    if not done["restores"] or not done["verifies"]:
        raise SoakError(f"the readers did not get on: {done}")
    figures = {
        "commits_without": len(quiet),
        "commits_with": len(busy),
        "restores": done["restores"],
        "verifies": done["verifies"],
        "median_without": statistics.median(quiet),
        "median_with": statistics.median(busy),
        **{f"p{p}_without": round(np.percentile(quiet, p), 4) for p in (90, 99)},
        **{f"p{p}_with": round(np.percentile(busy, p), 4) for p in (90, 99)},
        "max_without": max(quiet),
        "max_with": max(busy),
        "slowest_to_median": max(busy) / statistics.median(quiet),
        "median_to_median": statistics.median(busy) / statistics.median(quiet),
    }
    for key, value in figures.items():
        soak.say(f"{key} {value:.4g}")
    slowest = sorted(range(len(busy)), key=busy.__getitem__)[: -SLOWEST - 1 : -1]
    soak.say("slowest: " + ", ".join(f"{busy[n]:.3f} s (the {n + 1}th)" for n in slowest))
    soak.check()
    return figures


@contextmanager
def committing(soak: Soak, times: list[float]) -> Iterator[None]:
    """A sender that reports how long each commit took, for the length of the block."""
    process = _child(soak, "commits", str(soak.lab.sender))
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
    if process.returncode:
        raise SoakError(f"the sender ended with {process.returncode}: {err}")
    times += [json.loads(line)["seconds"] for line in out.splitlines()]


@contextmanager
def reading(soak: Soak, scratch: Path) -> Iterator[dict[str, int]]:
    """One process restores every point in a loop, one verifies; counts, complete when the block has ended."""
    (store,) = soak.lab.replica_directories()
    processes = {
        "restores": _child(soak, "restores", str(store), str(scratch)),
        "verifies": _child(soak, "verifies", str(soak.lab.receiver)),
    }
    done: dict[str, int] = {}
    try:
        yield done
    finally:
        ended = {}
        for what, process in processes.items():
            process.send_signal(signal.SIGTERM)
            ended[what] = process.communicate(timeout=PATIENCE_SECONDS)
    for what, (out, err) in ended.items():
        if processes[what].returncode:
            raise SoakError(f"{what} ended with {processes[what].returncode}: {err}")
        lines = [json.loads(line) for line in out.splitlines()]
        for line in lines:
            if what == "restores":
                soak.compare(line["frozen_at_ns"], line["digests"])
        done[what] = len(lines)


def _child(soak: Soak, *arguments: str) -> subprocess.Popen[str]:
    """This program in another process; what it prints is collected at its end (a few bytes per commit)."""
    output = tempfile.TemporaryFile("w+", dir=soak.lab.root)  # noqa: SIM115 - lives as long as the process
    errors = tempfile.TemporaryFile("w+", dir=soak.lab.root)  # noqa: SIM115
    return _Filed([sys.executable, __file__, f"_{arguments[0]}", *arguments[1:]], output, errors)


class _Filed(subprocess.Popen[str]):
    """A process whose output goes to files, which never fill up as pipes do."""

    def __init__(self, command: list[str], output: IO[str], errors: IO[str]) -> None:
        super().__init__(command, stdout=output, stderr=errors, text=True)
        self._files = output, errors

    def communicate(self, input: str | None = None, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        said = []
        for file in self._files:
            file.seek(0)
            said.append(file.read())
            file.close()
        return said[0], said[1]


# --- what the other processes do ---


def _until_told() -> threading.Event:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    return stop


def _print(**line: object) -> None:
    print(json.dumps(line), flush=True)


def _commits(sender: str) -> None:
    class Timed(HttpReceiver):
        def commit(
            self, replica_id: ReplicaId, delta_id: DeltaId, tail: bytes, tail_offset: int, wait_seconds: float
        ) -> ReplicaInfo | None:
            began = time.perf_counter()
            info = super().commit(replica_id, delta_id, tail, tail_offset, wait_seconds)
            _print(seconds=time.perf_counter() - began)
            return info

    spec, stop = load_sender(Path(sender)), _until_told()

    def connect(machine: MachineSpec) -> Timed:
        return Timed(machine.to, spec.tls)

    run(spec, stop, connect=connect)


def _restores(store: str, scratch: str) -> None:
    fs, stop = FileSystem(), _until_told()
    while not stop.is_set():
        for info in ReplicaReader(fs, Path(store)).points():
            if stop.is_set():
                return
            with suppress(PointGoneError):  # rotated out since it was listed
                found = restored(fs, ReplicaReader(fs, Path(store)), info.state.point, Path(scratch))
                _print(frozen_at_ns=info.state.frozen_at_ns, digests=found)


def _verifies(receiver: str) -> None:
    """The command, so that it is as considerate of the writer as an operator's is."""
    stop = _until_told()
    while not stop.is_set():
        command = [sys.executable, "-m", "replica", "verify", MACHINE, "--json", "-c", receiver]
        done = subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)
        if done.returncode:
            raise SoakError(f"verify ended with {done.returncode}: {done.stdout}{done.stderr}")
        _print(ok=json.loads(done.stdout)["ok"])


# --- the program ---


def main() -> None:
    children: dict[str, Callable[..., None]] = {"_commits": _commits, "_restores": _restores, "_verifies": _verifies}
    if len(sys.argv) > 1 and sys.argv[1] in children:
        children[sys.argv[1]](*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(prog="soak.py", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("kills", "readers"))
    parser.add_argument("--count", type=int, default=200, help="kills (default 200)")
    parser.add_argument("--seconds", type=float, default=600.0, help="how long the readers read (default 600)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dir", type=Path, help="where to work (default: a temporary directory)")
    parser.add_argument("--restore-to", type=Path, help="where readers restore to (default: beside the store)")
    options = parser.parse_args()

    def say(text: str) -> None:
        print(f"soak {options.what}, seed {options.seed}: {text}", flush=True)

    with (
        tempfile.TemporaryDirectory(prefix="replica-soak-", dir=options.dir) as directory,
        Writer(Path(directory), DISKS, options.seed) as writer,
        SoakLab(Path(directory)) as lab,
    ):
        soak = Soak(lab, writer, options.seed, say)
        if options.what == "kills":
            kills(soak, options.count)
        else:
            readers(soak, options.seconds, options.restore_to)
        say(f"passed; {soak.restored} restores exact, {writer.count_writes} bursts of writes")


if __name__ == "__main__":
    main()
