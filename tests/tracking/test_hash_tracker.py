"""The hash tracker: dirty is exactly what differs, roots are true, and what is not allocated is not read."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from tracking_machine import Machine, MemoryImage, root_of

from replica.bitmap import DirtyBitmap
from replica.tracking.hash import Gap, Window

G = 4096
W = 4 << 20


def random_bytes(seed: int, size: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def different_grains(a: np.ndarray, b: np.ndarray, grain: int) -> set[int]:
    return {int(position) // grain for position in np.flatnonzero(a != b)}


@pytest.mark.parametrize("size", [1, 511, G, 3 * G + 7, W, W + 1, 2 * W + 5 * G + 100])
@pytest.mark.parametrize("geometry", [{}, {"grain_bytes": 512, "leaf_bytes": 512}, {"leaf_bytes": 1 << 20}])
def test_cycles_of_any_size_report_exactly_the_changed_grains(
    machine: Callable[..., Machine], size: int, geometry: dict[str, int]
) -> None:
    m = machine(size, **geometry)
    grain = m.disk.grain_bytes
    data = random_bytes(size, size)
    _, result = m.cycle(MemoryImage(data))
    assert result.disks[0].root == root_of(data, m.disk)
    assert m.dirty(MemoryImage(data)) == set()

    rng = np.random.default_rng(1)
    for _ in range(3):
        before = data.copy()
        for position in rng.integers(0, size, 5):
            data[position] ^= 0xFF
        start = int(rng.integers(0, size))
        data[start : start + 2 * grain] = 0
        assert m.dirty(MemoryImage(data)) == different_grains(before, data, grain)
        _, result = m.cycle(MemoryImage(data))
        assert result.disks[0].root == root_of(data, m.disk)
        assert m.dirty(MemoryImage(data)) == set()


def test_window_carries_the_content_padded_with_zeros(machine: Callable[..., Machine]) -> None:
    m = machine(G + 10)
    data = random_bytes(2, G + 10)
    (window,), _ = m.scan(MemoryImage(data))
    assert isinstance(window, Window)
    assert window.buffer.tobytes() == data.tobytes() + bytes(G - 10)
    assert window.dirty is None and window.count_grains == 2


def test_unallocated_ranges_are_not_read_and_make_gaps_in_a_fresh_scan(machine: Callable[..., Machine]) -> None:
    m = machine(10 * W)
    data = np.zeros(10 * W, np.uint8)
    data[3 * W + 8192 : 3 * W + 8192 + 100] = 7
    image = MemoryImage(data, [(3 * W + 8192, 3 * W + 3 * 8192), (7 * W - 512, 7 * W + 512)])
    pieces, result = m.cycle(image)
    per = W // G
    kinds = [(p.first_grain, p.stop_grain) if isinstance(p, Gap) else p.first_grain for p in pieces]
    assert kinds == [(0, 3 * per), 3 * per, (4 * per, 6 * per), 6 * per, 7 * per, (8 * per, 10 * per)]
    assert sorted(image.reads) == [(3 * W + 8192, 3 * W + 3 * 8192), (7 * W - 512, 7 * W), (7 * W, 7 * W + 512)]
    assert result.disks[0].root == root_of(data, m.disk)
    image.reads.clear()
    pieces, _ = m.scan(image)
    assert [p.first_grain for p in pieces] == [3 * per, 6 * per, 7 * per]


def test_grains_that_lost_their_allocation_are_dirty_zeros_without_a_read(machine: Callable[..., Machine]) -> None:
    m = machine(6 * W)
    data = np.zeros(6 * W, np.uint8)
    data[2 * W + 5 * G : 2 * W + 7 * G] = random_bytes(3, 2 * G)
    data[4 * W : 4 * W + G] = 1
    m.cycle(MemoryImage(data))
    empty = MemoryImage(np.zeros(6 * W, np.uint8), [])
    pieces, result = m.cycle(empty)
    assert empty.reads == []
    found = {
        p.first_grain + int(g): int(p.zero[g])
        for p in pieces
        if isinstance(p, Window) and p.dirty is not None
        for g in np.flatnonzero(p.dirty)
    }
    first = 2 * W // G + 5
    assert found == {first: 1, first + 1: 1, 4 * W // G: 1}
    assert result.disks[0].root == root_of(empty.data, m.disk)
    assert m.scan(empty)[0] == [], "folded: the digests are holes again and nothing is looked at"


def test_never_allocated_disk_costs_nothing(machine: Callable[..., Machine]) -> None:
    m = machine(1 << 40)
    image = MemoryImage(np.zeros(0, np.uint8), [])
    image.size_bytes = 1 << 40
    pieces, _ = m.cycle(image)
    assert pieces == [Gap(0, (1 << 40) // G)]
    assert m.scan(image)[0] == []
    sizes = {"digests": (1 << 40) // G * 8, "windows": 16 + (1 << 40) // W * 8}
    for name, size in sizes.items():
        stat = (m.directory / "disks" / str(m.disk.id) / name).stat()
        assert stat.st_size == size
        assert stat.st_blocks * 512 <= (G if name == "windows" else 0), "the id of the state, and nothing else"


def test_candidates_restrict_what_is_read(machine: Callable[..., Machine]) -> None:
    m = machine(5 * W)
    data = random_bytes(4, 5 * W)
    m.cycle(MemoryImage(data))
    data[1 * W] ^= 1
    data[3 * W] ^= 1
    candidates = DirtyBitmap(m.disk.count_grains)
    candidates.set(3 * W // G)
    image = MemoryImage(data)
    assert m.dirty(image, candidates=candidates) == {3 * W // G}
    assert image.reads == [(3 * W, 4 * W)]


def test_a_lost_secret_forgets_the_digests(machine: Callable[..., Machine]) -> None:
    m = machine(W)
    data = random_bytes(5, W)
    m.cycle(MemoryImage(data))
    directory = m.directory / "disks" / str(m.disk.id)
    secret = directory / "secret"
    assert secret.stat().st_mode & 0o777 == 0o600 and secret.stat().st_size == 192
    secret.unlink()
    pieces, _ = m.scan(MemoryImage(data))
    assert isinstance(pieces[0], Window) and pieces[0].dirty is None


def test_two_disks_have_different_secrets(machine: Callable[..., Machine]) -> None:
    """Equal content under equal keys would tell a guest of one disk about another's digests."""
    m = machine(W)
    m.cycle(MemoryImage(random_bytes(5, W)))
    first = (m.directory / "disks" / str(m.disk.id) / "secret").read_bytes()
    (m.directory / "disks" / str(m.disk.id) / "secret").write_bytes(b"short")
    m.scan(MemoryImage(random_bytes(5, W)))
    assert (m.directory / "disks" / str(m.disk.id) / "secret").read_bytes() != first


def test_a_fresh_scan_over_old_trackers_replaces_them(machine: Callable[..., Machine]) -> None:
    m = machine(4 * W)
    m.cycle(MemoryImage(random_bytes(6, 4 * W)))
    data = np.zeros(4 * W, np.uint8)
    data[W : W + 10] = 3
    _, result = m.cycle(MemoryImage(data, [(W, W + G)]), fresh=True)
    assert result.disks[0].root == root_of(data, m.disk)
    assert m.dirty(MemoryImage(data)) == set()


def test_a_reader_that_fails_ends_the_scan(machine: Callable[..., Machine]) -> None:
    class Broken(MemoryImage):
        def read_into(self, offset: int, buffer: memoryview) -> None:
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        machine(3 * W).scan(Broken(random_bytes(1, 3 * W)))
