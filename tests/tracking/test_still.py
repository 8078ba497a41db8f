"""A source that stood still is accepted, and any write in between is noticed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from replica.errors import ImageError, SourceBusyError
from replica.tracking import still
from replica.tracking.still import Stamp, StandStill


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "os.raw"
    path.write_bytes(b"content")
    return path


def test_untouched_is_accepted_after_its_stamps_settled(image: Path) -> None:
    proof = StandStill({"os": image})
    assert time.time_ns() - image.stat().st_ctime_ns >= still.SETTLED_NS
    proof.check()


@pytest.mark.parametrize("what", ["write", "append", "touch-back", "replace", "vanish", "truncate"])
def test_every_change_is_noticed(image: Path, what: str) -> None:
    proof = StandStill({"os": image})
    before = image.stat()
    if what == "write":
        with image.open("r+b") as file:
            file.write(b"X")
    elif what == "append":
        with image.open("ab") as file:
            file.write(b"X")
    elif what == "touch-back":
        image.write_bytes(b"CONTENT")
        os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif what == "replace":
        other = image.with_name("other")
        other.write_bytes(b"content")
        os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
        other.replace(image)
    elif what == "vanish":
        image.unlink()
    else:
        os.truncate(image, 3)
    with pytest.raises(SourceBusyError, match="configure `freeze` and `thaw`") as caught:
        proof.check()
    assert str(image) in str(caught.value)


def test_one_that_keeps_changing_is_named(image: Path, tmp_path: Path) -> None:
    quiet = tmp_path / "quiet.raw"
    quiet.write_bytes(b"q")
    clock = [time.time_ns()]

    def sleep(seconds: float) -> None:
        clock[0] += int(seconds * 1e9)
        os.utime(image, ns=(clock[0], clock[0]))

    with pytest.raises(SourceBusyError, match=r"os\.raw is being written"):
        StandStill({"quiet": quiet, "os": image}, clock_ns=lambda: clock[0], sleep=sleep)


@pytest.mark.parametrize(
    ("mtime_age", "ctime_age", "settled"),
    [(20, 20, True), (19, 20, False), (20, 19, False), (1 << 40, 20, True), (-1, 20, True), (20, -1, False)],
)
def test_stamps_settle_after_20_ms(mtime_age: int, ctime_age: int, settled: bool) -> None:
    now, ms = 10**18, 10**6
    assert Stamp(1, 2, 3, now - mtime_age * ms, now - ctime_age * ms).settled(now) is settled


def test_missing_and_odd_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"none\.raw cannot be read"):
        StandStill({"os": tmp_path / "none.raw"})
    with pytest.raises(ImageError, match="neither a file nor a block device"):
        StandStill({"os": tmp_path})


def test_a_block_device_needs_a_freeze(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(still.stat, "S_ISBLK", lambda _mode: True)
    path = tmp_path / "sda"
    path.write_bytes(b"")
    with pytest.raises(SourceBusyError, match=r"block device.*configure `freeze` and `thaw`"):
        StandStill({"os": path})
