"""Looking at an image: what `replica image info` and `replica image check` say of it.

Opening checks every structure (see the formats' modules); what is left for
`check` is to read all that is allocated, through every bitmap and every parent.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from replica.durable import FileSystem
from replica.errors import StorageError
from replica.images.copying import WINDOW_BYTES, windows
from replica.images.facts import DiskImage, FileFacts
from replica.images.formats import format_of, open, probe
from replica.images.image import Image
from replica.progress import Progress, silent


class ImageInfo(msgspec.Struct, frozen=True, kw_only=True):
    """An image, for a person or a program to look at."""

    path: str
    format: str
    content_looks_like: str | None
    """What `probe` thinks; it decided nothing."""
    subformat: str
    size_bytes: int
    sector_bytes: int
    allocated_bytes: int
    """What a full copy reads: may hold anything but zeros."""
    file_bytes: int
    """The image's file itself, without parents."""
    occupied_bytes: int
    """What that file takes on its file system."""
    health: Literal["good", "remarks"]
    chain: tuple[FileFacts, ...]
    """The image's own file first, then its parents."""


def image_info(
    path: Path, format: str | None = None, *, fs: FileSystem | None = None, parents: Sequence[Path] = ()
) -> ImageInfo:
    """What there is to say of an image. ImageError as `open`."""
    fs = fs or FileSystem()
    with open(path, format, fs=fs, parents=parents) as image:
        return describe(fs, image, format_of(path, format))


def describe(fs: FileSystem, image: DiskImage, format: str) -> ImageInfo:
    """The same of an image that is open."""
    facts = image.facts()
    try:
        stat = fs.stat(image.path)
        file_bytes, occupied = stat.st_size or image.size_bytes, stat.st_blocks * 512
    except StorageError:
        file_bytes = occupied = 0
    return ImageInfo(
        path=str(image.path),
        format=format,
        content_looks_like=probe(image.path, fs=fs),
        subformat=facts[0].subformat,
        size_bytes=image.size_bytes,
        sector_bytes=image.sector_bytes,
        allocated_bytes=sum(stop - start for start, stop in image.allocated(0, image.size_bytes)),
        file_bytes=file_bytes,
        occupied_bytes=occupied,
        health="remarks" if any(file.remarks for file in facts) else "good",
        chain=facts,
    )


def read_through(image: Image, progress: Progress = silent) -> int:
    """Read all that is allocated, and tell how many bytes that were. ImageError at the first that cannot be read."""
    buffer = np.empty(min(WINDOW_BYTES, max(image.size_bytes, 1)), dtype=np.uint8)
    done = 0
    for start, stop in windows(image.allocated(0, image.size_bytes), WINDOW_BYTES):
        image.read_into(start, buffer[: stop - start].data)
        done += stop - start
        progress(stop, image.size_bytes)
    progress(image.size_bytes, image.size_bytes)
    return done
