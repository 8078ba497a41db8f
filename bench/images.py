"""Reading images beside a raw file of the same content: all that is allocated, in cache, as a scan reads it.

    python -m bench.images [--size-mib 512] [--runs 15] [--dir DIR]

One content (`bench.workload`) as a raw file, as dynamic VHD and VHDX written here, and as VHD written by qemu-img where
that is installed. Every round reads each of them once in windows of 4 MiB, the raw file before each, so that both have
the same minute; what counts is the median of the rounds' ratios, raw ÷ image, by CPU and by wall time.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from bench.measure import say
from bench.workload import MIB, make_image
from replica import images


class Seconds(NamedTuple):
    cpu: float
    wall: float


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.images", description=__doc__.splitlines()[0])
    parser.add_argument("--size-mib", type=int, default=512, help="size of the disk (default 512)")
    parser.add_argument("--runs", type=int, default=15, help="rounds, the median counts (default 15)")
    parser.add_argument("--dir", type=Path, help="where to work (default: a temporary directory)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="replica-images-", dir=options.dir) as temporary:
        ratios = measure(make_images(Path(temporary), options.size_mib * MIB), options.runs)
    print(f"{'speed ÷ raw, median (least)':28}{'by CPU':>16}{'by wall time':>16}")
    for name, each in ratios.items():
        columns = zip(*each, strict=True)
        print(f"{name:28}" + "".join(f"{statistics.median(column):9.2f} ({min(column):.2f})" for column in columns))


def make_images(directory: Path, size: int) -> dict[str, Path]:
    """The same disk in several files, by what they are; the raw one first."""
    made = directory / "made.raw"
    make_image(made, size)
    paths = {}
    for name, format, subformat in (
        ("raw", "raw", "fixed"),
        ("vhd, dynamic", "vhd", "dynamic"),
        ("vhdx, dynamic", "vhdx", "dynamic"),
    ):
        paths[name] = directory / f"disk.{format}"
        with images.open(made) as image:
            images.convert(image, paths[name], format, subformat=subformat)
    if shutil.which("qemu-img"):
        paths["vhd, dynamic, by qemu-img"] = directory / "qemu.vhd"
        command = ["qemu-img", "convert", "-f", "raw", "-O", "vpc", "-o", "force_size=on", made]
        subprocess.run([*command, paths["vhd, dynamic, by qemu-img"]], check=True)
    return paths


def measure(paths: dict[str, Path], runs: int) -> dict[str, list[Seconds]]:
    """Raw ÷ image for each image and round, after a round that fills the cache."""
    (_, raw), *others = paths.items()
    for path in paths.values():
        _cache_anew(path)
    ratios: dict[str, list[Seconds]] = {name: [] for name, _ in others}
    for number in range(runs):
        say(f"round {number + 1} of {runs}")
        for name, path in others:
            base, cost = read(raw), read(path)
            ratios[name].append(Seconds(base.cpu / cost.cpu, base.wall / cost.wall))
    return ratios


def read(path: Path) -> Seconds:
    """Open an image and read all that is allocated."""
    cpu, wall = time.process_time(), time.perf_counter()
    with images.open(path) as image:
        images.read_through(image)
    return Seconds(time.process_time() - cpu, time.perf_counter() - wall)


def _cache_anew(path: Path) -> None:
    """Read the file back into an empty cache: how it was written shapes the cache's pages, and what reading costs."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while file.read(MIB):
            pass


if __name__ == "__main__":
    main()
