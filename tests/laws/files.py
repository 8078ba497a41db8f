"""Delta files in memory: the bytes that a sender makes of a delta, and a file that holds them."""

from __future__ import annotations

from pathlib import Path
from typing import cast
from uuid import UUID

from replica.delta import DataKey, DeltaFileReader, DeltaSealer, MemoryDelta, MemoryKeys, SegmentEntry
from replica.delta.header import HEADER_BYTES
from replica.durable import File
from replica.model import KeyId

KEY = DataKey(KeyId(UUID(int=7)), bytes(range(32)))
KEYS = MemoryKeys(KEY)


class MemoryFile:
    """The part of `durable.File` that a reader uses."""

    path = Path("memory")

    def __init__(self, data: bytes) -> None:
        self._data = data

    def size(self) -> int:
        return len(self._data)

    def read(self, offset: int, length: int) -> bytes:
        return self._data[offset : offset + length]

    def read_into(self, offset: int, buffer: memoryview) -> int:
        data = self.read(offset, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        pass


def encode(delta: MemoryDelta, order: list[int] | None = None, key: DataKey = KEY) -> bytes:
    """The file; `order` is the file order of the segments by number."""
    sealer = DeltaSealer(key, delta.base.replica_id, delta.delta_id, delta.result.epoch)
    sealed = [sealer.seal(segment) for segment in delta.segments()]
    entries: dict[int, SegmentEntry] = {}
    body = bytearray()
    for number in order or range(len(sealed)):
        entries[number] = SegmentEntry.of(sealed[number], HEADER_BYTES + len(body))
        body += sealed[number].blob
    tail = sealer.tail([entries[n] for n in range(len(sealed))], delta.base, delta.result, lost=delta.marks_lost)
    return sealer.header + bytes(body) + tail


def open_file(data: bytes, keys: MemoryKeys = KEYS) -> DeltaFileReader:
    return DeltaFileReader(cast(File, MemoryFile(data)), keys)


def reader_of(delta: MemoryDelta) -> DeltaFileReader:
    return open_file(encode(delta))
