"""The image that is benchmarked, and its changes: seeded, so that every run sees the same bytes.

A quiet image in the proportions of a server's disk: 30 % holes, 15 % written
zeros, 25 % compressible text, 30 % random, in runs of 1 MiB that are shuffled.

| change | what is written |
| --- | --- |
| `idle` | nothing |
| `grains` | 1 % of all 4 KiB grains, at random, with noise |
| `runs` | 5 % of the 1 MiB runs, at random: text and noise as the image has them (25 : 30) |
| `rewrite` | 80 % of the 1 MiB runs, at random: zeros, text and noise as the image has them (15 : 25 : 30) |

Each ends with an fsync, so that nobody pays for somebody else's dirty pages. Holes that are hit get content.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

MIB = 1 << 20
GRAIN = 4096
CHANGES = ("idle", "grains", "runs", "rewrite")
GRAINS_SHARE, RUNS_SHARE, REWRITE_SHARE = 0.01, 0.05, 0.80
SHARES = (("hole", 0.30), ("zero", 0.15), ("text", 0.25), ("random", 0.30))


def make_image(path: Path, size_bytes: int, seed: int = 1) -> None:
    """Write the image; sparse where it has holes."""
    generator = np.random.default_rng(seed)
    runs = size_bytes // MIB
    kinds = [kind for kind, share in SHARES for _ in range(round(share * runs))][:runs]
    kinds += ["random"] * (runs - len(kinds))
    generator.shuffle(kinds)
    with path.open("wb") as file:
        os.truncate(file.fileno(), size_bytes)
        for number, kind in enumerate(kinds):
            if kind != "hole":
                os.pwrite(file.fileno(), content(kind, MIB, generator), number * MIB)
        os.fsync(file.fileno())


def content(kind: str, length: int, generator: np.random.Generator) -> bytes:
    """Bytes of one kind: zeros, text (zstd -1 makes 0.56 of it, -3 0.50; its entropy is 0.27), or noise."""
    if kind == "zero":
        return bytes(length)
    if kind == "random":
        return generator.bytes(length)
    words = generator.integers(0, 400, length // 4, dtype=np.uint16)
    letters = (words[:, None] >> np.array([0, 3, 6, 1], dtype=np.uint16)) % 26 + ord("a")
    return letters.astype(np.uint8).tobytes()[:length]


def change_random_grains(path: Path, share: float, seed: int) -> int:
    """Rewrite that share of all grains, at random, with noise; returns the bytes changed."""
    generator = np.random.default_rng(seed)
    chosen = _choose(generator, path.stat().st_size // GRAIN, share)
    with path.open("r+b") as file:
        for grain in chosen:
            os.pwrite(file.fileno(), generator.bytes(GRAIN), grain * GRAIN)
        os.fsync(file.fileno())
    return len(chosen) * GRAIN


def change_runs(path: Path, share: float, seed: int, kinds: tuple[str, ...]) -> int:
    """Rewrite that share of the 1 MiB runs with new content of these kinds, in the image's proportions; bytes."""
    generator = np.random.default_rng(seed)
    weights = np.array([dict(SHARES)[kind] for kind in kinds])
    chosen = _choose(generator, path.stat().st_size // MIB, share)
    with path.open("r+b") as file:
        for run in chosen:
            kind = str(generator.choice(kinds, p=weights / weights.sum()))
            os.pwrite(file.fileno(), content(kind, MIB, generator), run * MIB)
        os.fsync(file.fileno())
    return len(chosen) * MIB


def change(path: Path, kind: str, seed: int) -> int:
    """Make one of `CHANGES`; returns the bytes written."""
    if kind == "grains":
        return change_random_grains(path, GRAINS_SHARE, seed)
    if kind == "runs":
        return change_runs(path, RUNS_SHARE, seed, ("text", "random"))
    if kind == "rewrite":
        return change_runs(path, REWRITE_SHARE, seed, ("zero", "text", "random"))
    return 0


def places(size_bytes: int, kind: str, seed: int) -> list[tuple[int, int]]:
    """Where `change` writes: (offset, length) in bytes, ascending."""
    unit = GRAIN if kind == "grains" else MIB
    share = {"grains": GRAINS_SHARE, "runs": RUNS_SHARE, "rewrite": REWRITE_SHARE}[kind]
    return [(n * unit, unit) for n in _choose(np.random.default_rng(seed), size_bytes // unit, share)]


def _choose(generator: np.random.Generator, count: int, share: float) -> list[int]:
    chosen: list[int] = np.sort(generator.choice(count, max(1, round(count * share)), replace=False)).tolist()
    return chosen
