"""The figures of `bench.cycle` as tables, and as plots where matplotlib is installed (the extra `bench`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.criteria import Verdict
from bench.measure import say
from bench.workload import MIB

TITLES = {
    "first": "first copy", "idle": "nothing changed", "grains": "1 % random 4 KiB", "runs": "5 % in 1 MiB runs",
    "rewrite": "80 % rewritten",
}  # fmt: skip


def show(figures: dict[str, Any], verdicts: list[Verdict]) -> None:
    """Print everything."""
    machine = figures["machine"]
    print(
        f"\nimage {figures['size_bytes'] // MIB} MiB, medians of {figures['runs']}, {machine['cpus']} CPUs, Linux "
        f"{machine['kernel']}, Python {machine['python']}, load {machine['load']:.1f} when it began, "
        f"nice {machine['nice']}"
    )
    print("\n| scenario | who | wall s | CPU s | machine's CPU s | peak MiB | on the wire | load |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for scenario, entries in figures["scenarios"].items():
        for who, entry in entries.items():
            run = entry["median"]
            print(
                f"| {TITLES[scenario]} | {who} | {run['wall_seconds']:.3f} | {run['cpu_seconds']:.3f} | "
                f"{run['system_cpu_seconds']:.2f} | {run['peak_bytes'] / MIB:.0f} | {run['wire_bytes']:,.0f} | "
                f"{run['load']:.1f} |"
            )
    print("\n| alone | |")
    print("| --- | --- |")
    for name, value in figures["single"].items():
        print(f"| {name} | {f'{value:,} bytes' if isinstance(value, int) else f'{value:.3f} s'} |")
    print("\n| criterion | | measured | limit | | off by |")
    print("| --- | --- | --- | --- | --- | --- |")
    for verdict in verdicts:
        sign = "≥" if verdict.at_least else "≤"
        if verdict.value is None:
            print(f"| {verdict.number} | {verdict.what} | | {sign} {verdict.limit:g} | not measured | |")
            continue
        outcome = "pass" if verdict.passed else "FAIL"
        print(
            f"| {verdict.number} | {verdict.what} | {verdict.value:.3f} | {sign} {verdict.limit:g} | {outcome} | "
            f"{verdict.off_by:.2f} × |"
        )
    for name, peer in figures["peers"].items():
        print(f"\n{name}: {peer['version']}")
        for command in max(peer["commands"].values(), key=len, default=[]):
            print(f"    {command}")
    for name, reason in figures["skipped"].items():
        print(f"\n{name} was left out: {reason}")


def plot(figures: dict[str, Any], verdicts: list[Verdict], directory: Path) -> None:
    """Write `cycles.png` (wall and CPU by scenario) and `criteria.png` (how far each is from its limit)."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        say("no plots: matplotlib is not installed (pip install 'replica[bench]')")
        return
    directory.mkdir(parents=True, exist_ok=True)
    scenarios = figures["scenarios"]
    figure, axes = pyplot.subplots(1, len(scenarios), figsize=(3.4 * len(scenarios), 4.2), squeeze=False)
    for axis, (scenario, entries) in zip(axes[0], scenarios.items(), strict=True):
        names = list(entries)
        for shift, key, label in ((-0.2, "wall_seconds", "wall"), (0.2, "cpu_seconds", "CPU, all processes")):
            values = [entries[name]["median"][key] for name in names]
            axis.bar([n + shift for n in range(len(names))], values, 0.4, label=label)
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axis.set_title(TITLES[scenario], fontsize=10)
        axis.set_ylabel("seconds")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(f"{figures['size_bytes'] // MIB} MiB image, medians of {figures['runs']}")
    _save(figure, directory / "cycles.png")
    judged = [verdict for verdict in verdicts if verdict.off_by is not None][::-1]
    figure, axis = pyplot.subplots(figsize=(9, 0.33 * len(judged) + 1.2))
    colours = ["tab:green" if verdict.passed else "tab:red" for verdict in judged]
    axis.barh([f"{v.number}  {v.what}" for v in judged], [v.off_by for v in judged], color=colours)
    axis.axvline(1.0, color="black", linewidth=1)
    axis.set_xscale("log")
    axis.set_xlabel("times its limit (below 1 is met)")
    _save(figure, directory / "criteria.png")


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    say(f"wrote {path}")
