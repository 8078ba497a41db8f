"""Files of gigabytes that fit into an input of a fuzzer: their size, and the few bytes that are not zero.

A `Case` is the image under test and the parents beside it. Its encoding, all integers little-endian: count of
files 1; of each file its size 8 and its count of pieces 2; of each piece its offset 8, its length 2, its bytes.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

MAX_FILES, MAX_PIECES = 3, 512
MAX_FILE_BYTES = (1 << 44) - (1 << 20)
"""More than this ext4 has no files of."""
MAX_GAP = 16
"""Zeros that do not part a piece in two."""
_FILE, _PIECE = struct.Struct("<QH"), struct.Struct("<QH")


@dataclass
class Sparse:
    """A file: `pieces` by their offset, none on another; all else is zeros."""

    size: int
    pieces: dict[int, bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, data: bytes, offset: int = 0) -> Sparse:
        """The file with these bytes."""
        return cls(offset + len(data), {offset + at: piece for at, piece in _runs(data)})

    def read(self, offset: int, length: int) -> bytes:
        """Zeros where the file has ended."""
        data = bytearray(length)
        for at, piece in self.pieces.items():
            first, last = max(offset, at), min(offset + length, at + len(piece))
            if first < last:
                data[first - offset : last - offset] = piece[first - at : last - at]
        return bytes(data)

    def write(self, offset: int, data: bytes) -> None:
        """Neither changes the size nor goes beyond it."""
        data = data[: max(0, self.size - offset)]
        stop = offset + len(data)
        for at, piece in list(self.pieces.items()):
            if at < stop and offset < at + len(piece):
                del self.pieces[at]
                before, after = piece[: max(0, offset - at)], piece[max(0, stop - at) :]
                if before:
                    self.pieces[at] = before
                if after:
                    self.pieces[at + len(piece) - len(after)] = after
        self.pieces.update((offset + at, piece) for at, piece in _runs(data))

    def resize(self, size: int) -> None:
        self.size = size
        kept = {at: piece[: size - at] for at, piece in self.pieces.items() if at < size}
        self.pieces = kept

    def save(self, path: Path) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.ftruncate(fd, self.size)
            for at, piece in self.pieces.items():
                os.pwrite(fd, piece, at)
        finally:
            os.close(fd)


@dataclass
class Case:
    """`files[0]` is the image that is opened, the others lie beside it."""

    files: list[Sparse]

    def encode(self) -> bytes:
        out = [bytes([len(self.files)])]
        for file in self.files:
            pieces = [(at, piece) for at, piece in sorted(file.pieces.items()) if piece]
            cut = [(at + n, piece[n : n + 0xFFFF]) for at, piece in pieces for n in range(0, len(piece), 0xFFFF)]
            out.append(_FILE.pack(file.size, len(cut)))
            out += [_PIECE.pack(at, len(piece)) + piece for at, piece in cut]
        return b"".join(out)

    @classmethod
    def decode(cls, data: bytes) -> Case:
        """ValueError: no case."""
        try:
            count, at, files = data[0], 1, []
            for _ in range(count):
                size, pieces = _FILE.unpack_from(data, at)
                at += _FILE.size
                if size > MAX_FILE_BYTES or pieces > MAX_PIECES:
                    raise ValueError("too large")
                file = Sparse(size)
                for _ in range(pieces):
                    offset, length = _PIECE.unpack_from(data, at)
                    at += _PIECE.size + length
                    if at > len(data):
                        raise ValueError("cut short")
                    file.write(offset, data[at - length : at])
                files.append(file)
        except (IndexError, struct.error) as error:
            raise ValueError("cut short") from error
        if not 0 < len(files) <= MAX_FILES:
            raise ValueError("no files, or too many")
        return cls(files)


def _runs(data: bytes) -> Iterator[tuple[int, bytes]]:
    """What is not zero."""
    places = np.flatnonzero(np.frombuffer(data, np.uint8))
    if len(places) == 0:
        return
    gaps = np.flatnonzero(np.diff(places) > MAX_GAP)
    firsts = places[np.concatenate(([0], gaps + 1))].tolist()
    lasts = places[np.concatenate((gaps, [len(places) - 1]))].tolist()
    for first, last in zip(firsts, lasts, strict=True):
        yield first, data[first : last + 1]
