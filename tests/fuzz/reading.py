"""One hostile image, read as a scan reads it, and what must hold whatever is in it.

- nothing but `ImageError` is raised;
- no more than `LIMIT_SECONDS` of CPU time and `LIMIT_BYTES` of address space are taken;
- no file is opened but those in the image's folder and the permitted one;
- `allocated` is ascending, disjoint and inside the disk, and `read_into` gives zeros outside of it, and the same
  bytes in one piece and in two.
"""

from __future__ import annotations

import encodings.utf_16_be
import encodings.utf_16_le  # noqa: F401 - as numpy.ma, imported at first use else: by an image, it would seem
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy.ma  # noqa: F401

from replica import images
from replica.errors import ImageError
from replica.images import formats, vhd, vhdx  # noqa: F401 - imported at first use else, too
from tests.fuzz.sparse import Case

LIMIT_SECONDS, LIMIT_BYTES = 2.0, 100 << 20
SPOTS = 12
"""Allocated ranges of which some bytes are read."""
WINDOW = 8192


class Finding(AssertionError):
    """What an image must not be able to do."""


class Room:
    """The folders that cases are put into. Beside the permitted ones lies a file that must never be opened."""

    def __init__(self, root: Path, format: str) -> None:
        self.root, self.format = Path(os.path.realpath(root)), format
        self.own, self.parents, outside = (self.root / name for name in ("own", "parents", "outside"))
        for folder in (self.own, self.parents, outside):
            folder.mkdir(exist_ok=True)
        self.image = self.own / f"0.{format}"

    def furnish(self, parent: Case, outside: Case) -> None:
        """A parent in the permitted folder; and one that a path or a link may lead to, and that nobody may follow."""
        parent.files[0].save(self.parents / f"base.{self.format}")
        secret = self.root / "outside" / f"secret.{self.format}"
        outside.files[0].save(secret)
        for folder in (self.own, self.parents):
            link = folder / f"link.{self.format}"
            if not link.is_symlink():
                link.symlink_to(secret)

    def put(self, case: Case) -> None:
        for number in range(3):
            path = self.own / f"{number}.{self.format}"
            if number < len(case.files):
                case.files[number].save(path)
            else:
                path.unlink(missing_ok=True)

    def permits(self, path: str) -> bool:
        real = os.path.realpath(path)
        return real.startswith((f"{self.own}/", f"{self.parents}/"))


_opened: list[str] | None = None


def _audit(event: str, args: tuple[object, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(args[0], str | bytes | os.PathLike):
        _opened.append(os.fsdecode(args[0]))


sys.addaudithook(_audit)


def read_case(room: Room, case: Case) -> str:
    """Read the case; returns what was made of it, in a word or an error's message. Finding."""
    global _opened
    room.put(case)
    opened: list[str] = []
    started = time.thread_time()
    try:
        with address_space(LIMIT_BYTES):
            _opened = opened
            try:
                told = _read(room)
            except ImageError as error:
                told = error.message
    except MemoryError as error:
        raise Finding(f"more than {LIMIT_BYTES} bytes of memory were asked for") from error
    finally:
        _opened = None
    seconds = time.thread_time() - started
    if seconds > LIMIT_SECONDS:
        raise Finding(f"{seconds:.1f} seconds were taken: {told}")
    if strangers := [path for path in opened if not room.permits(path)]:
        raise Finding(f"{strangers} were opened")
    return told


@contextmanager
def address_space(more: int) -> Iterator[None]:
    """The process may take so many bytes more than it has. MemoryError for whoever asks for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", "rb", buffering=0) as file:
        pages = int(file.read(64).split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _read(room: Room) -> str:
    images.probe(room.image)
    with images.open(room.image, room.format, parents=(room.parents,)) as image:
        image.facts()
        spots: list[tuple[int, int, int]] = []
        """What is read: a window, and where in it the allocated range starts."""
        reached, last = 0, (0, 0, 0)
        for start, stop in image.allocated(0, image.size_bytes):
            if not (reached < start or reached == start == 0) or not start < stop <= image.size_bytes:
                raise Finding(f"allocated gives {start} to {stop} after {reached}, of {image.size_bytes}")
            last = (max(reached, start - WINDOW), min(stop, start + WINDOW), start)
            if len(spots) < SPOTS:
                spots.append(last)
            reached = stop
        for first, end, start in (*spots, last):
            _read_spot(image, first, end, start)
        _read_spot(image, max(reached, image.size_bytes - WINDOW), image.size_bytes, image.size_bytes)
        try:
            image.read_into(image.size_bytes, bytearray(1))
        except ImageError:
            return "read"
        raise Finding("a byte behind the disk's end was read")


def _read_spot(image: images.Image, first: int, end: int, start: int) -> None:
    """Bytes [first, end), of which those before `start` are not allocated. ImageError: they cannot be read."""
    whole, parts = bytearray(end - first), bytearray(end - first)
    image.read_into(first, whole)
    middle = len(parts) // 3
    image.read_into(first, memoryview(parts)[:middle])
    image.read_into(first + middle, memoryview(parts)[middle:])
    if whole != parts:
        raise Finding(f"{end - first} bytes at {first} differ between one read and two")
    if any(whole[: start - first]):
        raise Finding(f"bytes from {first} to {start} are not allocated, and not zero")
