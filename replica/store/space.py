"""Space: when a store warns, when it gives points up, and when it takes no more. The decisions are pure.

    judge(free, total, limits)   ->  Space: ok, low (warned about), or short by so many bytes

`warn_free` and `min_free` are sizes or shares of the file system. Below `warn_free` the log and `status` say so. Below
`min_free` points are given up by policy (`retention.decide` with `shed_bytes`), and nothing is begun as long as
that does not help; a delta whose commit would go below `min_free` is not committed. So a commit never finds the disk
full in its middle, unless somebody else fills it just then; that is survived, too, but stops the machine.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from replica.delta import DATA, ZERO, DeltaFileReader
from replica.durable import FileSystem
from replica.errors import StorageFullError
from replica.model import Frozen
from replica.store.layout import Layout

DEFAULT_WARN_SHARE = 0.10
DEFAULT_MIN_SHARE = 0.02
DEFAULT_MIN_BYTES = 4 << 30
DEFAULT_WARN_BYTES = 100 << 30
"""Shares of a large file system are more than anybody needs to be kept free: the defaults are these at most."""


class Limit(Frozen, frozen=True):
    """A size, a share of the file system, or the smaller of both."""

    size_bytes: int | None = None
    share: float | None = None

    def bytes_of(self, total_bytes: int) -> int:
        sizes = [] if self.size_bytes is None else [self.size_bytes]
        if self.share is not None:
            sizes.append(int(self.share * total_bytes))
        return min(sizes, default=0)


class SpaceLimits(Frozen, frozen=True):
    """What a storage should have free."""

    warn_free: Limit = Limit(DEFAULT_WARN_BYTES, DEFAULT_WARN_SHARE)
    min_free: Limit = Limit(DEFAULT_MIN_BYTES, DEFAULT_MIN_SHARE)


DEFAULT_LIMITS = SpaceLimits()


@dataclass(frozen=True, slots=True)
class Space:
    """How a storage stands. `short_bytes` is what is missing to `min_free`, 0 if nothing is."""

    free_bytes: int
    total_bytes: int
    warn_bytes: int
    min_bytes: int

    @property
    def is_low(self) -> bool:
        return self.free_bytes < max(self.warn_bytes, self.min_bytes)

    @property
    def short_bytes(self) -> int:
        return max(0, self.min_bytes - self.free_bytes)


def judge(free_bytes: int, total_bytes: int, limits: SpaceLimits) -> Space:
    """How a storage with so much free of so much stands."""
    warn, least = (limit.bytes_of(total_bytes) for limit in (limits.warn_free, limits.min_free))
    return Space(free_bytes, total_bytes, warn, least)


def commit_bytes(fs: FileSystem, layout: Layout, delta: DeltaFileReader) -> int:
    """What committing a delta takes at most: every grain that it carries is old data in the inverse, or new in a hole;
    of what it makes zero, cuts off or removes, the inverse has all that is no hole in the image.

    Those blocks come free with the same commit, but behind the inverse.
    """
    data: Counter[int] = Counter()
    zero: Counter[int] = Counter()
    for disk, rows in delta.extents():
        grain_bytes = delta.disks[disk].grain_bytes
        data[disk] += int(rows["count"][rows["data"] == DATA].sum()) * grain_bytes
        zero[disk] += int(rows["count"][rows["data"] == ZERO].sum()) * grain_bytes
    total = data.total()
    for disk, change in enumerate(delta.disks):
        left_bytes = min(change.base_bytes, change.result_bytes)
        total += _allocated(fs, layout.image(change.disk_id), 0, left_bytes, zero[disk])
        total += _allocated(fs, layout.image(change.disk_id), left_bytes, change.base_bytes, change.base_bytes)
    return total


def _allocated(fs: FileSystem, image: Path, start: int, stop: int, limit_bytes: int) -> int:
    """Bytes of an image that are no hole in [start, stop), at most `limit_bytes`: not counted further."""
    if start >= stop or not limit_bytes or not fs.exists(image):
        return 0
    total = 0
    with fs.open(image) as file:
        for _, length in file.data_runs(start, stop):
            total += length
            if total >= limit_bytes:
                return limit_bytes
    return total


def full(path: Path, free_bytes: int, need_bytes: int, min_bytes: int) -> StorageFullError:
    """Why nothing is taken now."""
    need = f", the next commit takes up to {need_bytes >> 20} MiB" if need_bytes else ""
    least = f"{min_bytes >> 20} MiB must stay free (min_free)"
    return StorageFullError(
        f"the storage of {path} has {free_bytes >> 20} MiB free{need}, and {least}",
        hint="free space there or keep fewer points; the machine goes on by itself, every point is kept",
        need_bytes=need_bytes,
    )
