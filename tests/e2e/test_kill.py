"""The line is cut at random moments: the next sync succeeds, every listed point is right.

Kills of either process are `test_soak.py`'s.

Each round changes the image, notes its digest and starts a sync that is cut
short or not. A point that a finished sync reported must restore to exactly the
image of that round; a point whose sync was cut before its answer came must
restore to the image of a round between its neighbours'.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from disks import digest, scribble
from lab import Lab
from relay import Relay

from replica.durable import FileSystem
from replica.store import ReplicaReader, restore_point

ROUNDS = 20
IMAGE_BYTES = 32 << 20


class Rounds:
    """The image, what it was in every round, and which round made which point."""

    def __init__(self, lab: Lab, directory: Path, seed: int) -> None:
        self.lab = lab
        self.directory = directory
        self.random = random.Random(seed)
        self.image = directory / "disk.raw"
        self.image.write_bytes(random.Random(seed).randbytes(IMAGE_BYTES))
        self.digests: list[str] = []
        self.known: dict[int, int] = {}
        lab.keep_last = 100
        lab.machine("web-1", {"os": self.image})

    def next(self) -> None:
        """Change the image; sometimes a lot, so that cuts fall into transfers and commits."""
        scribble(self.image, len(self.digests), self.random.choice((5, 300, 1500)))
        self.digests.append(digest(self.image))

    def sync(self) -> None:
        """A cycle that must succeed, whatever happened before it."""
        self.known[self.lab.sync()["point"]] = len(self.digests) - 1

    def check(self) -> None:
        """Restore every listed point and hold it against the rounds; the last few through the command."""
        listed = [p["point"] for p in self.lab.points()]
        assert listed == list(range(1, listed[-1] + 1))
        assert set(self.known) <= set(listed)
        (directory,) = self.lab.replica_directories()
        fs = FileSystem()
        earliest = 0
        for point in listed:
            target = self.directory / f"out-{point}"
            if point > listed[-1] - 3:
                file = self.lab.restore(target, "web-1", point)["os"]
            else:
                with ReplicaReader(fs, directory).open_point(point) as opened:
                    file = restore_point(fs, opened, target, "raw")["os"]
            found = digest(file)
            file.unlink()
            if point in self.known:
                assert found == self.digests[self.known[point]], f"point {point} is not what it was"
            assert found in self.digests[earliest:], f"point {point} is no state the machine ever had"
            earliest = self.digests.index(found, earliest)
        assert self.lab.json("verify", "web-1", "-c", self.lab.receiver)["ok"] is True


def wait_for(process: subprocess.Popen[str], seconds: float, happened: Callable[[], bool] = lambda: False) -> bool:
    """Wait until the time is over or something happened; False if the process ended before."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and not happened() and time.monotonic() < deadline:
        time.sleep(0.002)
    return process.poll() is None


def finish(process: subprocess.Popen[str], rounds: Rounds) -> None:
    """See a sync to its end, whatever that is; note its point if it has one."""
    out, err = process.communicate(timeout=90)
    assert "Traceback" not in err, err
    assert process.returncode in (0, 6, 9, -signal.SIGKILL), err
    if process.returncode == 0:
        rounds.known[int(json.loads(out)[0]["point"])] = len(rounds.digests) - 1


@pytest.mark.parametrize("seed", [3])
def test_the_line_is_cut(lab: Lab, tmp_path: Path, seed: int) -> None:
    """After so many bytes, in a handshake, a transfer or a commit; the sync goes on when the line is back."""
    rounds = Rounds(lab, tmp_path, seed)
    lab.serve()
    with Relay(lab.port) as relay:
        lab.connect_port = relay.port
        rounds.next()
        rounds.sync()
        for number in range(ROUNDS):
            rounds.next()
            cuts = relay.cuts
            most = rounds.random.choice((3_000, 30_000, 1_500_000, 7_000_000))
            relay.cut_after(rounds.random.randrange(1, most))
            process = lab.popen("sync", "web-1", "--json", "-c", lab.sender)
            if wait_for(process, 60, lambda before=cuts: relay.cuts > before) and rounds.random.random() < 0.3:
                process.kill()
            relay.cut_after(None)
            finish(process, rounds)
            if number % 3 == 2:
                rounds.sync()
        rounds.sync()
        assert relay.cuts >= ROUNDS // 2
        rounds.check()


def test_a_cut_transfer_goes_on_where_it_was(lab: Lab, tmp_path: Path) -> None:
    """What arrived before the line broke is not sent again by the process that sent it."""
    image = tmp_path / "disk.raw"
    image.write_bytes(random.Random(9).randbytes(IMAGE_BYTES))
    time.sleep(0.05)
    lab.serve()
    with Relay(lab.port) as relay:
        lab.connect_port = relay.port
        lab.machine("web-1", {"os": image})
        relay.cut_after(IMAGE_BYTES * 3 // 4)
        process = lab.popen("sync", "web-1", "--json", "-c", lab.sender)
        assert wait_for(process, 60, lambda: relay.cuts > 0)
        time.sleep(0.3)
        relay.cut_after(None)
        out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    (entry,) = json.loads(out)
    assert relay.cuts == 1
    assert IMAGE_BYTES < entry["bytes_wire"] < 1.4 * IMAGE_BYTES
    assert digest(lab.restore(tmp_path / "out")["os"]) == digest(image)
