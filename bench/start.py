"""What starting a process costs: `replica sync` beside the same cycle in the running daemon, and the quick commands.

    python -m bench.start [--size-mib 256] [--runs 20] [--dir DIR]

Nothing changes, so all that a fresh `sync` takes longer than the daemon's cycle is the interpreter's start, imports,
configuration, certificates, one TLS handshake, and the end. One after the other in every round, medians of all rounds.
CPU is that of sender and receiver; bytecode is compiled before, as an installation has it.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.limits import pread_all
from bench.measure import Cost, Group, isolate, say
from bench.site import Lab
from bench.tls import REPLICA
from bench.workload import MIB, make_image


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.start", description=__doc__.splitlines()[0])
    parser.add_argument("--size-mib", type=int, default=256, help="size of the image (default 256)")
    parser.add_argument("--runs", type=int, default=20, help="rounds, the median counts (default 20)")
    parser.add_argument("--dir", type=Path, help="where to work (default: a temporary directory)")
    options = parser.parse_args()
    isolate()
    with tempfile.TemporaryDirectory(prefix="replica-start-", dir=options.dir) as directory:
        show(measure(Path(directory), options.size_mib * MIB, options.runs))


def measure(directory: Path, size: int, runs: int) -> dict[str, list[Cost]]:
    """Costs by what was run, one of each per round."""
    image = directory / "disk.raw"
    make_image(image, size)
    costs: dict[str, list[Cost]] = {}
    with Lab(directory / "lab", image) as lab, Group("quick") as group:
        lab.fresh()
        pread_all(image, 1)
        quick = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "python -c 'import numpy'": [sys.executable, "-c", "import numpy"],
            "replica --help": [*REPLICA, "--help"],
            "replica status (sender)": [*REPLICA, "status", "-c", lab.sender_toml],
            "replica status (receiver)": [*REPLICA, "status", "-c", lab.receiver_toml],
        }
        with lab.daemon() as daemon:
            daemon.cycle()
            for number in range(runs):
                say(f"round {number + 1} of {runs}")
                costs.setdefault("cycle in the daemon", []).append(daemon.cycle().cost)
                costs.setdefault("replica sync", []).append(lab.fresh().cost)
                for name, command in quick.items():
                    with group.measured() as cost:
                        group.run(command, stdout=subprocess.DEVNULL)
                    costs.setdefault(name, []).append(cost)
    return costs


def show(costs: dict[str, list[Cost]]) -> None:
    """A table of medians, in milliseconds, and what a fresh process costs more."""
    wall = {name: statistics.median(cost.wall_seconds for cost in each) * 1e3 for name, each in costs.items()}
    cpu = {name: statistics.median(cost.cpu_seconds for cost in each) * 1e3 for name, each in costs.items()}
    print(f"{'':28}{'wall, ms':>10}{'CPU, ms':>10}")
    for name in costs:
        print(f"{name:28}{wall[name]:10.0f}{cpu[name]:10.0f}")
    more = [(fresh.wall_seconds - daemon.wall_seconds) * 1e3
            for fresh, daemon in zip(costs["replica sync"], costs["cycle in the daemon"], strict=True)]  # fmt: skip
    print(f"{'fresh - daemon':28}{statistics.median(more):10.0f}")


if __name__ == "__main__":
    main()
