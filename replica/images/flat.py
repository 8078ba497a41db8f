"""The flat image: what a head is kept in and what a restore writes, raw or fixed VHD.

Byte n of the file is byte n of the disk, in both formats; a fixed VHD (section
"Fixed Hard Disk Image" of the specification) has a footer of 512 bytes behind
it. So the file is complete and valid as it lies there, for any hypervisor, and
zero ranges are holes.

A VHD counts whole sectors. A disk that does not fill its last sector is padded
with zeros in the file, and the footer says the padded size; `size_bytes` here
stays the exact size, which the caller keeps and hands in at `open`.

The footer names `win ` as its creator, so that Hyper-V and qemu both take the
current size and not the rounded geometry, and carries the disk's UUID as its
unique id, so that it stays the same disk when its size changes.

A crash can leave the file with the size, or without the footer, of another
moment. With `size_bytes` given, opening accepts that: bytes the file does not
have read as zeros, nothing is written, and the next `sync` or `resize` lays the
file out anew. What is inside min(old, new) size is never touched by it.
`layout_problem` says what a file lacks.

    with FlatImage.create(fs, path, "vhd", size_bytes, disk.id) as image:
        image.write(4096, data)
        image.sync()
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self
from uuid import UUID

from replica.durable import File, FileSystem
from replica.errors import ImageError
from replica.images import vhd_format as vhd
from replica.images.image import ImageFile, check_range, coalesce, writable_bytes
from replica.model import MAX_DISK_BYTES, SECTOR_BYTES, random_id

if TYPE_CHECKING:
    from typing_extensions import Buffer

FlatFormat = Literal["raw", "vhd"]
EXTENSIONS: dict[FlatFormat, str] = {"raw": ".raw", "vhd": ".vhd"}
"""What a restored disk's file name ends in."""


class FlatImage:
    """Positioned reads and writes; thread-safe but for `resize`, `sync` and `close`, which one thread calls.

    An `Image`, so that a head or a restored disk can be a source too. Failures
    of the file system are `StorageError`: the file is the engine's own.
    """

    sector_bytes = SECTOR_BYTES

    def __init__(self, file: File, format: FlatFormat, size_bytes: int, unique_id: UUID) -> None:
        _check_size(file.path, format, size_bytes)
        self._file = file
        self.path: Path = file.path
        self.format: FlatFormat = format
        self.size_bytes = size_bytes
        self.unique_id = unique_id

    @classmethod
    def create(cls, fs: FileSystem, path: Path, format: FlatFormat, size_bytes: int, unique_id: UUID) -> FlatImage:
        """A new file of zeros (all hole); it must not exist. Durable after `sync` and the directory's sync."""
        _check_size(path, format, size_bytes)
        image = cls(fs.create(path), format, size_bytes, unique_id)
        try:
            image._lay_out()
        except BaseException:
            image.close()
            raise
        return image

    @classmethod
    def open(
        cls,
        fs: FileSystem,
        path: Path,
        format: FlatFormat,
        *,
        size_bytes: int | None = None,
        unique_id: UUID | None = None,
        write: bool = False,
    ) -> FlatImage:
        """Open an existing file.

        Without `size_bytes` the file must be whole and says the size itself
        (the padded one, for `vhd`); ImageError otherwise. Without `unique_id`
        the footer's is kept, or a new one made where there is none.
        """
        file = fs.open(path, write=write)
        try:
            footer = _read_footer(file) if format == "vhd" else None
            if size_bytes is None:
                size_bytes = _size_of(file, format, footer)
            return cls(file, format, size_bytes, unique_id or (footer.unique_id if footer else random_id()))
        except BaseException:
            file.close()
            raise

    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill all of `buffer`; zeros where the file has a hole or ends too early. ImageError past the disk's end."""
        target = writable_bytes(buffer)
        check_range(self.path, offset, len(target), self.size_bytes)
        count = self._file.read_into(offset, target.data)
        target[count:] = 0

    def read_ranges(self, ranges: Sequence[tuple[int, int]], buffer: Buffer) -> None:
        """Fill `buffer` with the ranges (offset, length), ascending, one behind the other; ImageError past the end."""
        self._check_ranges(ranges)
        self._file.read_ranges(ranges, buffer)

    def read_from_device(self) -> None:
        """See `File.read_from_device`."""
        self._file.read_from_device()

    def read_ahead(self, offset: int, length: int) -> None:
        """See `File.read_ahead`."""
        self._file.read_ahead(offset, length)

    def write_to_device(self) -> None:
        """See `File.write_to_device`."""
        self._file.write_to_device()

    def start_writing(self, offset: int, length: int) -> None:
        """See `File.start_writing`."""
        self._file.start_writing(offset, length)

    def clone_from(self, source: FlatImage) -> bool:
        """Hold what the file of `source` holds, sharing its blocks (`File.clone_from`); False: nothing is changed.

        That is so where the formats differ or the file system cannot do it. `sync` sets size and footer right.
        """
        return source.format == self.format and self._file.clone_from(source._file)

    def clear(self) -> None:
        """All zeros, all hole again."""
        self._lay_out()

    def write_ranges(self, ranges: Sequence[tuple[int, int]], data: Buffer) -> None:
        """Write `data` to the ranges (offset, length), ascending, one behind the other; ImageError past the end."""
        self._check_ranges(ranges)
        self._file.write_ranges(ranges, data)
        if ranges:
            first, (last, length) = ranges[0][0], ranges[-1]
            self._file.start_writing(first, last + length - first)

    def _check_ranges(self, ranges: Sequence[tuple[int, int]]) -> None:
        if ranges:
            first, (last, length) = ranges[0][0], ranges[-1]
            check_range(self.path, first, last + length - first, self.size_bytes)

    def write(self, offset: int, data: Buffer) -> None:
        """Write all of `data`. ImageError past the disk's end; padding and footer cannot be reached."""
        view = memoryview(data).cast("B")
        check_range(self.path, offset, len(view), self.size_bytes)
        self._file.write(offset, view)

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeros, as a hole. ImageError past the disk's end."""
        check_range(self.path, offset, length, self.size_bytes)
        self._file.zero(offset, length)

    def resize(self, size_bytes: int) -> None:
        """Set the disk's size; all bytes from min(old, new) on read as zeros, the old footer's place included.

        Repeating it after a failure or a crash in the middle gives the same file.
        """
        _check_size(self.path, self.format, size_bytes)
        before, self.size_bytes = self.size_bytes, size_bytes
        try:
            self._lay_out(min(before, size_bytes))
        except BaseException:
            self.size_bytes = before
            raise

    def data_runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """(offset, length) of what is no hole in [start, stop), as `File.data_runs` has it."""
        return self._file.data_runs(max(start, 0), min(stop, self.size_bytes))

    def allocated(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Half-open ranges (start, stop) that are no hole, as `Image.allocated` has it."""
        return coalesce((offset, offset + length) for offset, length in self.data_runs(start, stop))

    def layout_problem(self) -> str | None:
        """What is wrong with the file's size or footer, in words; None when all is as it should be."""
        size = self._file.size()
        if size != self._file_bytes:
            return f"the file has {size} bytes instead of {self._file_bytes}"
        if self.format == "vhd" and self._file.read(self._data_bytes, vhd.FOOTER_BYTES) != self._footer():
            return "the VHD footer at the end of the file is not the one that belongs there"
        return None

    def sync(self) -> None:
        """Content, size and footer are right and on stable storage when this returns."""
        if self.layout_problem() is not None:
            self._lay_out(self.size_bytes)
        self._file.sync()

    def drop_cache(self, offset: int = 0, length: int = 0) -> None:
        """Let clean pages go, so that the next read comes from the device; length 0 means to the end."""
        self._file.drop_cache(offset, length)

    @property
    def files(self) -> tuple[ImageFile, ...]:
        info = self._file.stat()
        return (ImageFile(self.path, info.st_dev, info.st_ino),)

    def has_name(self) -> bool:
        """Whether its file is still the one with its name (`File.has_name`)."""
        return self._file.has_name()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def _data_bytes(self) -> int:
        return _padded(self.size_bytes) if self.format == "vhd" else self.size_bytes

    @property
    def _file_bytes(self) -> int:
        return self._data_bytes + (vhd.FOOTER_BYTES if self.format == "vhd" else 0)

    def _footer(self) -> bytes:
        return vhd.Footer.new(vhd.DiskType.FIXED, self._data_bytes, self.unique_id).encode()

    def _lay_out(self, kept: int = 0) -> None:
        """Keep the first `kept` bytes, zeros (a hole) up to the size, padding, footer.

        Cutting off before growing is what turns an old footer, its padding and
        anything a crash left behind into zeros.
        """
        self._file.truncate(kept)
        self._file.truncate(self._file_bytes)
        if self.format == "vhd":
            self._file.write(self._data_bytes, self._footer())


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // SECTOR_BYTES) * SECTOR_BYTES


def _check_size(path: Path, format: FlatFormat, size_bytes: int) -> None:
    limit = vhd.MAX_VHD_BYTES if format == "vhd" else MAX_DISK_BYTES
    if not 0 <= size_bytes <= limit:
        hint = 'use the raw format for it (head = "raw")' if 0 <= size_bytes <= MAX_DISK_BYTES else ""
        raise ImageError(f"{path}: {size_bytes} bytes do not fit a {format} image of at most {limit}", hint=hint)


def _read_footer(file: File) -> vhd.Footer | None:
    """The fixed VHD's footer at the end of the file, if there is a valid one."""
    try:
        footer = vhd.Footer.decode(file.read(max(0, file.size() - vhd.FOOTER_BYTES), vhd.FOOTER_BYTES))
    except ValueError:
        return None
    return footer if footer.disk_type == vhd.DiskType.FIXED else None


def _size_of(file: File, format: FlatFormat, footer: vhd.Footer | None) -> int:
    """The size a whole file says it has."""
    if format == "raw":
        return file.size()
    if footer is None or footer.current_size_bytes != file.size() - vhd.FOOTER_BYTES:
        raise ImageError(f"{file.path} is no whole fixed VHD: there is no footer at its end that fits its size")
    return footer.current_size_bytes
