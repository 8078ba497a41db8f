"""Long copies in parts, and resyncs, between real processes: what a kill costs, and what need not be sent."""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from disks import digest
from lab import Lab
from relay import Relay

MiB = 1 << 20
IMAGE_BYTES = 48 * MiB
PART_BYTES = 8 * MiB


def wait_for_bytes(process: subprocess.Popen[str], relay: Relay, count: int) -> bool:
    """Until that much went over the wire; False if the process ended before."""
    deadline = time.monotonic() + 60
    while process.poll() is None and relay.count_bytes < count and time.monotonic() < deadline:
        time.sleep(0.002)
    return process.poll() is None


@pytest.mark.parametrize("freeze", [False, True], ids=["still", "frozen"])
def test_a_kill_in_a_long_copy_costs_at_most_the_running_part(lab: Lab, tmp_path: Path, freeze: bool) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(random.Random(4).randbytes(IMAGE_BYTES))
    lab.part = "8MiB"
    lab.serve()
    with Relay(lab.port) as relay:
        lab.connect_port = relay.port
        keys = {"freeze": "true", "thaw": "true"} if freeze else {}
        lab.machine("web-1", {"os": image}, **keys)
        kills = 0
        for side in ("sender", "receiver", "both", "sender"):
            process = lab.popen("sync", "web-1", "--json", "-c", lab.sender)
            if wait_for_bytes(process, relay, relay.count_bytes + 9 * MiB):
                kills += 1
                if side != "receiver":
                    process.kill()
                if side != "sender":
                    lab.kill()
                    process.kill()
                    lab.serve()
            process.communicate(timeout=90)
        assert kills >= 3
        assert lab.points() == []
        (status,) = lab.json("status", "-c", lab.sender)
        assert status["point"] == 0 and status["copying"]["bytes_total"] == IMAGE_BYTES
        assert 0 < status["copying"]["bytes_done"] < IMAGE_BYTES
        entry = lab.sync()
        total = relay.count_bytes
    assert (entry["point"], entry["mode"]) == (1, "initial")
    assert total < IMAGE_BYTES + kills * (PART_BYTES + 5 * MiB), "what was committed is never sent again"
    assert [p["point"] for p in lab.points()] == [1]
    assert digest(lab.restore(tmp_path / "out")["os"]) == digest(image)
    assert lab.json("verify", "web-1", "-c", lab.receiver)["ok"] is True
    (status,) = lab.json("status", "-c", lab.sender)
    assert status["copying"] is None


def test_a_sparse_image_of_64_gib_is_compared_without_state(lab: Lab, tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    with image.open("wb") as file:
        file.truncate(64 << 30)
        for position in range(0, 64, 4):
            file.seek(position << 30)
            file.write(random.Random(position).randbytes(4 * MiB))
    lab.serve()
    lab.machine("web-1", {"os": image})
    lab.sync()
    lab.kill()  # else it would wait for the first sender's silence
    lab.serve()
    shutil.rmtree(lab.root / "state")
    entry = lab.sync()
    assert (entry["point"], entry["mode"], entry["bytes_changed"]) == (2, "resync", 0)
    assert entry["bytes_scanned"] == 64 * MiB and entry["bytes_wire"] < 16_000
    with image.open("r+b") as file:
        file.seek(33 << 30)
        file.write(b"x")
    forced = lab.json("resync", "web-1", "-c", lab.sender)
    assert (forced["mode"], forced["bytes_changed"], forced["bytes_differing"]) == ("resync", 4096, 16384)
    assert lab.json("verify", "web-1", "-c", lab.receiver)["ok"] is True


def test_an_old_copy_becomes_the_base_of_a_new_replica(lab: Lab, tmp_path: Path) -> None:
    image, old = tmp_path / "disk.raw", tmp_path / "old.raw"
    image.write_bytes(random.Random(6).randbytes(20 * MiB))
    shutil.copy(image, old)
    with image.open("r+b") as file:
        file.seek(7 * MiB)
        file.write(bytes(4096))
    lab.serve()
    lab.machine("web-1", {"os": image})
    enrolled = lab.json("enrol", "web-1", "-c", lab.sender)
    assert enrolled["point"] == 0
    busy = lab.run("adopt", "web-1", "--disk", f"os={old}", "-c", lab.receiver, code=9)
    assert "stop `replica serve`" in busy.stderr
    lab.stop()
    adopted = lab.json("adopt", "web-1", "--disk", f"os={old}", "-c", lab.receiver)
    assert adopted["disks"] == {"os": 20 * MiB}
    assert lab.points() == []
    lab.serve()
    entry = lab.sync()
    assert (entry["point"], entry["mode"], entry["bytes_changed"]) == (1, "resync", 4096)
    assert entry["bytes_wire"] < 32_000
    assert digest(lab.restore(tmp_path / "out")["os"]) == digest(image)
    text = lab.run("resync", "web-1", "-c", lab.sender).stdout
    assert " 0 B differed from the replica" in text, text
