"""Disks as a guest leaves them, for the demo and the end-to-end tests: a partition table, an ext4, files, changes.

A `Guest` is an image in some format. What a tool can work on as it lies there
(raw, fixed VHD) is worked on in place; for a dynamic VHD the content is kept as
a raw file beside it (`shadow`), which debugfs or a mount changes instead, and
what differs afterwards is written into the VHD with qemu-io.

    guest = Guest(directory, "dynamic", 256 << 20, files)
    guest.edit("rm /notes", "write /tmp/new /notes")        # debugfs commands; needs no root
    guest.keep(directory / "copy.vhd")                      # what a point of now must restore to
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import tempfile
import time
from pathlib import Path
from shutil import which

PARTITION_BYTES = 1 << 20
"""Where the one partition starts."""
COMPARED_BYTES = 64 << 10
SETTLE_SECONDS = 0.05
"""How long after its last write an image counts as standing still."""

TOOLS = {
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "mke2fs": "e2fsprogs",
    "debugfs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
}


class ToolError(Exception):
    """A tool failed, or found a difference."""


def missing_tools() -> list[str]:
    """What is not installed, as `tool (package)`."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    os.environ["PATH"] = path
    return [f"{tool} (package {package})" for tool, package in TOOLS.items() if which(tool) is None]


def command(*args: object) -> str:
    """Run a tool that must succeed; its standard output. ToolError with what it said otherwise."""
    done = subprocess.run([str(a) for a in args], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ToolError(f"`{' '.join(map(str, args))}` ended with {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


def same(left: Path, left_format: str, right: Path, right_format: str) -> None:
    """qemu-img finds the two images' contents identical (formats: raw, vpc)."""
    command("qemu-img", "compare", "-f", left_format, "-F", right_format, left, right)


def check_file_system(image: Path) -> None:
    """e2fsck finds nothing wrong in the partition of a flat image, and changes nothing."""
    command("e2fsck", "-fn", f"{image}?offset={PARTITION_BYTES}")


def write_partition_table(raw: Path, size_bytes: int) -> None:
    """An MBR with one Linux partition from 1 MiB to the end of the disk."""
    first = PARTITION_BYTES // 512
    entry = struct.pack("<B3sB3sII", 0x80, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff", first, size_bytes // 512 - first)
    with raw.open("r+b") as file:
        file.seek(440)
        file.write(b"RPLC\0\0" + entry + bytes(48) + b"\x55\xaa")


class Guest:
    """One image with a partitioned ext4 in it. `kind`: raw, fixed or dynamic (VHD)."""

    def __init__(self, directory: Path, kind: str, size_bytes: int, files: Path, name: str = "os") -> None:
        self.kind = kind
        self.format = "raw" if kind == "raw" else "vpc"
        self.image = directory / f"{name}.{'img' if kind == 'raw' else 'vhd'}"
        if kind == "raw":
            with self.image.open("wb") as file:
                file.truncate(size_bytes)
        else:
            command("qemu-img", "create", "-q", "-f", "vpc", "-o", f"subformat={kind}", self.image, size_bytes)
        info = json.loads(command("qemu-img", "info", "--output=json", "-f", self.format, self.image))
        self.size_bytes = int(info["virtual-size"])
        self.shadow = directory / f"{name}.shadow" if kind == "dynamic" else self.image
        self._before = directory / f"{name}.before"
        if kind == "dynamic":
            for path in (self.shadow, self._before):
                with path.open("wb") as file:
                    file.truncate(self.size_bytes)
        write_partition_table(self.shadow, self.size_bytes)
        kib = (self.size_bytes - PARTITION_BYTES) // 4096 * 4
        options = f"offset={PARTITION_BYTES}"
        command("mke2fs", "-q", "-F", "-t", "ext4", "-b", 4096, "-d", files, "-E", options, self.shadow, f"{kib}k")
        self.push()

    def edit(self, *commands: str) -> None:
        """Change the file system with debugfs commands."""
        with tempfile.NamedTemporaryFile("w", suffix=".debugfs") as script:
            script.write("\n".join(commands) + "\n")
            script.flush()
            command("debugfs", "-w", "-f", script.name, f"{self.shadow}?offset={PARTITION_BYTES}")
        self.push()

    def write(self, offset: int, length: int, pattern: int) -> None:
        """Overwrite a range with a byte through qemu-io, as a guest's driver would."""
        form = "raw" if self.kind == "dynamic" else self.format
        command("qemu-io", "-f", form, "-c", f"write -P {pattern} {offset} {length}", self.shadow)
        self.push()

    def blocks_of(self, file: str) -> list[int]:
        """Byte offsets on the disk of a file's 4 KiB blocks: where qemu-io may write without breaking ext4."""
        out = command("debugfs", "-R", f"blocks {file}", f"{self.shadow}?offset={PARTITION_BYTES}")
        return [PARTITION_BYTES + int(block) * 4096 for block in out.split()]

    def keep(self, target: Path) -> Path:
        """A copy of the image as it is now; what a point of this moment must restore to."""
        command("cp", "--sparse=always", self.image, target)
        return target

    def push(self) -> None:
        """Bring a dynamic VHD to what its shadow holds, by writing only what differs; then let it settle."""
        if self.kind == "dynamic":
            with tempfile.TemporaryDirectory() as directory:
                commands = self._differences(Path(directory))
                for start in range(0, len(commands), 400):
                    command("qemu-io", "-f", "vpc", *commands[start : start + 400], self.image)
            same(self.image, "vpc", self.shadow, "raw")
        time.sleep(SETTLE_SECONDS)

    def _differences(self, directory: Path) -> list[str]:
        """The qemu-io commands that write what changed in the shadow since the last time."""
        commands: list[str] = []
        with self.shadow.open("rb") as new, self._before.open("r+b") as old:
            for offset in range(0, self.size_bytes, COMPARED_BYTES):
                piece, was = new.read(COMPARED_BYTES), old.read(COMPARED_BYTES)
                if piece == was:
                    continue
                old.seek(offset)
                old.write(piece)
                if any(piece):
                    part = directory / str(offset)
                    part.write_bytes(piece)
                    commands += ["-c", f"write -q -s {part} {offset} {len(piece)}"]
                else:
                    commands += ["-c", f"write -q -z {offset} {len(piece)}"]
        return commands
