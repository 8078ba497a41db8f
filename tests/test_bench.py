"""The measuring itself: changes are where they are said to be, costs are counted, verdicts are the right way round."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.criteria import judge
from bench.measure import Group
from bench.workload import GRAIN, MIB, change, make_image, places


@pytest.mark.parametrize("kind", ["grains", "runs", "rewrite"])
def test_a_change_is_where_places_says(tmp_path: Path, kind: str) -> None:
    image, size = tmp_path / "disk.raw", 40 * MIB
    make_image(image, size)
    before = np.fromfile(image, np.uint8).reshape(-1, GRAIN)
    written = change(image, kind, seed=5)
    after = np.fromfile(image, np.uint8).reshape(-1, GRAIN)
    differs = set(np.flatnonzero((before != after).any(axis=1)).tolist())
    found = places(size, kind, 5)
    claimed = {(offset + at) // GRAIN for offset, length in found for at in range(0, length, GRAIN)}
    assert written == sum(length for _, length in found)
    assert differs <= claimed
    assert kind == "rewrite" or differs == claimed  # zeros over zeros and holes are no difference


def test_a_group_counts_what_its_children_spend() -> None:
    spend = "import time\nheld = bytes([1]) * (96 << 20)\nwhile time.process_time() < 0.4: pass\ntime.sleep(0.2)"
    with Group("test") as group:
        with group.measured() as idle:
            pass
        with group.measured() as cost:
            group.run(
                [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {spend!r}])"]
            )
    assert idle.cpu_seconds < 0.05
    assert 0.4 <= cost.cpu_seconds < 3.0
    assert os.geteuid() or cost.peak_bytes > 96 << 20


def test_leaving_a_group_ends_its_processes() -> None:
    with Group("test") as group:
        process = group.start(["sleep", "600"], stdout=subprocess.DEVNULL)
    assert process.returncode is not None


def _entry(**median: float) -> dict[str, Any]:
    return {"median": median, "runs": [{"peaks": {"sender": 1 << 20, "receiver": 300 << 20}}]}


def test_verdicts() -> None:
    """Times must be below, rates above; what has no peer is not judged."""
    grains = {
        "daemon": _entry(wall_seconds=1.0, wire_bytes=103.0, cpu_seconds=1.0, packed_bytes=100.0),
        "fresh": _entry(wall_seconds=1.5, wire_bytes=103.0, cpu_seconds=1.0),
        "btrfs": _entry(wall_seconds=1.3, wire_bytes=110.0, cpu_seconds=1.0),
    }
    single = {"pread": 0.9, "scan": 1.0, "segments": 2.0, "tls_openssl": 1.0}
    single |= {"restore": 2.0, "cp": 1.5, "sync_of_cp": 0.3}
    found = {v.number: (v.passed, v.value) for v in judge({"scenarios": {"grains": grains}, "single": single})}
    assert found["1"] == (True, pytest.approx(0.9))
    assert found["3a"] == (True, pytest.approx(1 / 1.3))
    assert found["3b"] == (False, pytest.approx(1.5 / 1.3))
    assert found["7a"] == (False, pytest.approx(1.03))
    assert found["8"] == (False, pytest.approx(0.5))
    assert (found["10a"], found["10b"]) == ((True, 1.0), (False, 300.0))
    assert found["9a"] == (False, pytest.approx(0.75)) and found["9a'"] == (True, pytest.approx(0.9))
    assert found["3c"] == found["6a"] == found["9b"] == found["9b'"] == (None, None)
