"""A source that stood still is accepted, and any write in between is noticed."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from replica.durable import FileSystem
from replica.errors import ImageError, SourceBusyError
from replica.images.image import ImageFile
from replica.tracking import still
from replica.tracking.still import Stamp, StandStill


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "os.raw"
    path.write_bytes(b"content")
    return path


def test_untouched_is_accepted_after_its_stamps_settled(image: Path) -> None:
    proof = StandStill(FileSystem(), {"os": image})
    assert time.time_ns() - image.stat().st_ctime_ns >= still.SETTLED_NS
    proof.check()


@pytest.mark.parametrize("what", ["write", "append", "touch-back", "replace", "vanish", "truncate"])
def test_every_change_is_noticed(image: Path, what: str) -> None:
    proof = StandStill(FileSystem(), {"os": image})
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
        StandStill(FileSystem(), {"quiet": quiet, "os": image}, clock_ns=lambda: clock[0], sleep=sleep)


MS = 10**6


@pytest.mark.parametrize(
    ("stamp_ns", "wait_ms"),
    [
        (1_700_000_000_000_000_000, 2020),
        (1_700_000_001_000_000_000, 2020),
        (1_700_000_000_010_000_000, 30),
        (1_700_000_000_001_000_000, 20),
        (1_700_000_000_123_456_789, 20),
    ],
)
def test_stamps_settle_by_the_digits_they_have(stamp_ns: int, wait_ms: int) -> None:
    """Whole seconds: ext4 with small inodes, FAT. Both stamps have to settle."""
    old = 1_600_000_000_123_456_789
    assert Stamp(1, 2, 3, stamp_ns, old).settled_at_ns == stamp_ns + wait_ms * MS
    assert Stamp(1, 2, 3, old, stamp_ns).settled_at_ns == stamp_ns + wait_ms * MS


def test_a_stamp_in_the_future_proves_nothing(image: Path) -> None:
    """A clock that is set back gives such a stamp twice."""
    future = time.time_ns() + 3600 * 10**9
    os.utime(image, ns=(future, future))
    with pytest.raises(SourceBusyError, match=r"os\.raw has a time stamp that lies in the future.*touch"):
        StandStill(FileSystem(), {"os": image})
    os.utime(image)
    with pytest.raises(SourceBusyError, match="future"):
        StandStill(FileSystem(), {"os": image}, clock_ns=lambda: time.time_ns() - 3600 * 10**9)


def test_a_clock_set_back_while_reading_is_noticed(image: Path) -> None:
    back_ns = 0
    proof = StandStill(FileSystem(), {"os": image}, clock_ns=lambda: time.time_ns() - back_ns)
    proof.check()
    back_ns = 50 * MS
    with pytest.raises(SourceBusyError, match="clock was set back"):
        proof.check()


def opened(path: Path) -> ImageFile:
    info = path.stat()
    return ImageFile(path, info.st_dev, info.st_ino)


@pytest.fixture
def parent(image: Path) -> Path:
    path = image.with_name("parent")
    path.write_bytes(b"older")
    time.sleep(0.03)
    return path


def test_parents_stand_still_too(image: Path, parent: Path) -> None:
    proof = StandStill(FileSystem(), {"os": image})
    proof.opened("os", [opened(image), opened(parent)])
    proof.check()
    parent.write_bytes(b"newer")
    with pytest.raises(SourceBusyError, match="parent was written"):
        proof.check()


def test_a_parent_that_was_written_while_the_image_was_opened(image: Path, parent: Path) -> None:
    proof = StandStill(FileSystem(), {"os": image})
    before = opened(parent)
    parent.write_bytes(b"newer")
    time.sleep(0.03)
    with pytest.raises(SourceBusyError, match="parent, a parent of .*, was written or replaced"):
        proof.opened("os", [opened(image), opened(parent)])
    parent.rename(parent.with_name("moved"))
    parent.write_bytes(b"older")
    time.sleep(0.03)
    proof = StandStill(FileSystem(), {"os": image})
    with pytest.raises(SourceBusyError, match="parent, a parent of .*, was written or replaced"):
        proof.opened("os", [opened(image), before])


def test_the_proof_is_of_the_file_that_was_opened(image: Path) -> None:
    """A link that names another file only while the images are opened."""
    other = image.with_name("other")
    other.write_bytes(b"another")
    link = image.with_name("link")
    link.symlink_to(image)
    proof = StandStill(FileSystem(), {"os": link})
    proof.opened("os", [opened(image)])
    with pytest.raises(SourceBusyError, match="link was replaced while it was opened"):
        proof.opened("os", [opened(other)])
    link.unlink()
    link.symlink_to(other)
    with pytest.raises(SourceBusyError, match="link vanished or was replaced"):
        proof.check()


@pytest.fixture
def coarse(tmp_path: Path) -> Iterator[Path]:
    """A file system that keeps whole seconds: ext4 with inodes of 128 bytes."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    medium, place = tmp_path / "medium", tmp_path / "coarse"
    place.mkdir()
    with medium.open("wb") as file:
        file.truncate(16 << 20)
    for argv in (["mkfs.ext4", "-q", "-I", "128", str(medium)], ["mount", "-o", "loop", str(medium), str(place)]):
        try:
            made = subprocess.run(argv, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip(f"{argv[0]} is not installed")
        if made.returncode:
            pytest.skip(f"no ext4 can be made and mounted: {made.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_write_within_the_same_second_is_noticed(coarse: Path) -> None:
    path = coarse / "os.raw"
    time.sleep(1.02 - time.time() % 1)
    path.write_bytes(b"A" * 8192)
    assert path.stat().st_mtime_ns % 10**9 == 0, "the file system is not as coarse as this test wants"
    proof = StandStill(FileSystem(), {"os": path})
    path.write_bytes(b"B" * 8192)
    with pytest.raises(SourceBusyError, match="was written while"):
        proof.check()


def test_missing_and_odd_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"cannot stat .*none\.raw"):
        StandStill(FileSystem(), {"os": tmp_path / "none.raw"})
    with pytest.raises(ImageError, match="neither a file nor a block device"):
        StandStill(FileSystem(), {"os": tmp_path})


def test_a_block_device_needs_a_freeze(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(still.stat, "S_ISBLK", lambda _mode: True)
    path = tmp_path / "sda"
    path.write_bytes(b"")
    with pytest.raises(SourceBusyError, match=r"block device.*configure `freeze` and `thaw`"):
        StandStill(FileSystem(), {"os": path})
