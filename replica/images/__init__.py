"""Disk images: one `Image` protocol, one module per format.

    with images.open(Path("web-1.vhd")) as image:
        for start, stop in image.allocated(0, image.size_bytes):
            ...

The format is what the caller says, else what the file's name says; never what
the content looks like, because a guest writes the content.
"""

from replica.images.flat import EXTENSIONS, FlatFormat, FlatImage
from replica.images.formats import FORMATS, format_of, open
from replica.images.image import Image
from replica.images.raw import RawImage
from replica.images.vhd import VhdImage

__all__ = ["EXTENSIONS", "FORMATS", "FlatFormat", "FlatImage", "Image", "RawImage", "VhdImage", "format_of", "open"]
