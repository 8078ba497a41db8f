"""The journal: what a delta would change in the trackers, durable before the commit is asked for.

A scan learns new digests and leaves long before it is known whether the
receiver takes the delta. They stream into this file, window by window, and
into nothing else. Its name says what is known:

    .pending.tmp   being written; worth nothing
    pending        complete and durable; the commit may have been asked for
    folding        the receiver committed it: the trackers may be half changed, finish by folding again

`JournalWriter.finish` makes the first into the second, `accept` the second
into the third, and after the fold it is unlinked. So whoever starts after a
crash sees from the name alone which decision was made last.

Layout, little-endian (docs/FORMAT.md, "Sender state"):

    8   magic "RPLJRN01"
    …   records: one per window with changes, ascending by (disk, window)
            u16 disk (index in `disks`), u16 changed grains, u16 changed leaves, u16 zero, u64 first grain of the window
            u16 x grains: which ones, relative to the window, ascending; u64 x grains: their digests
            u16 x leaves: which ones, relative to the window, ascending; 32 bytes x leaves: their digests
    …   summary: JSON, `JournalSummary`
    24  u64 offset of the summary, u32 its length, u32 zero, u64 XXH3-64 of all bytes before this field

A file that is torn or damaged in any byte is refused as a whole
(`FormatError`): the trackers are never folded from a guess.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from replica.durable import File, FileSystem
from replica.errors import FormatError
from replica.model import DIGEST_BYTES, MAX_DISK_BYTES, DeltaId, Disk, Frozen, State

WINDOW_BYTES = 4 << 20
"""The unit of scanning, journalling and folding; every window starts at a multiple of it."""

_MAGIC = b"RPLJRN01"
_RECORD = struct.Struct("<HHHHQ")
_TRAILER = struct.Struct("<QIIQ")
_CHECKED_TRAILER_BYTES = _TRAILER.size - 8
_BUFFER_BYTES = 1 << 20
_MAX_SUMMARY_BYTES = 4 << 20


class JournalSummary(Frozen, frozen=True, omit_defaults=True):
    """What the journal is about: known when the scan is over, hence last in the file.

    `fresh[i]`: the trackers of disk i start from nothing (what they held is
    not trusted), else they change from `base` to `result`. `base_bytes[i]` is that disk's size at `base`; it may
    be left empty where no disk has another size than before.
    """

    base: DeltaId
    result: State
    fresh: tuple[bool, ...]
    base_bytes: tuple[int, ...] = ()

    def before(self, index: int) -> Disk:
        """Disk i of the result in the size that it had at `base`."""
        disk = self.result.disks[index].disk
        return msgspec.structs.replace(disk, size_bytes=self.base_bytes[index]) if self.base_bytes else disk


class JournalRecord(NamedTuple):
    """Changes in one window. Grain and leaf numbers are relative to the window and ascending."""

    disk: int
    first_grain: int
    grains: NDArray[np.uint16]
    grain_digests: NDArray[np.uint64]
    leaves: NDArray[np.uint16]
    leaf_digests: NDArray[np.uint8]  # (n, 32)


def grains_per_window(disk: Disk) -> int:
    return WINDOW_BYTES // disk.grain_bytes


class JournalWriter:
    """Streams records to `.pending.tmp`; `finish` gives it its name. Not thread-safe.

    Use as a context manager: leaving it unfinished removes the temporary file.
    """

    def __init__(self, fs: FileSystem, directory: Path) -> None:
        self._fs = fs
        self._directory = directory
        self._temporary = directory / ".pending.tmp"
        fs.unlink(self._temporary)
        self._file: File | None = fs.create(self._temporary, private=True)
        self._hash = xxhash.xxh3_64()
        self._buffer = bytearray()
        self._written = 0
        self._put(_MAGIC)

    def add(self, record: JournalRecord) -> None:
        """Append one window's changes. A record without any is left out."""
        if not len(record.grains) and not len(record.leaves):
            return
        self._put(_RECORD.pack(record.disk, len(record.grains), len(record.leaves), 0, record.first_grain))
        self._put(record.grains.astype("<u2", copy=False).tobytes())
        self._put(record.grain_digests.astype("<u8", copy=False).tobytes())
        self._put(record.leaves.astype("<u2", copy=False).tobytes())
        self._put(record.leaf_digests.tobytes())

    def finish(self, summary: JournalSummary) -> None:
        """Make the journal durable under its name `pending`. Raises StorageError: it does not exist then."""
        document = msgspec.json.encode(summary)
        offset = self._written + len(self._buffer)
        self._put(document)
        self._put(struct.pack("<QII", offset, len(document), 0))
        self._put(struct.pack("<Q", self._hash.intdigest()))
        self._flush()
        assert self._file is not None
        self._file.sync()
        self._file.close()
        self._file = None
        self._fs.publish(self._temporary, self._directory / "pending")

    def _put(self, data: bytes) -> None:
        self._buffer += data
        self._hash.update(data)
        if len(self._buffer) >= _BUFFER_BYTES:
            self._flush()

    def _flush(self) -> None:
        assert self._file is not None
        self._file.write(self._written, self._buffer)
        self._written += len(self._buffer)
        self._buffer.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self._fs.unlink(self._temporary)


class Journal:
    """A complete journal, checked when it is opened. Thread-safe for reading."""

    def __init__(self, fs: FileSystem, path: Path) -> None:
        """Raises StorageError (cannot read) or FormatError (torn or damaged)."""
        self.path = path
        self._fs = fs
        self._file = fs.open(path)
        try:
            self._end, self.summary = self._check()
        except BaseException:
            self._file.close()
            raise

    def _check(self) -> tuple[int, JournalSummary]:
        size = self._file.size()
        if size < len(_MAGIC) + _TRAILER.size:
            raise self._damaged("it is too short")
        offset, length, zero, check = _TRAILER.unpack(self._file.read(size - _TRAILER.size, _TRAILER.size))
        digest = xxhash.xxh3_64()
        for start in range(0, size - 8, _BUFFER_BYTES):
            digest.update(self._file.read(start, min(_BUFFER_BYTES, size - 8 - start)))
        if digest.intdigest() != check:
            raise self._damaged("its checksum does not fit")
        if self._file.read(0, len(_MAGIC)) != _MAGIC or zero or length > _MAX_SUMMARY_BYTES:
            raise self._damaged("it is of no known version")
        if offset < len(_MAGIC) or offset + length + _TRAILER.size != size:
            raise self._damaged("its summary is not where it says")
        try:
            summary = msgspec.json.decode(self._file.read(offset, length), type=JournalSummary)
        except (msgspec.MsgspecError, ValueError) as error:
            raise self._damaged(f"its summary is not valid ({error})") from error
        count = len(summary.result.disks)
        if len(summary.fresh) != count or len(summary.base_bytes) not in (0, count):
            raise self._damaged("its summary does not fit its disks")
        if any(not 0 <= size <= MAX_DISK_BYTES for size in summary.base_bytes):
            raise self._damaged("a disk in its summary had an impossible size")
        return offset, summary

    def records(self) -> Iterator[JournalRecord]:
        """Every record in order. Raises FormatError if one breaks the format's rules."""
        disks = [state.disk for state in self.summary.result.disks]
        position, previous = len(_MAGIC), (-1, -1)
        while position < self._end:
            header = self._take(position, _RECORD.size)
            index, grains, leaves, zero, first = _RECORD.unpack(header)
            if zero or index >= len(disks) or (index, first) <= previous:
                raise self._damaged("a record is out of order")
            self._check_bounds(disks[index], first, grains, leaves)
            body = self._take(position + _RECORD.size, grains * 10 + leaves * (2 + DIGEST_BYTES))
            yield self._parse(index, first, grains, leaves, body)
            position += _RECORD.size + len(body)
            previous = (index, first)

    def _check_bounds(self, disk: Disk, first: int, grains: int, leaves: int) -> None:
        window = grains_per_window(disk)
        if first % window or first >= disk.count_grains or grains > window or leaves > window // disk.grains_per_leaf:
            raise self._damaged(f"a record lies outside disk {disk.name!r}")

    def _parse(self, index: int, first: int, grains: int, leaves: int, body: bytes) -> JournalRecord:
        disk = self.summary.result.disks[index].disk
        which = np.frombuffer(body, "<u2", grains)
        digests = np.frombuffer(body, "<u8", grains, grains * 2)
        which_leaves = np.frombuffer(body, "<u2", leaves, grains * 10)
        leaf_digests = np.frombuffer(body, np.uint8, leaves * DIGEST_BYTES, grains * 10 + leaves * 2)
        for numbers, limit in (
            (which, min(grains_per_window(disk), disk.count_grains - first)),
            (which_leaves, min(WINDOW_BYTES // disk.leaf_bytes, disk.count_leaves - first // disk.grains_per_leaf)),
        ):
            if len(numbers) and (int(numbers[-1]) >= limit or bool((numbers[1:] <= numbers[:-1]).any())):
                raise self._damaged(f"a record names grains outside disk {disk.name!r}")
        return JournalRecord(index, first, which, digests, which_leaves, leaf_digests.reshape(-1, DIGEST_BYTES))

    def _take(self, position: int, length: int) -> bytes:
        if position + length > self._end:
            raise self._damaged("a record is cut off")
        return self._file.read(position, length)

    def _damaged(self, why: str) -> FormatError:
        return FormatError(
            f"journal {self.path} is damaged: {why}", hint="it is not used; the next sync reads every disk anew"
        )

    def accept(self) -> None:
        """The receiver committed this delta: note it durably, before any tracker changes. Idempotent."""
        final = self.path.with_name("folding")
        if self.path != final:
            self._fs.publish(self.path, final)
            self.path = final

    def remove(self) -> None:
        """Close and unlink."""
        self.close()
        self._fs.unlink(self.path)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
