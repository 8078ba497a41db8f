"""A receiver whose storage fills up, as its sender sees it: what is given up, what is refused, what is sent for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from primary_lab import TLS, Lab, MiB

from replica.durable import FileSystem
from replica.errors import StorageFullError
from replica.receiver.site import Site
from replica.receiver.spec import AllowSpec, SiteSpec, StorageSpec
from replica.store import Policy
from replica.store.space import Limit, SpaceLimits

CAPACITY = 40 * MiB


class Small(FileSystem):
    """A file system of `capacity` bytes, filled by the storage alone."""

    def __init__(self, storage: Path) -> None:
        super().__init__()
        self.storage, self.capacity = storage, CAPACITY

    def free_bytes(self, path: Path) -> int:
        used = sum(512 * p.lstat().st_blocks for p in self.storage.rglob("*") if not p.is_symlink())
        return max(0, self.capacity - used)

    def total_bytes(self, path: Path) -> int:
        return self.capacity


class SmallLab(Lab):
    policy = Policy(keep_last=24, hourly=0)

    def open_site(self) -> Site:
        self.small = Small(self.storage)
        limits = SpaceLimits(Limit(size_bytes=2 * MiB), Limit(size_bytes=1 * MiB))
        storages = {"tier1": StorageSpec(name="tier1", path=self.storage, head="raw", limits=limits)}
        allow = [AllowSpec(primary="hv-*", storage="tier1", trust_group="prod")]
        return Site(self.small, SiteSpec("127.0.0.1", 0, TLS, storages, allow, self.policy))


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[SmallLab]:
    lab = SmallLab(tmp_path, {"os": 6 * MiB})
    yield lab
    lab.site.close()


def test_a_commit_without_room_gives_points_up_and_goes_on(lab: SmallLab) -> None:
    for _ in range(12):  # 6 MiB each: far more than there is room for
        lab.scribble("os", 0, 6 * MiB)
        lab.sync()
    points = [info.state.point for info in lab.reader().points()]
    assert points[-1] == 12
    assert 2 <= len(points) < 7
    lab.assert_equal()


def test_what_may_not_be_given_up_stays_and_nothing_is_sent_in_vain(lab: SmallLab) -> None:
    lab.policy = Policy(keep_last=24, hourly=0, min_count=24)
    lab.restart_site()
    with pytest.raises(StorageFullError, match="min_free"):
        for _ in range(12):
            lab.scribble("os", 0, 6 * MiB)
            lab.sync()
    points = [info.state.point for info in lab.reader().points()]
    assert points == list(range(1, len(points) + 1))
    for _ in range(3):
        link = lab.link()
        with pytest.raises(StorageFullError, match="the next commit takes"):
            lab.sync(link)
        assert link.bytes_sent < MiB, "what has no room is not sent once more"
    lab.small.capacity *= 2
    lab.sync()
    lab.assert_equal()
    assert threading.active_count() < 50
