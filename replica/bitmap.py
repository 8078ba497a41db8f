"""The dirty bitmap: one bit per grain, set where the grain may differ.

One rule governs all that is done to it: *over-reporting is allowed, under-reporting
never*. Hence union is always safe (two trackers, an abandoned snapshot merged back),
while `intersect` and `subtract` are for callers that know both sides to be complete;
and a stored bitmap whose checksum does not fit is refused whole, never used in part.

Bits are packed, grain 0 in the lowest bit of byte 0, and the bits past the last
grain are 0. A disk of 64 TiB has 2 GiB of them: the memory may therefore be handed
in (a mapped file), and everything here works in windows, so that what it takes
besides stays below a few MiB.

    dirty = DirtyBitmap(disk.count_grains)
    dirty.set_mask(first_grain, mask)               # what `_native.scan` found in a window
    for first, count in dirty.runs():               # coalesced, ascending
        ...

Stored (`to_bytes`), all numbers little-endian:

    offset  size  field
    0       8     magic "RPLBITM1"
    8       8     count of grains
    16      n     the bits, n = ceil(count / 8)
    16 + n  8     XXH3-64 of everything before it
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import xxhash

from replica.errors import FormatError

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAGIC = b"RPLBITM1"
_HEAD_BYTES = 16
_CHECK_BYTES = 8
_WINDOW_BYTES = 1 << 17
"""Bits looked at in one go: 1 Mi grains, so 1 MiB when unpacked."""

Bits = npt.NDArray[np.uint8]


class DirtyBitmap:
    """`count_grains` bits. Not thread-safe: one owner, or a lock."""

    def __init__(self, count_grains: int, bits: Bits | None = None) -> None:
        """All clear, or on the memory `bits`: u8[ceil(count_grains / 8)], kept and changed in place."""
        if count_grains < 0:
            raise ValueError(f"a bitmap of {count_grains} grains")
        count_bytes = -(-count_grains // 8)
        self.count_grains = count_grains
        self._bits = np.zeros(count_bytes, np.uint8) if bits is None else bits
        if self._bits.shape != (count_bytes,) or self._bits.dtype != np.uint8:
            raise ValueError(f"{count_grains} grains need u8[{count_bytes}], not {self._bits.dtype}{self._bits.shape}")
        if count_grains % 8 and int(self._bits[-1]) >> count_grains % 8:
            raise ValueError("a bit past the last grain is set")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DirtyBitmap):
            return NotImplemented
        return self.count_grains == other.count_grains and np.array_equal(self._bits, other._bits)

    __hash__ = None  # type: ignore[assignment]

    def __contains__(self, grain: int) -> bool:
        return 0 <= grain < self.count_grains and bool(self._bits[grain // 8] >> grain % 8 & 1)

    def __bool__(self) -> bool:
        """Whether any grain is dirty."""
        return bool(self._bits.any())

    @property
    def count_dirty(self) -> int:
        windows = range(0, len(self._bits), _WINDOW_BYTES)
        return sum(int(np.bitwise_count(self._bits[i : i + _WINDOW_BYTES]).sum(dtype=np.int64)) for i in windows)

    def copy(self) -> DirtyBitmap:
        return DirtyBitmap(self.count_grains, self._bits.copy())

    def set(self, first: int, count: int = 1) -> None:
        """Mark the grains [first, first + count). ValueError when that is outside."""
        self._fill(first, count, True)

    def clear(self, first: int, count: int = 1) -> None:
        self._fill(first, count, False)

    def set_mask(self, first: int, mask: npt.NDArray[Any]) -> None:
        """Mark grain `first + i` wherever `mask[i]` is not 0; others keep what they have."""
        self._check(first, len(mask))
        if len(mask):
            start = first // 8
            lead = np.zeros(first % 8, np.uint8)
            packed = np.packbits(np.concatenate([lead, mask]).astype(bool), bitorder="little")
            self._bits[start : start + len(packed)] |= packed

    def mask(self, first: int, count: int) -> npt.NDArray[np.uint8]:
        """A u8 per grain of the range, 0 or 1."""
        self._check(first, count)
        start, skip = divmod(first, 8)
        part = self._bits[start : -(-(first + count) // 8)]
        return np.unpackbits(part, bitorder="little")[skip : skip + count]

    def union(self, other: DirtyBitmap) -> None:
        """Mark what `other` marks too."""
        self._same(other)
        np.bitwise_or(self._bits, other._bits, out=self._bits)

    def intersect(self, other: DirtyBitmap) -> None:
        """Keep what both mark; safe only if each by itself is complete."""
        self._same(other)
        np.bitwise_and(self._bits, other._bits, out=self._bits)

    def subtract(self, other: DirtyBitmap) -> None:
        """Clear what `other` marks; safe only if that is known to be clean or shipped."""
        self._same(other)
        for i in range(0, len(self._bits), _WINDOW_BYTES):
            self._bits[i : i + _WINDOW_BYTES] &= ~other._bits[i : i + _WINDOW_BYTES]

    def runs(self, first: int = 0, count: int | None = None) -> Iterator[tuple[int, int]]:
        """Dirty runs (first grain, count) inside the range, ascending and coalesced. The bitmap must not change."""
        stop = self.count_grains if count is None else first + count
        self._check(first, stop - first)
        begin = end = first
        while first < stop:
            size = min(stop - first, _WINDOW_BYTES * 8)
            for run_first, run_count in self._window_runs(first, size):
                if run_first != end:
                    if end > begin:
                        yield begin, end - begin
                    begin = run_first
                end = run_first + run_count
            first += size
        if end > begin:
            yield begin, end - begin

    def to_bytes(self) -> bytes:
        body = MAGIC + self.count_grains.to_bytes(8, "little") + self._bits.tobytes()
        return body + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little")

    @classmethod
    def from_bytes(cls, data: Buffer) -> DirtyBitmap:
        """The bitmap that `to_bytes` stored. Raises FormatError, and the caller must take everything for dirty."""
        view = memoryview(data).cast("B")
        body, check = view[:-_CHECK_BYTES], view[-_CHECK_BYTES:]
        if len(body) < _HEAD_BYTES or body[:8] != MAGIC:
            raise FormatError("no stored bitmap of a version that is known here")
        if xxhash.xxh3_64_intdigest(body).to_bytes(8, "little") != check:
            raise FormatError("a stored bitmap is damaged: its checksum does not fit")
        count_grains = int.from_bytes(body[8:16], "little")
        if len(body) - _HEAD_BYTES != -(-count_grains // 8):
            raise FormatError(f"a stored bitmap of {count_grains} grains has {len(body) - _HEAD_BYTES} bytes of bits")
        try:
            return cls(count_grains, np.frombuffer(body[_HEAD_BYTES:], np.uint8).copy())
        except ValueError as error:
            raise FormatError(f"a stored bitmap is not valid: {error}") from error

    def _check(self, first: int, count: int) -> None:
        if first < 0 or count < 0 or first + count > self.count_grains:
            raise ValueError(f"grains {first} to {first + count} of a bitmap of {self.count_grains}")

    def _same(self, other: DirtyBitmap) -> None:
        if other.count_grains != self.count_grains:
            raise ValueError(f"bitmaps of {self.count_grains} and {other.count_grains} grains")

    def _fill(self, first: int, count: int, value: bool) -> None:
        """Whole bytes at once, the partial ones at both ends by a mask."""
        self._check(first, count)
        if count == 0:
            return
        (start, skip), (last, keep) = divmod(first, 8), divmod(first + count - 1, 8)
        head, tail = 0xFF << skip & 0xFF, 0xFF >> (7 - keep)
        ends = [(start, head & tail)] if start == last else [(start, head), (last, tail)]
        for place, bits in ends:
            if value:
                self._bits[place] |= bits
            else:
                self._bits[place] &= 0xFF ^ bits
        self._bits[start + 1 : last] = 0xFF if value else 0

    def _window_runs(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        if not self._bits[first // 8 : -(-(first + count) // 8)].any():
            return
        padded = np.zeros(count + 2, np.int8)
        padded[1:-1] = self.mask(first, count)
        edges = np.flatnonzero(np.diff(padded)) + first
        for start, stop in edges.reshape(-1, 2).tolist():
            yield start, stop - start
