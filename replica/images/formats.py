"""The formats: what opens and what makes an image, by the given format, else by the name.

A format is one entry of `FORMATS`, and everything that names formats (the
configuration, the command line, errors, `probe`) takes them from there. The
modules of VHD, VHDX, NBD and of what qemu reads are imported when an image of
theirs is met.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from uuid import UUID

from replica.durable import FileSystem
from replica.errors import ImageError
from replica.images.facts import DiskImage
from replica.images.flat import FlatFormat, FlatImage
from replica.images.image import ImageWriter
from replica.images.nbd_uri import is_uri
from replica.images.raw import RawImage
from replica.images.source import Source, image_errors
from replica.model import random_id

Opener = Callable[[FileSystem, Path, Sequence[Path]], DiskImage]
"""File system, image, folders that parents may lie in besides the image's own."""
Creator = Callable[[FileSystem, Path, int, UUID], ImageWriter]
"""File system, path, size of the disk, its id."""
Sign = tuple[int, bytes]
"""An offset (negative: from the end) and what stands there in an image of that format."""


@dataclass(frozen=True)
class Format:
    """One format. `create` has an entry per subformat, the usual one first; `signs` in the order of their weight.

    Without an entry in `create` it is only read.
    """

    open: Opener
    create: Mapping[str, Creator]
    extensions: tuple[str, ...]
    signs: tuple[Sign, ...] = field(default=())


def _flat(format: FlatFormat) -> Creator:
    return lambda fs, path, size_bytes, unique_id: FlatImage.create(fs, path, format, size_bytes, unique_id)


def _open_vhd(fs: FileSystem, path: Path, parents: Sequence[Path]) -> DiskImage:
    from replica.images.vhd import VhdImage

    return VhdImage.open(fs, path, parents)


def _open_vhdx(fs: FileSystem, path: Path, parents: Sequence[Path]) -> DiskImage:
    from replica.images.vhdx import VhdxImage

    return VhdxImage.open(fs, path, parents)


def _dynamic_vhd(fs: FileSystem, path: Path, size_bytes: int, unique_id: UUID) -> ImageWriter:
    from replica.images.vhd_write import VhdWriter

    return VhdWriter.create(fs, path, size_bytes, unique_id)


def _vhdx(*, fixed: bool) -> Creator:
    def create(fs: FileSystem, path: Path, size_bytes: int, unique_id: UUID) -> ImageWriter:
        from replica.images.vhdx_write import VhdxWriter

        return VhdxWriter.create(fs, path, size_bytes, unique_id, fixed=fixed)

    return create


def _on_device(fs: FileSystem, path: Path, size_bytes: int, _: UUID) -> ImageWriter:
    from replica.images.device import create_on_device

    return create_on_device(fs, path, size_bytes)


def _open_nbd(fs: FileSystem, path: Path, parents: Sequence[Path]) -> DiskImage:
    from replica.images.nbd import NbdImage

    return NbdImage.open(fs, path, parents)


def _nbd_export(_: FileSystem, path: Path, size_bytes: int, __: UUID) -> ImageWriter:
    from replica.images.in_place import InPlaceWriter
    from replica.images.nbd_write import NbdTarget

    return InPlaceWriter(NbdTarget(path), size_bytes)


def _by_qemu(format: str) -> Opener:
    def open(fs: FileSystem, path: Path, parents: Sequence[Path]) -> DiskImage:
        from replica.images.qemu import QemuImage

        return QemuImage.open_as(format, fs, path, parents)

    return open


FORMATS: Final[dict[str, Format]] = {
    "raw": Format(
        RawImage.open,
        {"fixed": _flat("raw"), "device": _on_device},
        (".raw", ".img"),
    ),
    "vhd": Format(
        _open_vhd,
        {"dynamic": _dynamic_vhd, "fixed": _flat("vhd")},
        (".vhd", ".avhd"),
        ((-512, b"conectix"), (-511, b"conectix"), (0, b"conectix")),
    ),
    "vhdx": Format(
        _open_vhdx,
        {"dynamic": _vhdx(fixed=False), "fixed": _vhdx(fixed=True)},
        (".vhdx", ".avhdx"),
        ((0, b"vhdxfile"),),
    ),
    "nbd": Format(_open_nbd, {"export": _nbd_export}, ()),
    "qcow2": Format(_by_qemu("qcow2"), {}, (".qcow2",), ((0, b"QFI\xfb"),)),
    "vmdk": Format(_by_qemu("vmdk"), {}, (".vmdk",), ((0, b"KDMV"), (0, b"# Disk DescriptorFile"))),
    "vdi": Format(_by_qemu("vdi"), {}, (".vdi",), ((64, b"\x7f\x10\xda\xbe"),)),
    "parallels": Format(_by_qemu("parallels"), {}, (".hds",), ((0, b"WithoutFreeSpace"), (0, b"WithouFreSpacExt"))),
}
"""The words of `format =`, and what they mean."""

_EXTENSIONS = {extension: name for name, format in FORMATS.items() for extension in format.extensions}
_WRITABLE = " or ".join(name for name, format in FORMATS.items() if format.create)
_CHOICE = " or ".join(f'format = "{name}"' for name in FORMATS)


def format_of(path: Path, format: str | None = None) -> str:
    """The format `path` is to be read in. ImageError if nothing says which.

    The given format counts, else a URI is NBD and a block device raw, else the
    extension (in any case of letters) decides. The content is not looked at.
    """
    if format is not None:
        if format not in FORMATS:
            raise ImageError(f"image {path}: the format {format!r} is not known", hint=f"set {_CHOICE}")
        return format
    if is_uri(path):
        return "nbd"
    with image_errors(path):
        if path.is_block_device():
            return "raw"
        if path.exists() and not path.is_file():
            kind = "a directory" if path.is_dir() else "neither a file nor a block device"
            raise ImageError(f"image {path} is {kind}", hint="name the image file itself in the configuration")
    extension = path.suffix.lower()
    if extension in _EXTENSIONS:
        return _EXTENSIONS[extension]
    raise ImageError(f"image {path}: its name does not say its format", hint=f"set {_CHOICE} for this disk")


def open(
    path: Path, format: str | None = None, *, fs: FileSystem | None = None, parents: Sequence[Path] = ()
) -> DiskImage:
    """Open an image, and all its parents, for reading.

    `parents`: folders, besides the image's own, that parents of a differencing image may lie in.

    ImageError: not there, unreadable, not of its format, or without its parents.
    """
    name, fs = format_of(path, format), fs or FileSystem()
    try:
        return FORMATS[name].open(fs, path, parents)
    except ImageError as error:
        looks = probe(path, fs=fs)
        if looks is None or looks == name:
            raise
        raise ImageError(f"{error.message} (its content looks like {looks})", hint=error.hint) from error


def create(
    path: Path,
    format: str,
    size_bytes: int,
    *,
    subformat: str | None = None,
    unique_id: UUID | None = None,
    fs: FileSystem | None = None,
) -> ImageWriter:
    """A new image of zeros, to be filled; it must not exist, and is whole once it is synced.

    One that is overwritten `in_place` must exist.

    ImageError for a format or subformat that is not known, or that has no disk of that size; StorageError.
    """
    if format not in FORMATS:
        raise ImageError(f"image {path}: the format {format!r} is not known", hint=f"choose {_WRITABLE}")
    creators = FORMATS[format].create
    if not creators:
        raise ImageError(f"image {path}: {format} images are only read", hint=f"choose {_WRITABLE}")
    if subformat is None and format == "raw" and in_place(path, format):
        subformat = "device"
    maker = creators.get(subformat or next(iter(creators)))
    if maker is None:
        raise ImageError(
            f"image {path}: {format} has no subformat {subformat!r}", hint=f"choose {' or '.join(creators)}"
        )
    return maker(fs or FileSystem(), path, size_bytes, unique_id or random_id())


def in_place(path: Path, format: str) -> bool:
    """Whether an image made there overwrites what is there already: an NBD export, a block device."""
    return format == "nbd" or (format == "raw" and path.is_block_device())


def probe(path: Path, *, fs: FileSystem | None = None) -> str | None:
    """What the content looks like, a name of `FORMATS`; None: nothing known, as a raw disk.

    Advisory: for people to read. Whoever wrote the content, a guest say, chose what it looks like, so it never
    decides how an image is read. None also where the file cannot be read.
    """
    signs = [(name, *sign) for name, format in FORMATS.items() for sign in format.signs]
    with suppress(ImageError):
        source = Source.open(fs or FileSystem(), path)
        try:
            for name, offset, sign in signs:
                place = offset if offset >= 0 else source.size_bytes + offset
                if 0 <= place <= source.size_bytes - len(sign) and source.read(place, len(sign)) == sign:
                    return name
        finally:
            source.close()
    return None
