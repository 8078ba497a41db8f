"""The words of the project as frozen values: identities, disks, states, epochs.

Everything here is immutable, hashable where it makes sense, thread-safe, and
free of I/O. All of it is encoded as JSON by `msgspec` (state files, wire
documents, the head of a manifest); decoding checks types *and* the bounds in
`__post_init__`, so a value that exists is a value that is valid.

Units are in the names: `size_bytes`, `count_grains`, `frozen_at_ns`
(nanoseconds since the Unix epoch, UTC).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import UTC, datetime
from enum import StrEnum
from itertools import pairwise
from typing import NewType
from uuid import UUID

import msgspec

ReplicaId = NewType("ReplicaId", UUID)
DiskId = NewType("DiskId", UUID)
DeltaId = NewType("DeltaId", UUID)
KeyId = NewType("KeyId", UUID)

NIL = UUID(int=0)
EMPTY_DELTA_ID = DeltaId(NIL)
"""Names the empty state: no disks, point 0. Every replica starts there."""

GRAIN_BYTES = 4096
LEAF_BYTES = 16384
SECTOR_BYTES = 512
DIGEST_BYTES = 32
MAX_DISK_BYTES = 64 << 40
"""64 TiB, the largest disk VHDX allows; the Merkle tree's fixed depth covers it with 16 KiB leaves."""
MAX_DISKS = 256
MAX_TRACKERS = 8
MAX_NOTES = 8
MAX_NOTE_CHARACTERS = 512
MAX_NAME_BYTES = 128
"""Names become parts of file names (255 bytes on every file system), with room for what is put around them."""

ZERO_ROOT = bytes(DIGEST_BYTES)


def random_id() -> UUID:
    """128 random bits as a UUID value (no version bits: nothing reads them)."""
    return UUID(bytes=os.urandom(16))


def check_name(name: str, what: str) -> str:
    """Return `name` if it can be a machine's or disk's name, else raise ValueError.

    Names become file names at the receiver and in `restore`, so they are
    letters, digits, `.`, `_`, `-`, ` ` and may not start with a dot.
    """
    if not name or len(name.encode(errors="surrogatepass")) > MAX_NAME_BYTES or name.startswith("."):
        raise ValueError(f"{what} {name!r} must have 1 to {MAX_NAME_BYTES} bytes and not start with a dot")
    if any(not (c.isalnum() or c in "._- ") for c in name) or name != name.strip():
        raise ValueError(f"{what} {name!r} may hold letters, digits, '.', '_', '-' and inner spaces only")
    return name


class Consistency(StrEnum):
    """What a point's instant promises to the software inside the machine."""

    CRASH = "crash-consistent"
    APPLICATION = "application-consistent"


class Frozen(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every value: immutable, strict about unknown fields when decoded."""


class Disk(Frozen, frozen=True):
    """A flat address space of bytes. Two states hold the same disk when the ids are equal."""

    id: DiskId
    name: str
    size_bytes: int
    sector_bytes: int = SECTOR_BYTES
    grain_bytes: int = GRAIN_BYTES
    leaf_bytes: int = LEAF_BYTES

    def __post_init__(self) -> None:
        check_name(self.name, "disk name")
        if not 0 <= self.size_bytes <= MAX_DISK_BYTES:
            raise ValueError(f"disk {self.name!r} of {self.size_bytes} bytes: 0 to {MAX_DISK_BYTES} are allowed")
        if self.sector_bytes not in (512, 4096):
            raise ValueError(f"sector size {self.sector_bytes} is neither 512 nor 4096")
        if not 512 <= self.grain_bytes <= 65536 or self.grain_bytes & (self.grain_bytes - 1):
            raise ValueError(f"grain of {self.grain_bytes} bytes is no power of two from 512 to 65536")
        if not self.grain_bytes <= self.leaf_bytes <= 1 << 20 or self.leaf_bytes & (self.leaf_bytes - 1):
            raise ValueError(f"leaf of {self.leaf_bytes} bytes is no power of two from the grain to 1 MiB")
        if self.size_bytes > self.leaf_bytes << 32:
            raise ValueError(f"disk {self.name!r} has more than 2^32 leaves of {self.leaf_bytes} bytes")

    @property
    def count_grains(self) -> int:
        return -(-self.size_bytes // self.grain_bytes)

    @property
    def count_leaves(self) -> int:
        return -(-self.size_bytes // self.leaf_bytes)

    @property
    def grains_per_leaf(self) -> int:
        return self.leaf_bytes // self.grain_bytes


class DiskState(Frozen, frozen=True, omit_defaults=True):
    """A disk and the Merkle root of its content (32 bytes; see `merkle`).

    `read_point` is the number of the point at which every leaf had last been recomputed from the source (0: it is
    not known of any), `trusted` the trackers whose word was taken since. Where it is the state's own point, every
    block behind the root was read at this very instant, and nothing but reading was trusted.
    """

    disk: Disk
    root: bytes
    read_point: int = 0
    trusted: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.root) != DIGEST_BYTES:
            raise ValueError("a Merkle root has 32 bytes")
        if not 0 <= self.read_point < 1 << 48:
            raise ValueError("point number out of range")
        if len(self.trusted) > MAX_TRACKERS or any(not 0 < len(name) <= MAX_NAME_BYTES for name in self.trusted):
            raise ValueError(f"at most {MAX_TRACKERS} trackers of 1 to {MAX_NAME_BYTES} characters can be named")


class DamagedLeaves(Frozen, frozen=True):
    """Leaves [first, stop) of a disk of the head whose content is not what its Merkle tree says."""

    disk_id: DiskId
    first: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.stop <= 1 << 32:
            raise ValueError(f"leaves {self.first} to {self.stop} are no range of a disk's leaves")


class Epoch(Frozen, frozen=True):
    """The fencing token: grows at every change of role.

    `holder` is random and made by the sender's state directory. A replica
    takes deltas of exactly one epoch; equal counters with different holders
    are refused like older ones.
    """

    counter: int
    holder: UUID

    def __post_init__(self) -> None:
        if not 0 <= self.counter < 1 << 63:
            raise ValueError("epoch counter out of range")


class State(Frozen, frozen=True, omit_defaults=True):
    """One state of a machine: the instant of all its disks that a delta led to.

    Named by `delta_id`, the delta that made it. `disks` are sorted by id.
    The empty state has `EMPTY_DELTA_ID`, point 0 and no disks.

    A `partial` state is a step of a long copy: no instant of the machine, hence no point. It has the number of the
    point before it (0 in a first copy), is listed nowhere and restored by nobody. `files` is the id of the disk, if
    any, that holds the machine's configuration files and no disk of the machine. `notes` say what somebody who
    restores the point should know of how it was made, such as that a tracker had missed changes before.
    """

    replica_id: ReplicaId
    delta_id: DeltaId
    point: int
    epoch: Epoch
    frozen_at_ns: int
    consistency: Consistency
    disks: tuple[DiskState, ...]
    partial: bool = False
    files: DiskId | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.point < 1 << 48:
            raise ValueError("point number out of range")
        if not 0 <= self.frozen_at_ns < 1 << 63:
            raise ValueError("freeze time out of range")
        ids = [d.disk.id.bytes for d in self.disks]
        if len(ids) > MAX_DISKS or any(a >= b for a, b in pairwise(ids)):
            raise ValueError(f"a state has at most {MAX_DISKS} disks, sorted by id, each once")
        names = [d.disk.name for d in self.disks]
        if len(set(names)) != len(names):
            raise ValueError("two disks of a state have the same name")
        if len(self.notes) > MAX_NOTES or any(not 0 < len(note) <= MAX_NOTE_CHARACTERS for note in self.notes):
            raise ValueError(f"a state has at most {MAX_NOTES} notes of 1 to {MAX_NOTE_CHARACTERS} characters")
        if self.files is not None and self.files.bytes not in ids:
            raise ValueError("the disk with the machine's files is not one of the state's disks")

    @classmethod
    def empty(cls, replica_id: ReplicaId, epoch: Epoch) -> State:
        return cls(replica_id, EMPTY_DELTA_ID, 0, epoch, 0, Consistency.CRASH, ())

    @property
    def is_empty(self) -> bool:
        return self.delta_id == EMPTY_DELTA_ID

    @property
    def is_point(self) -> bool:
        """Whether this state can be listed and restored: one instant of a machine."""
        return not self.is_empty and not self.partial

    def disk(self, disk_id: DiskId) -> DiskState | None:
        return next((d for d in self.disks if d.disk.id == disk_id), None)

    @property
    def roots(self) -> dict[str, str]:
        """Disk name -> Merkle root in hex, as every `--json` output shows it."""
        return {d.disk.name: d.root.hex() for d in self.machine_disks}

    @property
    def machine_disks(self) -> tuple[DiskState, ...]:
        """The machine's disks: all but the one that holds its configuration files."""
        return tuple(d for d in self.disks if d.disk.id != self.files)

    def lacking(self, disks: Iterable[Disk]) -> tuple[str, ...]:
        """What of this state a later one with these disks has no more, in words: disks, and the ends of disks."""
        later = {disk.id: disk for disk in disks}
        found = []
        for before in (entry.disk for entry in self.disks):
            now = later.get(before.id)
            if now is None:
                what = "the machine's files are" if before.id == self.files else f"disk {before.name!r} is"
                found.append(f"{what} not in it any more; older points keep what they have")
            elif now.size_bytes < before.size_bytes:
                sizes = f"from {before.size_bytes} to {now.size_bytes} bytes"
                found.append(f"disk {now.name!r} shrank {sizes}; older points keep theirs")
        return tuple(found)


class Stamp(Frozen, frozen=True, omit_defaults=True):
    """A moment at the receiver: by its wall clock, and by its observed time, which no setting of that clock moves
    (`store.clock`). The sender has no say in either."""

    wall_ns: int = 0
    observed_ns: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.wall_ns < 1 << 63 and 0 <= self.observed_ns < 1 << 63):
            raise ValueError("time out of range")


NEVER = Stamp()
"""No moment is known."""


def rfc3339(time_ns: int) -> str:
    """RFC 3339 in UTC with microseconds, e.g. `2026-11-22T21:33:07.000250Z`."""
    moment = datetime.fromtimestamp(time_ns // 1_000_000_000, UTC).replace(microsecond=time_ns // 1000 % 1_000_000)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")
