"""The cache stays within its bytes and forgets the least recently used first."""

from __future__ import annotations

from replica.cache import Cache


def test_forgets_what_was_used_least_recently() -> None:
    cache = Cache(100)
    for key in range(3):
        cache.put((key,), f"value {key}", 30)
    assert cache.get((0,)) == "value 0"
    cache.put((3,), "value 3", 30)
    assert cache.get((1,)) is None
    assert [cache.get((key,)) for key in (0, 2, 3)] == ["value 0", "value 2", "value 3"]
    assert cache.used_bytes == 90


def test_keeps_the_newest_even_if_it_is_too_large() -> None:
    cache = Cache(100)
    cache.put((1,), "small", 10)
    cache.put((2,), "large", 1000)
    assert cache.get((1,)) is None
    assert cache.get((2,)) == "large"
    assert cache.used_bytes == 1000


def test_an_item_counts_once() -> None:
    cache = Cache(100)
    for _ in range(5):
        cache.put((1,), "value", 60)
    assert cache.used_bytes == 60
