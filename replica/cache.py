"""A cache bounded by bytes: what was used least recently goes first."""

from __future__ import annotations

import threading
from collections import OrderedDict


class Cache:
    """Thread-safe. What is missing is made outside of the lock, by whoever missed it; two may make it at once."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit, self._used = limit_bytes, 0
        self._lock = threading.Lock()
        self._items: OrderedDict[tuple[int, ...], tuple[object, int]] = OrderedDict()

    def get(self, key: tuple[int, ...]) -> object | None:
        with self._lock:
            if key not in self._items:
                return None
            self._items.move_to_end(key)
            return self._items[key][0]

    def put(self, key: tuple[int, ...], value: object, cost: int) -> None:
        """Keep `value`, which takes `cost` bytes; at least the newest item is always kept."""
        with self._lock:
            if key in self._items:
                return
            self._items[key] = (value, cost)
            self._used += cost
            while self._used > self._limit and len(self._items) > 1:
                self._used -= self._items.popitem(last=False)[1][1]

    @property
    def used_bytes(self) -> int:
        return self._used
