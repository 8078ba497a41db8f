"""The soak harness, for as long as a test may take: SIGKILLs of either process, and readers beside the writer.

`tools/soak.py` runs the same for as long as one likes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import soak as harness
from soak import Soak, SoakError, SoakLab, kills, readers
from writer import Writer


@pytest.fixture
def soak(tmp_path: Path) -> Iterator[Soak]:
    with Writer(tmp_path, {"os": 8 << 20, "data": 2 << 20}, seed=3) as writer, SoakLab(tmp_path) as lab:
        yield Soak(lab, writer, 3, print)


def test_kills_of_either_process_lose_nothing_and_leave_nothing(soak: Soak) -> None:
    kills(soak, 8)
    assert soak.restored >= 3


def test_every_restore_beside_commits_and_rotation_is_exact(soak: Soak) -> None:
    figures = readers(soak, 5)
    assert figures["commits_with"] and soak.restored > figures["restores"]


def test_the_harness_notices(soak: Soak, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it holds a point against is what the machine was, and what a sender was told."""
    soak.lab.serve()
    soak.check()
    (point,) = soak.check_points()
    soak.acknowledged[point + 9] = "2026-11-24T00:00:00.000000Z"
    with pytest.raises(SoakError, match=r"points \[10\] are lost"):
        soak.check()
    del soak.acknowledged[point + 9]
    soak.acknowledged[point] = "2026-11-24T00:00:00.000000Z"
    with pytest.raises(SoakError, match="was acknowledged as of"):
        soak.check_points()
    del soak.acknowledged[point]
    (store,) = soak.lab.replica_directories()
    (store / "points" / ".rest.tmp").touch()
    monkeypatch.setattr(harness, "TIDY_SECONDS", 0.0)
    with pytest.raises(SoakError, match="left behind"):
        soak.check()
    (store / "points" / ".rest.tmp").unlink()
    image = next((store / "head").glob("*.img")).resolve()
    content = bytearray(image.read_bytes())
    content[5000] ^= 1
    image.write_bytes(content)
    with pytest.raises(Exception, match="wrong on|cannot be restored"):
        soak.check_points()
