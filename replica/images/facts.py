"""What can be said of an image without reading its content: `replica image info`."""

from __future__ import annotations

from typing import Literal, Protocol

import msgspec

from replica.images.image import Image


class FileFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One file of an image: the image itself, or a parent of it."""

    path: str
    subformat: str
    """`fixed`, `dynamic`, `differencing`, or `device`."""
    size_bytes: int
    """The size of its disk, as a guest sees it."""
    sizes: dict[str, int] = {}
    """Every size that the file tells, by name, where it tells several."""
    id: str = ""
    creator: str = ""
    block_bytes: int | None = None
    allocated_bytes: int | None = None
    """In its own blocks; None where there are none."""
    log: Literal["none", "clean", "dirty"] = "none"
    """Of a format that has one: `dirty` was replayed in memory for whoever reads."""
    remarks: tuple[str, ...] = ()
    """What is wrong with it, though it can be read."""


class DiskImage(Image, Protocol):
    """An image of a format: what `images.open` returns."""

    def facts(self) -> tuple[FileFacts, ...]:
        """One per file, in the order of `files`."""
        ...
