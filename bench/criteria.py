"""What must hold of one run's figures: each criterion a ratio to a limit or a peer of the same run. Pure.

`figures` is the document of `bench.cycle`. A number with a plus is stricter than what is asked for; one with a
prime holds the peer to what we do: on stable storage, or read from the device. A criterion whose peer was not there is
not judged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

MEMORY_BYTES = 200 << 20
FRESH_SECONDS = 0.35
"""How much longer a fresh process may take than the same cycle in the daemon."""


@dataclass(frozen=True)
class Verdict:
    """One criterion: what was measured and what it may be. `value` None: not measured here."""

    number: str
    what: str
    value: float | None
    limit: float
    at_least: bool = False

    @property
    def passed(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def off_by(self) -> float | None:
        """How many times too much (or too little) it is; 1.0 is just right, below is better."""
        if self.value is None:
            return None
        return self.limit / self.value if self.at_least else self.value / self.limit

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def judge(figures: dict[str, Any]) -> list[Verdict]:
    """Every criterion that figures of one run can tell of."""
    return [*_scan(figures), *_changes(figures), *_wire(figures), *_others(figures)]


def _scan(figures: dict[str, Any]) -> Iterator[Verdict]:
    scan, idle, fresh = _get(figures, "scan"), _wall(figures, "idle", "daemon"), _wall(figures, "idle", "fresh")
    yield Verdict("1", "scan ÷ pread, speed", _ratio(_get(figures, "pread"), scan), 0.85, at_least=True)
    without = _ratio(_get(figures, "pread_allocated"), scan)
    yield Verdict("1+", "the same, pread without the holes", without, 0.85, at_least=True)
    yield Verdict("2a", "idle cycle, daemon ÷ scan", _ratio(idle, scan), 1.3)
    more = None if idle is None or fresh is None else fresh - idle
    yield Verdict("2b", "idle cycle, fresh − daemon, s", more, FRESH_SECONDS)
    cpu = _of(figures, "idle", "daemon", "cpu_seconds")
    yield Verdict("2c", "idle cycle, CPU of both sides ÷ cat", _ratio(cpu, _get(figures, "cat_cpu")), 1.5)


def _changes(figures: dict[str, Any]) -> Iterator[Verdict]:
    for number, scenario, ours, peer, limit in (
        ("3a", "grains", "daemon", "btrfs", 0.8),
        ("3b", "grains", "fresh", "btrfs", 1.0),
        ("3c", "grains", "daemon", "rsync", 0.1),
        ("4a", "runs", "daemon", "btrfs", 0.8),
        ("4b", "runs", "fresh", "btrfs", 1.2),
        ("5a", "rewrite", "daemon", "btrfs", 0.65),
        ("5c", "rewrite", "daemon", "nbdcopy", 1.0),
        ("6a", "first", "daemon", "btrfs", 0.7),
        ("6b", "first", "daemon", "nbdcopy", 1.05),
    ):
        value = _ratio(_wall(figures, scenario, ours), _wall(figures, scenario, peer))
        yield Verdict(number, f"{scenario}, {ours} ÷ {peer}", value, limit)
    for number, scenario, peer, limit in (("5b", "rewrite", "btrfs", 1.0), ("6c", "first", "nbdcopy", 0.75)):
        ours_bytes, theirs = (_of(figures, scenario, who, "wire_bytes") for who in ("daemon", peer))
        yield Verdict(number, f"{scenario}, bytes on the wire, daemon ÷ {peer}", _ratio(ours_bytes, theirs), limit)


def _wire(figures: dict[str, Any]) -> Iterator[Verdict]:
    for letter, scenario in (("a", "grains"), ("b", "runs")):
        packed = _of(figures, scenario, "daemon", "packed_bytes")
        wire = _of(figures, scenario, "daemon", "wire_bytes")
        yield Verdict(f"7{letter}", f"{scenario}, wire ÷ (zstd -1 of grains + 8 B each)", _ratio(wire, packed), 1.02)
    ours, theirs = _get(figures, "segments"), _get(figures, "tls_openssl")
    yield Verdict("8", "segments ÷ openssl s_client | s_server, rates", _ratio(theirs, ours), 0.8, at_least=True)


def _others(figures: dict[str, Any]) -> Iterator[Verdict]:
    cp, sync, restore, verify = (_get(figures, name) for name in ("cp", "sync_of_cp", "restore", "verify"))
    durable = None if cp is None or sync is None else cp + sync
    for number, what, theirs, ours, limit in (
        ("9a", "restore ÷ cp --sparse=always, speed", cp, restore, 0.8),
        ("9a'", "the same, cp and its sync", durable, restore, 0.8),
        ("9b", "verify ÷ b3sum, speed", _get(figures, "b3sum"), verify, 0.7),
        ("9b'", "the same, b3sum from the device", _get(figures, "b3sum_cold"), verify, 0.7),
    ):
        yield Verdict(number, what, _ratio(theirs, ours), limit, at_least=True)
    for letter, side in (("a", "sender"), ("b", "receiver")):
        peak = max((_peak(figures, scenario, side) for scenario in figures["scenarios"]), default=0)
        yield Verdict(f"10{letter}", f"peak memory, {side}, MiB", peak / 2**20 or None, MEMORY_BYTES / 2**20)
    cpu, wall = _of(figures, "first", "daemon", "cpu_seconds"), _wall(figures, "first", "daemon")
    yield Verdict("12", "first, cores busy in both processes", _ratio(cpu, wall), 1.7, at_least=True)


def _get(figures: dict[str, Any], name: str) -> float | None:
    value = figures["single"].get(name)
    return None if value is None else float(value)


def _of(figures: dict[str, Any], scenario: str, who: str, what: str) -> float | None:
    entry = figures["scenarios"].get(scenario, {}).get(who)
    return None if entry is None or what not in entry["median"] else float(entry["median"][what])


def _wall(figures: dict[str, Any], scenario: str, who: str) -> float | None:
    return _of(figures, scenario, who, "wall_seconds")


def _peak(figures: dict[str, Any], scenario: str, side: str) -> int:
    entries = figures["scenarios"][scenario].values()
    return max((run["peaks"].get(side, 0) for entry in entries for run in entry["runs"]), default=0)


def _ratio(value: float | None, by: float | None) -> float | None:
    return None if value is None or not by else value / by
