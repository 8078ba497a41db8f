"""What the end-to-end tests do to disks beyond `tools/guest.py`: mounting, random writes, digests."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from guest import PARTITION_BYTES, SETTLE_SECONDS, Guest, command


@contextmanager
def mounted(guest: Guest) -> Iterator[Path]:
    """The guest's file system, mounted through a loop device; the image holds the changes when the block ends."""
    if os.geteuid() != 0 or not Path("/dev/loop-control").exists():
        pytest.skip("mounting the file system needs root and loop devices")
    with tempfile.TemporaryDirectory() as directory:
        options = f"loop,offset={PARTITION_BYTES},sizelimit={guest.size_bytes - PARTITION_BYTES}"
        for attempt in range(20):
            done = subprocess.run(
                ["mount", "-t", "ext4", "-o", options, guest.shadow, directory],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode == 0:
                break
            assert attempt < 19, f"mount: {done.stderr}"
            time.sleep(0.1)
        try:
            yield Path(directory)
        finally:
            command("umount", directory)
    guest.push()


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def scribble(image: Path, seed: int, count: int, length: int = 4096) -> None:
    """Overwrite `count` random places of a raw image with random bytes."""
    random = np.random.default_rng(seed)
    slots = image.stat().st_size // length
    with image.open("r+b") as file:
        for slot in random.choice(slots, size=count, replace=False):
            file.seek(int(slot) * length)
            file.write(random.bytes(length))
    time.sleep(SETTLE_SECONDS)
