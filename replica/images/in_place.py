"""Targets that are there already: NBD exports and block devices, overwritten where they are.

Nobody knows what they hold, so what is not written must be zeroed, and what is
written should not be zeroed before. Everything below a mark has been written or
zeroed; whoever writes at or above it has the gap zeroed first, and `sync` zeroes the
rest, up to the target's end: also behind a disk that is smaller than the target.

There is no name that could come last: a target whose writing broke off is neither
what it was nor what it was to be.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from replica.errors import ImageError
from replica.images.image import check_range

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Target(Protocol):
    """What is overwritten. For one thread."""

    @property
    def path(self) -> Path: ...

    @property
    def size_bytes(self) -> int: ...

    def write(self, offset: int, data: memoryview) -> None: ...

    def zero(self, offset: int, length: int) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class InPlaceWriter:
    """An `ImageWriter` over a target that is open, and this object's from now on.

    ImageError, and the target is closed, if it is smaller than the disk. Failures are what the target raises.
    """

    def __init__(self, target: Target, size_bytes: int) -> None:
        if size_bytes > target.size_bytes:
            target.close()
            raise ImageError(
                f"{target.path} has {target.size_bytes} bytes, {size_bytes} are needed", hint="choose a larger one"
            )
        self._target = target
        self._mark = 0
        self.path = target.path
        self.size_bytes = size_bytes

    def write(self, offset: int, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        check_range(self.path, offset, len(view), self.size_bytes)
        self._fill(offset)
        self._target.write(offset, view)
        self._mark = max(self._mark, offset + len(view))

    def zero(self, offset: int, length: int) -> None:
        check_range(self.path, offset, length, self.size_bytes)
        if offset < self._mark:
            self._target.zero(offset, min(length, self._mark - offset))

    def sync(self) -> None:
        self._fill(self._target.size_bytes)
        self._target.flush()

    def _fill(self, stop: int) -> None:
        if stop > self._mark:
            self._target.zero(self._mark, stop - self._mark)
            self._mark = stop

    def close(self) -> None:
        self._target.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
