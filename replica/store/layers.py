"""The inverses that a reader needs, opened when they are asked and with few files open at a time.

A point may lie behind more inverses than a process may open files. What was
read of a file once (header, keys, manifest) is kept until the reader is closed;
its descriptor is closed when OPEN_FILES others were used since, and the file is
opened again by its name. A name may belong to another file by then (thinning
puts a composed inverse in the place of an older one), so the header with its
random salt must be the one that was there before, and on the first opening the
states must be those that the chain was found with. Otherwise `MovedError`: the
reader looks for the way to the head anew.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

from replica.delta import DeltaFileReader, DiskChange, Keyring
from replica.delta.change import disk_changes
from replica.delta.header import HEADER_BYTES
from replica.delta.segment import Table
from replica.durable import File, FileSystem
from replica.errors import StorageError
from replica.model import State
from replica.store.points import Link

if TYPE_CHECKING:
    from typing_extensions import Buffer

OPEN_FILES = 64


class MovedError(Exception):
    """What a reader took for the way to the head is not any more: a commit was rolled back, inverses were composed."""


class LayerFiles:
    """Makes layers, and bounds the descriptors they have open together. Thread-safe."""

    def __init__(self, fs: FileSystem, keyring: Keyring, limit: int = OPEN_FILES) -> None:
        self._fs, self.keyring, self._limit = fs, keyring, limit
        self._lock = threading.Lock()
        self._open: OrderedDict[_InverseFile, tuple[File, int]] = OrderedDict()
        """File and how many threads read it just now."""

    def layer(self, link: Link) -> InverseLayer:
        return InverseLayer(self, link)

    def open(self, link: Link) -> File:
        try:
            return self._fs.open(link.path)
        except StorageError:
            if not self._fs.exists(link.path):
                raise MovedError from None
            raise

    @contextmanager
    def using(self, inverse: _InverseFile) -> Iterator[File]:
        """The open file of an inverse, which stays open inside the block."""
        with self._lock:
            if inverse not in self._open:
                self._open[inverse] = (inverse.reopen(), 0)
            file, users = self._open[inverse]
            self._open[inverse] = (file, users + 1)
            self._open.move_to_end(inverse)
            self._shed()
        try:
            yield file
        finally:
            with self._lock:
                file, users = self._open[inverse]
                self._open[inverse] = (file, users - 1)

    def _shed(self) -> None:
        idle = [inverse for inverse, (_, users) in self._open.items() if users == 0]
        for inverse in idle[: max(0, len(self._open) - self._limit)]:
            self._open.pop(inverse)[0].close()

    def close(self) -> None:
        with self._lock:
            for file, _ in self._open.values():
                file.close()
            self._open.clear()


class _InverseFile(File):
    """A file for `DeltaFileReader` that has a descriptor only while it is read, or was recently."""

    def __init__(self, files: LayerFiles, link: Link) -> None:
        super().__init__(-1, link.path)
        self._files, self._link = files, link
        self._header: bytes | None = None

    def reopen(self) -> File:
        file = self._files.open(self._link)
        try:
            header = file.read(0, HEADER_BYTES)
            if self._header is not None and header != self._header:
                raise MovedError
        except BaseException:
            file.close()
            raise
        self._header = header
        return file

    def size(self) -> int:
        with self._files.using(self) as file:
            return file.size()

    def read_into(self, offset: int, buffer: Buffer) -> int:
        with self._files.using(self) as file:
            return file.read_into(offset, buffer)


class InverseLayer:
    """One inverse as a `Layer`; its file is opened at the first question about extents."""

    def __init__(self, files: LayerFiles, link: Link) -> None:
        self._files, self._link = files, link
        self._lock = threading.Lock()
        self._opened: DeltaFileReader | None = None

    @property
    def base(self) -> State:
        return self._link.base

    @property
    def result(self) -> State:
        return self._link.result

    @cached_property
    def disks(self) -> tuple[DiskChange, ...]:
        return disk_changes(self.base, self.result)

    def overlapping(self, disk: int, first: int, stop: int) -> range:
        return self._reader().overlapping(disk, first, stop)

    def span(self, number: int) -> tuple[int, int]:
        return self._reader().span(number)

    def table(self, number: int) -> Table:
        return self._reader().table(number)

    def chunk(self, table: Table, index: int) -> bytes:
        return self._reader().chunk(table, index)

    def _reader(self) -> DeltaFileReader:
        with self._lock:
            if self._opened is None:
                reader = DeltaFileReader(_InverseFile(self._files, self._link), self._files.keyring)
                if (reader.base, reader.result) != (self.base, self.result):
                    raise MovedError
                self._opened = reader
            return self._opened
