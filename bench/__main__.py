"""`make bench`: what this machine can do, what the product makes of it, and what its peers do, in one run.

    python -m bench [--size-mib 512] [--runs 1] [--full] [--out .bench] [--dir DIR]

First the ceilings (`bench.limits`), then single stages, then every cycle beside its peers (`bench.cycle`). Writes
`bench.json` and, where matplotlib is installed, plots into `--out`. `--full`: 4 GiB, medians of three, and the peers
that take minutes. `bench.machines` and `bench.chain` are runs of their own.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from bench import cycle, limits
from bench.measure import isolate, say
from bench.peers import PEERS
from bench.stages import stages
from bench.workload import MIB, make_image

QUICK_PEERS = ("btrfs", "nbdcopy", "rsync")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="4 GiB, medians of three, every peer")
    parser.add_argument("--size-mib", type=int, help="size of the image (default 512; 4096 with --full)")
    parser.add_argument("--runs", type=int, help="rounds, the median counts (default 1; 3 with --full)")
    parser.add_argument("--out", type=Path, default=Path(".bench"), help="for the JSON and the plots (default .bench)")
    parser.add_argument("--dir", type=Path, help="where to work (default: a temporary directory)")
    options = parser.parse_args()
    size = (options.size_mib or (4096 if options.full else 512)) * MIB
    runs = options.runs or (3 if options.full else 1)
    options.out.mkdir(parents=True, exist_ok=True)
    isolated = isolate()
    with tempfile.TemporaryDirectory(prefix="replica-bench-", dir=options.dir) as temporary:
        directory = Path(temporary)
        ceilings = limits.measure(directory, min(size, 256 * MIB), max(runs, 2))
        limits.report(ceilings)
        alone = _stages(directory, size, max(runs, 2))
        peers = list(PEERS if options.full else QUICK_PEERS)
        figures = cycle.measure(directory, size, runs, list(cycle.SCENARIOS), peers)
    figures |= {"isolated": isolated, "limits": ceilings, "stages": alone}
    cycle.finish(figures, options.out / "bench.json", options.out)


def _stages(directory: Path, size: int, runs: int) -> dict[str, Any]:
    image = directory / "stages.raw"
    say("stages through the library")
    make_image(image, size)
    figures = stages(directory / "stages", image, runs)
    image.unlink()
    print(f"\n{'stage through the library':34} {'MB':>8} {'s':>8} {'MB/s':>8}")
    for name, (seconds, count) in figures.items():
        print(f"{name:34} {count / 1e6:8.0f} {seconds:8.3f} {count / seconds / 1e6:8.0f}")
    return {name: {"seconds": seconds, "bytes": count} for name, (seconds, count) in figures.items()}


if __name__ == "__main__":
    main()
