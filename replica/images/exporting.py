"""What a disk can leave as: formats, their kinds, and how a file of a chain is made on top of the one before.

    form = ExportFormat.of("vhdx")
    with form.create(fs, path, disk) as image: ...
    with form.create_child(fs, path, disk, Written(image, final)) as child: ...

A child says who its parent is by the name that the parent will have, in the same folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from replica.durable import FileSystem
from replica.errors import ImageError
from replica.images.flat import FlatImage
from replica.images.image import ImageWriter, ParentLink
from replica.model import Disk, random_id

if TYPE_CHECKING:
    from replica.images.facts import DiskImage
    from replica.images.source import Source

SUBFORMATS: Final[dict[str, tuple[str, ...]]] = {
    "raw": ("fixed",),
    "vhd": ("fixed", "dynamic"),
    "vhdx": ("dynamic", "fixed"),
    "qcow2": ("dynamic",),
}
"""By format, the usual one first."""
CHAINS: Final = ("vhd", "vhdx", "qcow2")
"""Formats whose files may have parents."""


class Written(NamedTuple):
    """A file of a chain: written, synced, and not yet published under its name."""

    image: ImageWriter
    final: Path


@dataclass(frozen=True)
class ExportFormat:
    """A format and its kind; `of` has checked them."""

    format: str
    subformat: str

    @classmethod
    def of(cls, format: str, subformat: str | None = None, *, chain: bool = False) -> ExportFormat:
        """ImageError: not known, with no such kind, not able to be a `chain`, or without the program it needs."""
        if format not in SUBFORMATS or (chain and format not in CHAINS):
            what = "is not known" if format not in SUBFORMATS else "has no parents, so its files make no chain"
            raise ImageError(
                f"the format {format!r} {what}", hint=f"choose {' or '.join(CHAINS if chain else SUBFORMATS)}"
            )
        kinds = SUBFORMATS[format]
        if subformat not in (None, *kinds):
            raise ImageError(f"{format} has no subformat {subformat!r}", hint=f"choose {' or '.join(kinds)}")
        if format == "qcow2":
            from replica.images.qcow import require_qemu

            require_qemu()
        return cls(format, subformat or kinds[0])

    @property
    def extension(self) -> str:
        return f".{self.format}"

    def create(self, fs: FileSystem, path: Path, disk: Disk) -> ImageWriter:
        """A new image for the disk. ImageError: the format has no disk of that size. StorageError."""
        fixed = self.subformat == "fixed"
        if self.format == "qcow2":
            from replica.images.qcow import Qcow2Writer

            return Qcow2Writer.create(fs, path, disk.size_bytes, disk.id)
        if self.format == "vhdx":
            from replica.images.vhdx_write import VhdxWriter

            return VhdxWriter.create(fs, path, disk.size_bytes, disk.id, fixed=fixed, sector_bytes=disk.sector_bytes)
        if fixed:
            return FlatImage.create(fs, path, "vhd" if self.format == "vhd" else "raw", disk.size_bytes, disk.id)
        from replica.images.vhd_write import VhdWriter

        return VhdWriter.create(fs, path, disk.size_bytes, disk.id)

    def create_child(self, fs: FileSystem, path: Path, disk: Disk, parent: Written) -> ImageWriter:
        """A new differencing image on top of what was written before."""
        from replica.images.qcow import Qcow2Writer
        from replica.images.vhd_write import VhdWriter
        from replica.images.vhdx_write import VhdxWriter

        made = parent.image
        if isinstance(made, Qcow2Writer):
            return made.child(path)
        if isinstance(made, VhdxWriter):
            link = ParentLink(parent.final, made.data_write_id)
            return VhdxWriter.create(fs, path, disk.size_bytes, disk.id, sector_bytes=disk.sector_bytes, parent=link)
        assert isinstance(made, VhdWriter | FlatImage)
        link = ParentLink(parent.final, made.unique_id, fs.stat(made.path).st_mtime)
        return VhdWriter.create(fs, path, disk.size_bytes, random_id(), parent=link)

    def name_parent(self, child: ImageWriter, name: str) -> None:
        """The parent gets its final name now: say so in the child, where that was not yet possible. ImageError."""
        from replica.images.qcow import Qcow2Writer

        if isinstance(child, Qcow2Writer):
            child.name_parent(name)

    def open_chain(self, fs: FileSystem, files: Sequence[Path]) -> DiskImage | None:
        """The files of a chain, the newest first, read as what they are and under whatever names they have.

        None for a format that has no reader here. ImageError.
        """
        from replica.images.source import Source
        from replica.images.vhd import VhdImage, VhdLayer
        from replica.images.vhd_blocks import ChainMemory
        from replica.images.vhdx import VhdxImage, VhdxLayer

        memory = ChainMemory()
        sources: list[Source] = []
        try:
            for path in files if self.format in ("vhd", "vhdx") else ():
                sources.append(Source.open(fs, path))
            if self.format == "vhd":
                vhds = [VhdLayer(source) for source in sources]
                for vhd in vhds:
                    vhd.load(memory)
                return VhdImage(vhds)
            if self.format == "vhdx":
                vhdxs = [VhdxLayer(source, memory) for source in sources]
                for vhdx in vhdxs:
                    vhdx.load(memory)
                return VhdxImage(vhdxs)
        except BaseException:
            for source in sources:
                source.close()
            raise
        return None
