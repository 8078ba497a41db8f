"""`make bench`: the seed of the benchmark suite, in about a minute.

    python -m bench [--size-mib 1024] [--runs 3] [--json FILE]

Prints, for one image in the page cache: `pread` of the whole file in 256 KiB
pieces with two threads (what the scan is held against), the scan through the
library (cold tracker, nothing changed, 1 % of the grains changed), a first
copy and a sync of 1 % random 4 KiB changes through the real processes, bytes
on the wire per byte changed, the apply alone, and the peak memory of both
processes. Medians; every rate also as a ratio to `pread` of the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.site import Lab
from bench.stages import ApplyBench, ScanBench
from bench.workload import MIB, change_random_grains, make_image


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--size-mib", type=int, default=1024, help="size of the image (default 1024)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each measurement, the median counts (default 3)")
    parser.add_argument("--json", type=Path, help="write the figures there as JSON, too")
    parser.add_argument("--dir", type=Path, help="where to work (default: a temporary directory)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="replica-bench-", dir=options.dir) as directory:
        figures = measure(Path(directory), options.size_mib * MIB, options.runs)
    report(figures, options)


def median_seconds(runs: int, work: Callable[[], object]) -> float:
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def pread_all(path: Path) -> None:
    """Read the file once: two threads, 256 KiB pieces, one half each."""
    size, piece = path.stat().st_size, 256 << 10

    def read(start: int, stop: int) -> None:
        buffer = memoryview(bytearray(piece))
        with path.open("rb", buffering=0) as file:
            for offset in range(start, stop, piece):
                os.preadv(file.fileno(), [buffer], offset)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(read, (0, size // 2), (size // 2, size)))


def measure(directory: Path, size: int, runs: int) -> dict[str, Any]:
    image = directory / "disk.raw"
    say(f"making an image of {size // MIB} MiB")
    make_image(image, size)
    pread_all(image)
    figures: dict[str, Any] = {"size_bytes": size, "runs": runs}
    figures["pread_seconds"] = median_seconds(runs, lambda: pread_all(image))

    scan = ScanBench(directory / "scan", image)
    say("scanning through the library")
    figures["scan_cold_seconds"] = median_seconds(runs, scan.cold)
    scan.remember()
    figures["scan_unchanged_seconds"] = median_seconds(runs, scan.scan)

    lab = Lab(directory, image)
    try:
        say("first copy")
        result, figures["first_copy_seconds"] = lab.sync()
        figures["first_copy_wire_bytes"] = result["bytes_wire"]
        figures["first_copy_changed_bytes"] = result["bytes_changed"]
        figures["idle_seconds"] = median_seconds(runs, lab.sync)
        figures["idle_wire_bytes"] = lab.sync()[0]["bytes_wire"]
        say("1 % random 4 KiB changes")
        cycles = []
        for run in range(runs):
            changed = change_random_grains(image, 0.01, seed=10 + run)
            if run == 0:
                figures["scan_changed_seconds"] = median_seconds(runs, scan.scan)
            cycles.append((*lab.sync(), changed))
        figures["change_seconds"] = statistics.median(seconds for _, seconds, _ in cycles)
        figures["change_bytes"] = cycles[0][2]
        figures["change_wire_bytes"] = round(statistics.median(result["bytes_wire"] for result, _, _ in cycles))
        figures["sender_peak_bytes"] = lab.sender_peak_bytes
        figures["receiver_peak_bytes"] = lab.receiver_peak_bytes()
    finally:
        lab.close()
    say("applying deltas")
    apply = ApplyBench(directory / "apply", image)
    figures["apply_first_seconds"], figures["apply_first_bytes"] = apply.first()
    figures["apply_change_seconds"], figures["apply_change_bytes"] = apply.change(runs)
    return figures


def report(figures: dict[str, Any], options: argparse.Namespace) -> None:
    size, pread = figures["size_bytes"], figures["pread_seconds"]
    rows = [("pread, 2 threads, 256 KiB", size, pread, "")]
    rows += [
        (f"scan, {what}", size, figures[f"scan_{key}_seconds"], "")
        for what, key in (("cold tracker", "cold"), ("nothing changed", "unchanged"), ("1 % changed", "changed"))
    ]
    rows += [
        ("sync, first copy (of the image)", size, figures["first_copy_seconds"], wire(figures, "first_copy")),
        ("sync, nothing changed", size, figures["idle_seconds"], f"{figures['idle_wire_bytes']} B on the wire"),
        (
            "sync, 1 % random 4 KiB (changed)",
            figures["change_bytes"],
            figures["change_seconds"],
            wire(figures, "change"),
        ),
        ("apply, first copy (raw)", figures["apply_first_bytes"], figures["apply_first_seconds"], ""),
        ("apply, 1 % random 4 KiB (raw)", figures["apply_change_bytes"], figures["apply_change_seconds"], ""),
    ]
    print(f"\nimage {size // MIB} MiB, {os.cpu_count()} CPUs, {platform.machine()}, Python {platform.python_version()}")
    print(f"{'what':36} {'MB':>8} {'s':>8} {'MB/s':>8} {'x pread':>8}")
    for what, amount, seconds, note in rows:
        rate = amount / seconds / 1e6
        print(f"{what:36} {amount / 1e6:8.0f} {seconds:8.3f} {rate:8.0f} {rate / (size / pread / 1e6):8.2f}  {note}")
    print(f"peak memory: sender {figures['sender_peak_bytes'] / MIB:.0f} MiB, "
          f"receiver {figures['receiver_peak_bytes'] / MIB:.0f} MiB")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def wire(figures: dict[str, Any], key: str) -> str:
    changed = figures.get(f"{key}_changed_bytes") or figures[f"{key}_bytes"]
    return f"{figures[f'{key}_wire_bytes'] / changed:.3f} bytes on the wire per byte changed"


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
