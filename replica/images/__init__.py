"""Disk images: one `Image` protocol, one module per format.

    with images.open(Path("web-1.vhd")) as image:
        for start, stop in image.allocated(0, image.size_bytes):
            ...

The format is what the caller says, else what the file's name says; never what
the content looks like, because a guest writes the content.

Each name is imported when it is first asked for: a process pays only for the formats it meets.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from replica.images.converting import convert
    from replica.images.copying import copy_disk
    from replica.images.facts import DiskImage, FileFacts
    from replica.images.flat import EXTENSIONS, FlatFormat, FlatImage
    from replica.images.formats import FORMATS, create, format_of, open, probe
    from replica.images.image import Image, ImageFile, ImageWriter, ParentLink
    from replica.images.inspecting import ImageInfo, describe, image_info, read_through
    from replica.images.nbd import NbdImage
    from replica.images.nbd_uri import is_uri, location
    from replica.images.qemu import QemuImage
    from replica.images.raw import RawImage

__all__ = [
    "EXTENSIONS",
    "FORMATS",
    "DiskImage",
    "FileFacts",
    "FlatFormat",
    "FlatImage",
    "Image",
    "ImageFile",
    "ImageInfo",
    "ImageWriter",
    "NbdImage",
    "ParentLink",
    "QemuImage",
    "RawImage",
    "convert",
    "copy_disk",
    "create",
    "describe",
    "format_of",
    "image_info",
    "is_uri",
    "location",
    "open",
    "probe",
    "read_through",
]

_MODULES = {
    "DiskImage": "facts",
    "EXTENSIONS": "flat",
    "FORMATS": "formats",
    "FileFacts": "facts",
    "FlatFormat": "flat",
    "FlatImage": "flat",
    "Image": "image",
    "ImageFile": "image",
    "ImageInfo": "inspecting",
    "ImageWriter": "image",
    "NbdImage": "nbd",
    "ParentLink": "image",
    "QemuImage": "qemu",
    "RawImage": "raw",
    "convert": "converting",
    "copy_disk": "copying",
    "create": "formats",
    "describe": "inspecting",
    "format_of": "formats",
    "image_info": "inspecting",
    "is_uri": "nbd_uri",
    "location": "nbd_uri",
    "open": "formats",
    "probe": "formats",
    "read_through": "inspecting",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value
