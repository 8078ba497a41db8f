"""Formats that qemu knows and this project does not: qcow2, VMDK, VDI, Parallels. Read through a qemu-nbd of one's own.

    with QemuImage.open("qcow2", fs, Path("web-1.qcow2")) as image: ...

`files` are the image's own file and its backing files: the very ones that qemu-nbd
reads, open here as long as the image is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from replica.durable import FileSystem
from replica.images.chain import close_all, open_chain
from replica.images.facts import FileFacts
from replica.images.nbd import NbdImage
from replica.images.qemu_layers import LayerOpener, QemuLayer
from replica.images.qemu_server import QemuServer


class QemuImage(NbdImage):
    """An image that qemu reads. Thread-safe. Failures are ImageErrors."""

    def __init__(self, format: str, path: Path, layers: Sequence[QemuLayer], server: QemuServer) -> None:
        super().__init__(path, server.uri, server.connections, files=tuple(layer.source.file for layer in layers))
        self.format = format
        self._layers, self._server = layers, server

    @classmethod
    def open_as(cls, format: str, fs: FileSystem, path: Path, parents: Sequence[Path] = ()) -> Self:
        """Open an image in that format, qemu's name of it, and start its server."""
        layers = open_chain(fs, path, LayerOpener(format), parents)
        try:
            return cls(format, path, layers, QemuServer(path, layers))
        except BaseException:
            close_all(layers)
            raise

    def facts(self) -> tuple[FileFacts, ...]:
        return tuple(
            FileFacts(
                path=str(layer.source.path),
                subformat="differencing" if layer.parent else "fixed" if layer.driver == "raw" else "dynamic",
                size_bytes=layer.size_bytes or (layer.source.size_bytes if number else self.size_bytes),
            )
            for number, layer in enumerate(self._layers)
        )

    def close(self) -> None:
        super().close()
        self._server.close()
        close_all(self._layers)
