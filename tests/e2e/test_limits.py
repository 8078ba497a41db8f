"""What it may cost: bytes on the wire, and memory, whatever the disk's size."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from disks import scribble
from lab import Lab, peak_bytes

GIB = 1 << 30
GRAIN_BYTES = 4096
PEAK_BYTES = 200 << 20


def sparse(path: Path, size_bytes: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return path


@pytest.mark.slow
def test_one_percent_of_the_grains_costs_what_changed(lab: Lab, tmp_path: Path) -> None:
    image = sparse(tmp_path / "disk.raw", 4 * GIB)
    grains = 4 * GIB // GRAIN_BYTES // 100
    lab.machine("web-1", {"os": image})
    lab.serve()
    scribble(image, 1, 2000)
    lab.sync()
    scribble(image, 2, grains)
    entry = lab.sync()
    changed = grains * GRAIN_BYTES
    assert entry["bytes_changed"] == changed
    assert entry["bytes_wire"] <= 1.05 * changed + 8 * grains
    assert lab.sync()["bytes_wire"] < 4096


@pytest.mark.slow
def test_memory_is_bounded(lab: Lab, tmp_path: Path) -> None:
    """64 GiB sparse, 2 GiB of it data spread over the whole disk in pieces; first copy and a change."""
    image = sparse(tmp_path / "disk.raw", 64 * GIB)
    random = np.random.default_rng(3)
    with image.open("r+b") as file:
        for number in range(128):
            file.seek(number * (GIB // 2) + 12345 * GRAIN_BYTES)
            file.write(random.bytes(8 << 20))
            file.write(b"compressible " * ((8 << 20) // 13))
    time.sleep(0.05)
    lab.machine("web-1", {"os": image})
    lab.serve()
    for _ in range(2):
        assert peak_of(lab.popen("sync", "web-1", "-c", lab.sender)) < PEAK_BYTES
        assert lab.server is not None
        assert peak_bytes(lab.server.pid) < PEAK_BYTES
        scribble(image, 4, 5000)
    assert [p["point"] for p in lab.points()] == [1, 2]
    for path in (image, lab.replica_directories()[0] / "head/os.img"):
        os.truncate(path, 0)


def peak_of(process: subprocess.Popen[str]) -> int:
    """Wait for a command that must succeed; the highest peak seen while it ran."""
    peak = 0
    while process.poll() is None:
        peak = max(peak, peak_bytes(process.pid))
        time.sleep(0.01)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert peak > 0
    return peak
