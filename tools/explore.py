"""Power cuts in lives of a store, for as long as told: `python tools/explore.py --seconds 3600 --seed 1`.

Each life is the scripted one in another order and with other content, seeded; each moment of it is cut with random
subsets of its unsynced changes. Prints what was tried; the first promise that is broken ends it with exit code 1 and
the command that shows it again.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.crash.history import STEPS, ViolationError, check, record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to go on (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the first life; each further one adds 1")
    parser.add_argument("--limit", type=int, default=64, help="subsets of unsynced changes per moment")
    parser.add_argument("--sample", type=float, default=0.2, help="which share of the states is tried")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    deadline, tried, lives = time.monotonic() + options.seconds, 0, 0
    while time.monotonic() < deadline:
        seed = options.seed + lives
        lives += 1
        chance = random.Random(seed)
        fixed, middle = STEPS[:2], list(STEPS[2:])
        again = [step for step in middle if step[0] in ("delta", "delta after it", "rotation", "zeroing", "part")]
        steps = (*fixed, *middle, *chance.choices(again, k=8))
        life = record(steps, seed)
        seen: set[int] = set()
        for number, (state, promise, where) in enumerate(life.states(limit=options.limit, seed=seed)):
            if time.monotonic() > deadline:
                break
            if chance.random() > options.sample:
                continue
            tried += 1
            try:
                check(state, promise, seen=seen)
            except ViolationError as error:
                print(f"life {seed}, state {number}, {where}: {error}")
                print(f"again: python tools/explore.py --seed {seed} --limit {options.limit} --sample {options.sample}")
                return 1
            if tried % 2000 == 0:
                print(f"{tried} states of {lives} lives", flush=True)
    print(f"{tried} states of {lives} lives: every promise was kept")
    return 0


if __name__ == "__main__":
    sys.exit(main())
