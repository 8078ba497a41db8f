"""Which points stay: a pure function of the points and the policy.

Points go from the oldest on, because the chain of inverses hangs from the
head: the inverse of the oldest point is the one that nothing else needs.
"""

from __future__ import annotations

from collections.abc import Sequence

DEFAULT_KEEP_LAST = 24


def to_drop(points: Sequence[int], keep_last: int) -> list[int]:
    """The point numbers to drop, oldest first, given all of them oldest first.

    The newest point is the head and always stays: `keep_last` counts it and is at least 1.
    """
    if keep_last < 1:
        raise ValueError("keep_last must be at least 1")
    return list(points[: max(0, len(points) - keep_last)])
