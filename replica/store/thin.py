"""Thinning: the inverses around points that go become one that leads over them.

    q ──► r1 ──► … ──► rm ──► o          q ────────────────────► o
    (the points r1 … rm are to go)       (composed; keeps when o was committed)

Composing reads sealed files and writes a new one; it changes nothing that anybody relies on, so it runs beside commits
and readers, in bounded memory: a segment that is larger than its share of the memory is handed on in slices. What was
written is read back from the device and opened to the last chunk before it replaces anything.

Replacing is a step of its own, short, and each arrow a durability barrier:

    temporary file, synced and read back   ->  its name   ->  rm → o removed   ->  …   ->  q → r1 removed

In steps of a few removals (see `rotation`), since a commit waits for one of them at most. The composed file gets a name
that nothing had before. So all states stay reachable until they are removed one by one, from the one farthest from the
head; whatever is cut, what is left over is *spare* (`points`), never a stray, and a later step removes it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np

from replica.delta import (
    DATA,
    DeltaFileReader,
    DeltaWriter,
    DiskChange,
    Keyring,
    Rows,
    Segment,
    Table,
    compose_segments,
)
from replica.delta.extents import clip, count_data, stop_of
from replica.durable import FileSystem
from replica.errors import BusyError, FormatError, StorageError
from replica.model import DeltaId, State, random_id
from replica.store.layout import Layout
from replica.store.points import Link

FAN_IN = 256
"""Inverses composed at a time: each is an open file and a slice in memory."""
MEMORY_BYTES = 64 << 20
LEAST_SLICE_BYTES = 128 << 10


def compose_links(
    fs: FileSystem, layout: Layout, keyring: Keyring, links: Sequence[Link], stopping: Callable[[], bool]
) -> Path:
    """Compose inverses, nearest the head first, into a temporary file: complete, synced and read back.

    Raises DamageError (one of them cannot be read), StorageError, BusyError (`stopping` said so); no file is left then.
    """
    composed_id = DeltaId(random_id())
    temporary = layout.points / f".{composed_id}.{os.urandom(4).hex()}.tmp"
    with ExitStack() as opened:
        readers = [opened.enter_context(DeltaFileReader(fs.open(link.path), keyring)) for link in links]
        newest, oldest = readers[0], readers[-1]
        size = max(LEAST_SLICE_BYTES, MEMORY_BYTES // len(readers))
        key = keyring.get(newest.header.key_id)
        epoch = newest.header.epoch
        try:
            with DeltaWriter(fs, temporary, key, newest.header.replica_id, composed_id, epoch) as writer:
                for segment in compose_segments([Sliced(reader, size, stopping) for reader in readers]):
                    writer.add(segment)
                writer.finish(base=newest.base, result=oldest.result, committed=oldest.committed)
            check(fs, keyring, temporary)
        except BaseException:
            with suppress(StorageError):
                fs.unlink(temporary)
            raise
    return temporary


def check(fs: FileSystem, keyring: Keyring, path: Path) -> None:
    """Read a delta file from the device, to the last chunk. DamageError if it is not whole."""
    file = fs.open(path)
    file.drop_cache()
    with DeltaFileReader(file, keyring) as reader:
        reader.verify()


def final_name(layout: Layout, temporary: Path) -> Path:
    """The name that a composed file gets: its own id, which nothing else is called by."""
    return layout.points / temporary.name.split(".")[1]


def another_name(layout: Layout, final: Path) -> Path:
    """A temporary name for what is to get the name `final` once more."""
    return layout.points / f".{final.name}.{os.urandom(4).hex()}.tmp"


class Sliced:
    """A delta file whose segments come in slices of at most `size_bytes` of payload (or one grain).

    Before each slice `stopping` is asked: BusyError if it says so, and it may take its time to say no.
    """

    def __init__(self, reader: DeltaFileReader, size_bytes: int, stopping: Callable[[], bool] = lambda: False) -> None:
        self._reader = reader
        self._size_bytes = size_bytes
        self._stopping = stopping
        self.delta_id = reader.delta_id
        self.base: State = reader.base
        self.result: State = reader.result
        self.disks: tuple[DiskChange, ...] = reader.disks
        self.marks_lost: bool = reader.marks_lost

    def extents(self) -> Iterator[tuple[int, Rows]]:
        return self._reader.extents()

    def segments(self) -> Iterator[Segment]:
        for number in range(len(self._reader)):
            table = self._reader.table(number)
            grain_bytes = self.disks[table.disk].grain_bytes
            if table.payload_bytes != count_data(table.extents) * grain_bytes:
                raise FormatError(f"segment {number} of {self._reader.name} has not the payload its extents need")
            yield from self._slices(table, grain_bytes)

    def _slices(self, table: Table, grain_bytes: int) -> Iterator[Segment]:
        rows = table.extents
        most = max(1, self._size_bytes // grain_bytes)
        ends = np.cumsum(np.where(rows["data"] == DATA, rows["count"], 0).astype(np.int64))
        start, stop = int(rows["first"][0]), stop_of(rows)
        payload = _Payload(self._reader, table)
        for limit in range(most, int(ends[-1]) + most, most) if ends[-1] else (0,):
            if self._stopping():
                raise BusyError("the replica is being closed")
            end = stop
            if limit < ends[-1]:
                row = int(np.searchsorted(ends, limit))
                end = int(rows["first"][row] + rows["count"][row]) - int(ends[row] - limit)
            part, skipped, count = clip(rows, start, end)
            yield Segment(table.disk, part, payload.read(skipped * grain_bytes, (skipped + count) * grain_bytes))
            start = end


class _Payload:
    """A segment's payload, front to back; one opened chunk is remembered."""

    def __init__(self, reader: DeltaFileReader, table: Table) -> None:
        self._reader = reader
        self._table = table
        self._open = (-1, b"")

    def read(self, start: int, stop: int) -> bytes:
        starts = self._table.raw_starts
        parts = []
        while start < stop:
            index = int(np.searchsorted(starts, start, "right")) - 1
            if self._open[0] != index:
                self._open = (index, self._reader.chunk(self._table, index))
            begin = int(starts[index])
            part = self._open[1][start - begin : stop - begin]
            parts.append(part)
            start += len(part)
        return b"".join(parts)


__all__ = ["FAN_IN", "Sliced", "another_name", "check", "compose_links", "final_name"]
