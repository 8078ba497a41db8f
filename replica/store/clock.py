"""The receiver's observed time: what no setting of its wall clock moves forward.

A lock or a minimum age must not end early because somebody, or a broken time server, set the clock ahead. So next to
the wall clock a second time is kept with every replica, durably. Within one boot of the host it advances as the
kernel's boot-time clock does, which nobody can set, and not while the wall clock is behind it; over the gap between two
boots, whose length no clock that can't be set knows, it stands still. A promise ends when *both* say so.

So observed time is late by every hour the host was off, and promises last that much longer; it is never early. What is
in the file may be a few minutes old: after a reboot those count as time the host was off. Of a boot that nothing was
written in yet, all the time since it began has passed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from replica.model import Frozen, Stamp

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Reading:
    """What the host's clocks say: the wall clock, time since boot (suspension included), and which boot it is."""

    wall_ns: int
    boot_ns: int
    boot_id: str


class Observed(Frozen, frozen=True):
    """The observed time as it was at some reading."""

    time_ns: int
    boot_ns: int
    boot_id: str


def read_clocks() -> Reading:
    """The clocks of this host. Where a boot has no name, no two readings belong to the same one."""
    try:
        boot_id = BOOT_ID.read_text().strip()
    except OSError:
        boot_id = ""
    return Reading(time.time_ns(), time.clock_gettime_ns(time.CLOCK_BOOTTIME), boot_id)


def first(reading: Reading) -> Observed:
    """Observed time begins with the wall clock's."""
    return Observed(reading.wall_ns, reading.boot_ns, reading.boot_id)


def advance(seen: Observed, reading: Reading) -> Observed:
    """The observed time at a later reading."""
    same = reading.boot_id == seen.boot_id
    passed = (reading.boot_ns - seen.boot_ns if same else reading.boot_ns) if reading.boot_id else 0
    until = max(seen.time_ns, reading.wall_ns)
    return Observed(min(seen.time_ns + max(0, passed), until), reading.boot_ns, reading.boot_id)


def stamp(seen: Observed, reading: Reading) -> Stamp:
    """Now, by both times."""
    return Stamp(max(0, reading.wall_ns), advance(seen, reading).time_ns)
