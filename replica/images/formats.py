"""Which reader opens which image: by the given format, else by the name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from replica.durable import FileSystem
from replica.errors import ImageError
from replica.images.image import Image
from replica.images.raw import RawImage
from replica.images.source import image_errors
from replica.images.vhd import VhdImage

FORMATS: dict[str, Callable[[FileSystem, Path, Sequence[Path]], Image]] = {"raw": RawImage.open, "vhd": VhdImage.open}
"""The words of `format =`, and what opens such an image."""

_EXTENSIONS = {".raw": "raw", ".img": "raw", ".vhd": "vhd", ".avhd": "vhd"}
_MERGE = "merge it with its parents in the hypervisor (delete the snapshot) and name the whole disk"
_CONVERT = 'convert it to a VHD ("qemu-img convert -O vpc -o force_size=on ...") while the machine is off'
_UNSUPPORTED = {
    ".avhdx": _MERGE,
    ".vhdx": _CONVERT,
    ".qcow2": _CONVERT,
    ".vmdk": _CONVERT,
    ".vdi": _CONVERT,
}
_CHOICE = " or ".join(f'format = "{name}"' for name in FORMATS)


def format_of(path: Path, format: str | None = None) -> str:
    """The format `path` is to be read in. ImageError if nothing says which.

    The given format counts, else a block device is raw, else the extension
    (in any case of letters) decides. The content is not looked at.
    """
    if format is not None:
        if format not in FORMATS:
            raise ImageError(f"image {path}: the format {format!r} is not known", hint=f"set {_CHOICE}")
        return format
    with image_errors(path):
        if path.is_block_device():
            return "raw"
        if path.exists() and not path.is_file():
            kind = "a directory" if path.is_dir() else "neither a file nor a block device"
            raise ImageError(f"image {path} is {kind}", hint="name the image file itself in the configuration")
    extension = path.suffix.lower()
    if extension in _UNSUPPORTED:
        raise ImageError(f"image {path}: {extension} images are not supported yet", hint=_UNSUPPORTED[extension])
    if extension not in _EXTENSIONS:
        raise ImageError(f"image {path}: its name does not say its format", hint=f"set {_CHOICE} for this disk")
    return _EXTENSIONS[extension]


def open(path: Path, format: str | None = None, *, fs: FileSystem | None = None, parents: Sequence[Path] = ()) -> Image:
    """Open an image, and all its parents, for reading.

    `parents`: folders, besides the image's own, that parents of a differencing image may lie in.

    ImageError: not there, unreadable, not of its format, or without its parents.
    """
    return FORMATS[format_of(path, format)](fs or FileSystem(), path, parents)
