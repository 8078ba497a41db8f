"""What an image is: a flat address space of bytes, read in whole windows.

An image file is untrusted input: a tenant may have made every byte of it. So a
reader never follows it outside the file it was given, bounds every number
before it allocates or loops by it, and says `ImageError` where the content does
not fit the format. The format itself is the operator's choice (`format =`, or
the file's extension) and never the content's: a guest can write any magic it
likes at the start of a raw disk, and must not thereby choose how the host reads it.

Two promises let a scan skip what holds nothing:

- `allocated` yields every range that may hold anything but zeros; what it
  leaves out reads as zeros, and the scan need not read it at all;
- `read_into` agrees with it: it fills such ranges with zeros.

Both hold for the content as it was when the image was opened. Whether the file
stands still meanwhile is decided where instants are made, not here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self
from uuid import UUID

import numpy as np

from replica.errors import ImageError

if TYPE_CHECKING:
    from typing_extensions import Buffer

    Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]


class ImageFile(NamedTuple):
    """A file that is open under an image, whatever its path names by now."""

    path: Path
    device: int
    inode: int


class Image(Protocol):
    """A readable disk. Implementations are thread-safe for `read_into` and `allocated`."""

    @property
    def path(self) -> Path: ...

    @property
    def format(self) -> str:
        """`raw`, `vhd`: the words of `format =` in the configuration."""
        ...

    @property
    def size_bytes(self) -> int:
        """The disk's size, fixed while the image is open. Need not be a multiple of anything."""
        ...

    @property
    def sector_bytes(self) -> int:
        """512 or 4096."""
        ...

    def allocated(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Half-open ranges (start, stop) in bytes that may be non-zero.

        Ascending, disjoint, never adjacent, clipped to the argument range and
        to the disk. Lazy: nothing of the disk's size is held in memory.
        """
        ...

    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill all of `buffer` (writable, contiguous) from `offset`; ImageError beyond the disk's end."""
        ...

    @property
    def files(self) -> tuple[ImageFile, ...]:
        """Every file that is open here: the image's own first, then its parents in a differencing chain."""
        ...

    def close(self) -> None:
        """Idempotent; no other call may follow or be under way."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None: ...


class ParentLink(NamedTuple):
    """The parent that a new differencing image is to have."""

    path: Path
    """Where the parent will lie, seen from where the child is made."""
    unique_id: UUID
    """Its own id in its format: the unique id of a VHD, the data write GUID of a VHDX."""
    modified_at: float = 0
    """The parent file's Unix time of modification, if it is known."""


class ImageWriter(Protocol):
    """A new image that is being filled. For one thread. Failures of the file system are StorageErrors."""

    @property
    def path(self) -> Path: ...

    @property
    def size_bytes(self) -> int: ...

    def write(self, offset: int, data: Buffer) -> None:
        """Write all of `data`, at any place in any order. ImageError past the disk's end."""
        ...

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeros; only needed over a parent's content, or over what was written."""
        ...

    def sync(self) -> None:
        """The file is a whole image and on stable storage when this returns."""
        ...

    def close(self) -> None:
        """Idempotent."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None: ...


def writable_bytes(buffer: Buffer) -> Bytes:
    """The buffer as a flat, writable uint8 array that shares its memory."""
    return np.frombuffer(memoryview(buffer).cast("B"), dtype=np.uint8)


def check_range(path: Path, offset: int, length: int, size_bytes: int) -> None:
    """Raise ImageError unless [offset, offset + length) lies inside the disk."""
    if offset < 0 or length < 0 or offset + length > size_bytes:
        raise ImageError(f"{path} has {size_bytes} bytes: {length} at {offset} are not inside it")


def coalesce(ranges: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Join ascending half-open ranges that touch."""
    begin = end = -1
    for start, stop in ranges:
        if start == end:
            end = stop
            continue
        if end > begin:
            yield begin, end
        begin, end = start, stop
    if end > begin:
        yield begin, end
