"""Raw: byte n of the file or block device is byte n of the disk. No structure, so nothing can be wrong with it.

Holes of a sparse file are not allocated and are never read. A block device
says nothing about its zeros: all of it counts as allocated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from replica.durable import FileSystem
from replica.errors import ImageError
from replica.images.facts import FileFacts
from replica.images.image import check_range
from replica.images.source import Source
from replica.model import MAX_DISK_BYTES

if TYPE_CHECKING:
    from typing_extensions import Buffer


class RawImage:
    """A raw file (any size in bytes, sectors of 512) or a block device (its own sector size). Thread-safe."""

    format = "raw"

    def __init__(self, source: Source) -> None:
        if source.size_bytes > MAX_DISK_BYTES:
            raise ImageError(f"image {source.path} has {source.size_bytes} bytes, more than {MAX_DISK_BYTES} (64 TiB)")
        self._source = source
        self.path: Path = source.path
        self.size_bytes = source.size_bytes
        self.sector_bytes = source.sector_bytes
        self.files = (source.file,)

    @classmethod
    def open(cls, fs: FileSystem, path: Path, parents: Sequence[Path] = ()) -> RawImage:
        """A raw image has no parents."""
        source = Source.open(fs, path)
        try:
            return cls(source)
        except ImageError:
            source.close()
            raise

    def allocated(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        return self._source.data_runs(max(start, 0), min(stop, self.size_bytes))

    def read_into(self, offset: int, buffer: Buffer) -> None:
        check_range(self.path, offset, memoryview(buffer).nbytes, self.size_bytes)
        self._source.read_into(offset, buffer)

    def facts(self) -> tuple[FileFacts, ...]:
        kind = "device" if self._source.device else "fixed"
        return (FileFacts(path=str(self.path), subformat=kind, size_bytes=self.size_bytes),)

    def close(self) -> None:
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
