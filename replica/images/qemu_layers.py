"""What images that qemu reads for us need besides themselves, found in their headers before qemu sees them.

A header may name other files: the backing file and the data file of a qcow2 (`docs/interop/qcow2.txt` of
qemu), the extents and the parent of a VMDK (VMware, "Virtual Disk Format 5.0"). Left alone, qemu would
open whatever they name, and guess its format from its content. So a header is read here
first, under the rules of `chain`, and qemu is told every file and every driver:

- a backing file is one that the header names *and* whose format it names, qcow2 or raw, in
  a permitted folder, at the very path that it names: there is no id that would show it is the right one;
- a qcow2 with a data file of its own, one that is encrypted or marked corrupt, is refused;
- a VMDK is one file, and whole: a descriptor of other files is refused, and a snapshot too.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from replica.errors import ImageError
from replica.images.chain import Parent
from replica.images.source import Source

_MAX_HEADER_BYTES: Final = 64 << 10
"""Header and extensions of a qcow2 end with its first cluster, of 64 KiB as a rule and 512 bytes at least."""
_MAX_NAME_BYTES: Final = 1023
_QCOW2: Final = struct.Struct(">4sIQIIQI")
_BACKING_FORMAT: Final = 0xE2792ACA
_CORRUPT, _DATA_FILE = 2, 4
"""Incompatible features of a qcow2."""
_VMDK: Final = struct.Struct("<4sIIQQQQ")
_DESCRIPTOR_BYTES: Final = 20 * 512


@dataclass(frozen=True)
class QemuLayer:
    """One file of a chain that qemu reads."""

    source: Source
    driver: str
    size_bytes: int | None = None
    """Of its disk, where the header was read."""
    parent: Parent[QemuLayer] | None = field(default=None, compare=False)
    parent_driver: str = ""


def qcow2(source: Source) -> QemuLayer:
    """A qcow2 of version 2 or 3."""
    header = source.read(0, min(source.size_bytes, _MAX_HEADER_BYTES))
    if len(header) < 72 or header[:4] != b"QFI\xfb":
        raise ImageError(f"image {source.path} is no qcow2: its header is missing")
    _, version, name_offset, name_bytes, cluster_bits, size, crypt = _QCOW2.unpack(header[: _QCOW2.size])
    if version not in (2, 3) or not 9 <= cluster_bits <= 21 or (version == 3 and len(header) < 104):
        raise ImageError(f"image {source.path} is a qcow2 of version {version} that is not known or damaged")
    features = int.from_bytes(header[72:80], "big") if version == 3 else 0
    if crypt:
        raise ImageError(f"image {source.path} is an encrypted qcow2", hint="let qemu decrypt it: serve it over NBD")
    if features & _DATA_FILE:
        raise ImageError(
            f"image {source.path} keeps its data in another file", hint="convert it: `qemu-img convert -O qcow2`"
        )
    if features & _CORRUPT:
        raise ImageError(f"image {source.path} is marked corrupt", hint="repair it: `qemu-img check -r all`")
    if not name_offset:
        return QemuLayer(source, "qcow2", size)
    if name_bytes > _MAX_NAME_BYTES or name_offset + name_bytes > len(header):
        raise ImageError(f"image {source.path}: the name of its backing file lies outside of its header")
    name = header[name_offset : name_offset + name_bytes].decode(errors="surrogateescape")
    start = int.from_bytes(header[100:104], "big") if version == 3 else 72
    driver = _extension(header[:name_offset], start, _BACKING_FORMAT).decode(errors="replace")
    if driver not in ("qcow2", "raw"):
        raise ImageError(
            f"image {source.path} has the backing file {name!r} of the format {driver!r}, which must be qcow2 or raw",
            hint="say which with `qemu-img rebase -u -b FILE -F FORMAT IMAGE`, or convert it",
        )
    return QemuLayer(source, "qcow2", size, Parent((name,), lambda _: "", exact=True), driver)


def _extension(header: bytes, place: int, wanted: int) -> bytes:
    """A header extension's content; empty if it is not there."""
    while place + 8 <= len(header):
        kind, length = struct.unpack_from(">II", header, place)
        if kind == 0 or place + 8 + length > len(header):
            break
        if kind == wanted:
            return header[place + 8 : place + 8 + length]
        place += 8 + -(-length // 8) * 8
    return b""


def vmdk(source: Source) -> QemuLayer:
    """A VMDK that is one file: monolithic sparse or stream optimized."""
    start = source.read(0, min(source.size_bytes, _VMDK.size))
    if start[:4] in (b"# Di", b"COWD") or len(start) < _VMDK.size or start[:4] != b"KDMV":
        raise ImageError(
            f"image {source.path} is no VMDK that is one file",
            hint='name the "-flat.vmdk" beside it with format = "raw", or convert it to a monolithic one',
        )
    _, _, _, capacity, _, offset, _ = _VMDK.unpack(start)
    if not capacity:
        raise ImageError(f"image {source.path} describes other files", hint="convert it to a monolithic VMDK")
    place = offset * 512
    if offset and place < source.size_bytes:
        text = source.read(place, min(_DESCRIPTOR_BYTES, source.size_bytes - place)).partition(b"\0")[0]
        if b"parentFileNameHint" in text or re.search(rb"parentCID\s*=\s*(?!f{8}\b)\w", text, re.IGNORECASE):
            raise ImageError(f"image {source.path} is a snapshot of another one", hint="merge it with its parent first")
    return QemuLayer(source, "vmdk", capacity * 512)


def alone(driver: str) -> Callable[[Source], QemuLayer]:
    """A format whose header names no other file, or whose driver refuses one that does."""
    return lambda source: QemuLayer(source, driver)


LAYERS: Final[Mapping[str, Callable[[Source], QemuLayer]]] = {
    "qcow2": qcow2,
    "raw": alone("raw"),
    "vmdk": vmdk,
    "vdi": alone("vdi"),
    "parallels": alone("parallels"),
}
"""By qemu's name of the driver."""


class LayerOpener:
    """Opens the layers of one chain, in their order: the first in the given format, each next as its child says."""

    def __init__(self, driver: str) -> None:
        self._driver = driver

    def __call__(self, source: Source) -> QemuLayer:
        layer = LAYERS[self._driver](source)
        self._driver = layer.parent_driver
        return layer
