"""The log of a VHDX: which updates of its structures were written, and may not be in place yet.

Source: [MS-VHDX] §2.3. The log is a ring of sectors of 4 KiB. An entry is some
descriptor sectors and the data sectors they describe, and may go over the ring's
end to its start:

    entry header, 64 bytes: "loge", CRC-32C of the entry 4, entry length 4, tail 4, sequence 8,
                            count of descriptors 4, reserved 4, log GUID 16, flushed size 8, last offset 8
    descriptors, 32 bytes:  "desc", trailing 4, leading 8, file offset 8, sequence 8
                            "zero", reserved 4, length 8, file offset 8, sequence 8
    data sector, 4 KiB:     "data", high half of the sequence 4, bytes 8 to 4091 of the update, low half 4

The first eight and the last four bytes of an update are in its descriptor.

Which entries count (§2.3.2, §2.3.3): the newest valid entry is the head; its
`tail` says where the oldest entry lies that need not be in place yet; every entry
from there to the head must be valid, and each one's sequence number one higher
than the last. Those are the active sequence. An entry that was torn while it
was written, by the crash that left the log, is not valid and comes last: the
sequence ends before it. An entry that is not valid and has a valid one behind it
was damaged later; what it held is lost, and the file is refused.

Every offset of the log, but for holes of the file, is looked at once and every entry summed once, in pieces;
entries that overlap, as no writer leaves them, are refused once they cost more
than two passes. So time is linear in the log's length, and memory is bounded.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn
from uuid import UUID

import numpy as np

from replica._native import crc32c
from replica.errors import ImageError
from replica.images.source import Source
from replica.images.vhdx_format import REGION_TABLE_OFFSETS, Region

if TYPE_CHECKING:
    from typing import Any

    Rows = np.ndarray[tuple[int], np.dtype[Any]]

SECTOR: Final = 4096
"""Of the log, whatever the disk's sectors are (§2.3.1)."""
MAX_DESCRIPTORS: Final = 1 << 18
"""Most updates that are replayed: a gibibyte of data sectors. The usual log of 1 MiB has room for 2^15."""
MAX_ENTRIES: Final = 1 << 17
"""Most valid entries. The usual log has room for 2^8."""
MAX_FILE_BYTES: Final = 1 << 51
"""No file is longer, whatever an entry says: 32 times the largest disk."""

_ENTRY: Final = struct.Struct("<4sIIIQII16sQQ")
_DESCRIPTOR: Final = np.dtype(
    [("kind", "<u4"), ("trailing", "<u4"), ("leading", "<u8"), ("offset", "<u8"), ("sequence", "<u8")]
)
_DATA_ENDS: Final = np.dtype(
    {"names": ["kind", "high", "low"], "formats": ["<u4"] * 3, "offsets": [0, 4, SECTOR - 4], "itemsize": SECTOR}
)
_ZERO, _DESC, _DATA = (int.from_bytes(word, "little") for word in (b"zero", b"desc", b"data"))
_PIECE_SECTORS: Final = 256
_FIXED_BYTES: Final = REGION_TABLE_OFFSETS[0]
"""What the log never updates: the file identifier and the headers (§2.2.1, §2.2.2)."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A valid entry. Offsets are in bytes from the start of the log."""

    offset: int
    length: int
    tail: int
    sequence: int
    count_descriptors: int
    flushed_bytes: int
    last_bytes: int

    @property
    def descriptor_bytes(self) -> int:
        """Of the descriptor sectors, header included."""
        return _descriptor_sectors(self.count_descriptors) * SECTOR


@dataclass(frozen=True, slots=True)
class Updates:
    """What a replay writes, in order: row i is `length[i]` zeros, or a data sector, at byte `offset[i]` of the file."""

    offset: np.ndarray[tuple[int], np.dtype[np.int64]]
    length: np.ndarray[tuple[int], np.dtype[np.int64]]
    place: np.ndarray[tuple[int], np.dtype[np.int64]]
    """Byte of the file at which the data sector lies in the log; -1 for zeros."""
    leading: np.ndarray[tuple[int], np.dtype[np.uint64]]
    trailing: np.ndarray[tuple[int], np.dtype[np.uint32]]
    file_bytes: int
    """The file is at least so long after the replay."""
    count_entries: int


class Log:
    """A log that is not empty. Reads only; one thread."""

    def __init__(self, source: Source, region: Region, log_id: UUID) -> None:
        """ImageError if there cannot be a log in that place."""
        self._source = source
        self._region = region
        self._id = log_id.bytes_le
        self._summed = 0
        problem = region.problem()
        if problem is None and not 0 < region.length <= source.size_bytes - region.offset:
            problem = f"{region.length} bytes at {region.offset} are not inside the file"
        if problem is not None:
            self._refuse(f"its log cannot be where its header says: {problem}")

    def updates(self) -> Updates:
        """The updates of the active sequence. ImageError where the log is damaged, or wants what cannot be."""
        active = self._active(self._entries())
        head = active[-1]
        if head.flushed_bytes > self._source.size_bytes:
            problem = f"it had {head.flushed_bytes} bytes when its log was written, now {self._source.size_bytes}"
            self._refuse(f"it was cut short: {problem}")
        if sum(entry.count_descriptors for entry in active) > MAX_DESCRIPTORS:
            self._refuse(f"its log holds more than {MAX_DESCRIPTORS} updates")
        offsets, lengths, places, leading, trailing = [], [], [], [], []
        for entry in active:
            rows = self._descriptors(entry)
            data = rows["kind"] == _DESC
            sectors = (entry.offset + entry.descriptor_bytes) // SECTOR + np.cumsum(data, dtype=np.int64) - data
            sectors %= self._region.length // SECTOR
            offsets.append(rows["offset"])
            lengths.append(np.where(data, np.uint64(SECTOR), rows["leading"]))
            places.append(np.where(data, sectors * SECTOR + self._region.offset, -1))
            leading.append(rows["leading"])
            trailing.append(rows["trailing"])
        offset, length = np.concatenate(offsets), np.concatenate(lengths)
        stop = self._checked_stop(offset, length)
        if max(stop, head.last_bytes) > MAX_FILE_BYTES:
            self._refuse(f"its log makes it {max(stop, head.last_bytes)} bytes long, more than {MAX_FILE_BYTES}")
        return Updates(
            offset.astype(np.int64),
            length.astype(np.int64),
            np.concatenate(places),
            np.concatenate(leading),
            np.concatenate(trailing),
            max(stop, head.last_bytes, self._source.size_bytes),
            len(active),
        )

    def _entries(self) -> dict[int, Entry]:
        """Every valid entry by its offset."""
        entries = {}
        for first in self._pieces():
            starts = self._source.read(self._region.offset + first * SECTOR, self._piece(first) * SECTOR)
            for place in range(0, len(starts), SECTOR):
                if starts.startswith(b"loge", place):
                    entry = self._valid(first * SECTOR + place, starts[place : place + SECTOR])
                    if entry is not None:
                        entries[entry.offset] = entry
            if len(entries) > MAX_ENTRIES:
                self._refuse(f"its log has more than {MAX_ENTRIES} entries")
        return entries

    def _pieces(self) -> Iterator[int]:
        """First sectors of the pieces that are not all hole: a log may be 4 GiB long and take no place."""
        base, size, following = self._region.offset, _PIECE_SECTORS * SECTOR, 0
        for start, stop in self._source.data_runs(base, base + self._region.length):
            numbers = range(max(following, (start - base) // size), -(-(stop - base) // size))
            yield from (number * _PIECE_SECTORS for number in numbers)
            following = max(following, numbers.stop)

    def _piece(self, first: int) -> int:
        """How many sectors from `first` are read at once: to the end of the ring at most."""
        return min(_PIECE_SECTORS, self._region.length // SECTOR - first)

    def _active(self, entries: dict[int, Entry]) -> list[Entry]:
        """The active sequence, from the tail to the head."""
        if not entries:
            self._refuse("its log is not empty, but no entry in it is whole")
        newest = max(entry.sequence for entry in entries.values())
        heads = [entry for entry in entries.values() if entry.sequence == newest]
        if len(heads) > 1:
            self._refuse("its log has two newest entries")
        head = heads[0]
        sequence: list[Entry] = []
        place = head.tail
        while True:
            entry = entries.get(place)
            if entry is None or (sequence and entry.sequence != sequence[-1].sequence + 1):
                problem = f"at byte {place} of it there is no whole entry that leads to the newest one, {newest}"
                self._refuse(f"its log is torn in the middle: {problem}")
            sequence.append(entry)
            if entry is head:
                return sequence
            place = (entry.offset + entry.length) % self._region.length

    def _valid(self, offset: int, first: bytes) -> Entry | None:
        """The entry that starts with this sector, or None if there is none, or none that is whole (§2.3.1)."""
        _, check, length, tail, sequence, count, _, log_id, flushed, last = _ENTRY.unpack_from(first)
        if log_id != self._id or sequence == 0 or length % SECTOR or tail % SECTOR:
            return None
        if not 0 < length <= self._region.length or tail >= self._region.length:
            return None
        if count > MAX_DESCRIPTORS or _descriptor_sectors(count) * SECTOR > length:
            return None
        self._summed += length
        if self._summed > 2 * self._region.length:
            self._refuse("the entries of its log overlap")
        entry = Entry(offset, length, tail, sequence, count, flushed, last)
        return entry if self._checksum(entry) == check and self._parts_fit(entry) else None

    def _checksum(self, entry: Entry) -> int:
        pieces = self._sectors(entry.offset, entry.length)
        first = next(pieces)
        crc = crc32c(first[8:], crc32c(first[:4] + bytes(4)))
        for data in pieces:
            crc = crc32c(data, crc)
        return crc

    def _parts_fit(self, entry: Entry) -> bool:
        """Whether every descriptor and data sector is one of this entry's."""
        rows = self._descriptors(entry)
        data = rows["kind"] == _DESC
        unit = np.where(data, 0, rows["leading"]) | rows["offset"]
        known = data | (rows["kind"] == _ZERO)
        if not (known & (rows["sequence"] == entry.sequence) & (unit % SECTOR == 0)).all():
            return False
        count = int(data.sum())
        if entry.descriptor_bytes + count * SECTOR > entry.length:
            return False
        for piece in self._sectors(entry.offset + entry.descriptor_bytes, count * SECTOR):
            ends = np.frombuffer(piece, dtype=_DATA_ENDS)
            high, low = divmod(entry.sequence, 1 << 32)
            if not ((ends["kind"] == _DATA) & (ends["high"] == high) & (ends["low"] == low)).all():
                return False
        return True

    def _descriptors(self, entry: Entry) -> Rows:
        data = b"".join(self._sectors(entry.offset, entry.descriptor_bytes))
        skipped = _ENTRY.size // _DESCRIPTOR.itemsize
        return np.frombuffer(data, dtype=_DESCRIPTOR)[skipped : skipped + entry.count_descriptors]

    def _sectors(self, offset: int, length: int) -> Iterator[bytes]:
        """Pieces of the ring from `offset` on."""
        while length:
            offset %= self._region.length
            piece = min(length, self._piece(offset // SECTOR) * SECTOR)
            yield self._source.read(self._region.offset + offset, piece)
            offset += piece
            length -= piece

    def _checked_stop(self, offset: Rows, length: Rows) -> int:
        """Where the last update ends, if none lies where a log must not write."""
        if not len(offset):
            return 0
        if int(offset.max()) > MAX_FILE_BYTES or int(length.max()) > MAX_FILE_BYTES:
            self._refuse(f"its log makes it more than {MAX_FILE_BYTES} bytes long")
        used = length > 0
        if (used & (offset < _FIXED_BYTES)).any():
            self._refuse("its log writes over its headers")
        if (used & (offset < self._region.stop) & (offset + length > self._region.offset)).any():
            self._refuse("its log writes over itself")
        return int((offset + length).max())

    def _refuse(self, problem: str) -> NoReturn:
        raise damaged(self._source, problem)


def _descriptor_sectors(count: int) -> int:
    return -(-(_ENTRY.size + count * _DESCRIPTOR.itemsize) // SECTOR)


def damaged(source: Source, problem: str) -> ImageError:
    """The error for a VHDX whose structures cannot be believed."""
    hint = "check it with the program that wrote it, or put back a copy"
    return ImageError(f"VHDX {source.path} is damaged: {problem}", hint=hint)
