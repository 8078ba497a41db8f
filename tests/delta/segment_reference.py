"""Segments sealed and opened by docs/FORMAT.md with other libraries: the oracle for the native ones."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import zstandard
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from replica import _native
from replica.delta import DataKey, Header, Segment
from replica.delta.extents import EXTENT
from replica.delta.seal import derive

TABLE, CHUNK = 2, 3
BODY_BYTES = 32 << 10

Place = tuple[int, int, int]
"""kind, segment, chunk: the nonce."""


@dataclass(frozen=True)
class Reference:
    """Seals and opens in the delta file with a `header`."""

    key: bytes
    header_digest: bytes

    @classmethod
    def of(cls, header: Header, key: DataKey) -> Reference:
        secret, _ = derive(key, header.salt, header.replica_id, header.delta_id, header.epoch)
        return cls(secret, blake3(header.raw).digest())

    def seal(self, place: Place, data: bytes, raw_bytes: int, flags: int = 0) -> bytes:
        return AESGCM(self.key).encrypt(struct.pack("<3I", *place), data, self._associated(place, raw_bytes, flags))

    def open(self, place: Place, sealed: bytes, raw_bytes: int, flags: int = 0) -> bytes:
        """The plaintext, which proves that `place` was the nonce; InvalidTag."""
        return AESGCM(self.key).decrypt(struct.pack("<3I", *place), sealed, self._associated(place, raw_bytes, flags))

    def _associated(self, place: Place, raw_bytes: int, flags: int) -> bytes:
        return self.header_digest + struct.pack("<5I", *place, raw_bytes, flags)

    def seal_parts(self, number: int, segment: Segment, chunks: Iterable[tuple[int, int, bytes]]) -> bytes:
        """The blob of a segment whose chunks are given as (raw length, flags, bytes to seal)."""
        rows, sealed = [], []
        for index, (raw_bytes, flags, body) in enumerate(chunks):
            sealed.append(self.seal((CHUNK, number, index), body, raw_bytes, flags))
            rows.append(struct.pack("<3I", raw_bytes, flags, len(sealed[-1])))
        head = struct.pack("<3I", segment.disk, len(rows), len(segment.extents))
        return self.seal_table(number, head + b"".join(rows) + _native.encode_extents(segment.extents), sealed)

    def seal_table(self, number: int, table: bytes, sealed_chunks: Iterable[bytes]) -> bytes:
        sealed = self.seal((TABLE, number, 0), table, len(table))
        return struct.pack("<2I", number, len(sealed)) + sealed + b"".join(sealed_chunks)

    def open_segment(self, number: int, blob: bytes) -> tuple[Segment, list[tuple[int, int]]]:
        """The segment, and (raw length, flags) of each chunk."""
        found, length = struct.unpack_from("<2I", blob)
        assert found == number
        table = self.open((TABLE, number, 0), blob[8 : 8 + length], length - 16)
        disk, count_chunks, count_extents = struct.unpack_from("<3I", table)
        rows = [struct.unpack_from("<3I", table, 12 + 12 * index) for index in range(count_chunks)]
        at, parts = 8 + length, []
        for index, (raw_bytes, flags, sealed_bytes) in enumerate(rows):
            body = self.open((CHUNK, number, index), blob[at : at + sealed_bytes], raw_bytes, flags)
            at += sealed_bytes
            parts.append(zstandard.ZstdDecompressor().decompress(body, allow_extra_data=False) if flags else body)
            assert len(parts[-1]) == raw_bytes
            assert len(body) <= BODY_BYTES
        assert at == len(blob)
        extents = _native.decode_extents(table[12 + 12 * count_chunks :], count_extents)
        payload = b"".join(parts)
        return Segment(disk, np.frombuffer(extents, dtype=EXTENT), payload), [row[:2] for row in rows]


def cut(payload: bytes, sizes: Iterable[int], level: int) -> list[tuple[int, int, bytes]]:
    """Chunks as some writer might cut them: of the next of `sizes` where that fits, else of 32 KiB."""
    compressor = zstandard.ZstdCompressor(level=level)
    chunks, wanted = [], iter(sizes)
    while payload:
        for size in (next(wanted), BODY_BYTES):
            raw = payload[:size]
            frame = compressor.compress(raw)
            if len(frame) < len(raw) and len(frame) <= BODY_BYTES:
                chunks.append((len(raw), 1, frame))
                break
        else:
            chunks.append((len(raw), 0, raw))
        payload = payload[len(raw) :]
    return chunks
