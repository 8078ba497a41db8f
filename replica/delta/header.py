"""The first 160 bytes and the last 32 bytes of a delta file: all that is readable without a key.

The header says who sealed what (replica, delta, epoch, key id) and carries the
salt and the commitment to the key; its BLAKE3 digest is part of every seal's
associated data, so a header of another file opens nothing. The trailer says
where the manifest lies. The XXH3-64 checksums in both are against accidents;
against adversaries the seals are.

Byte tables: docs/FORMAT.md. Everything here is pure and thread-safe.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

import xxhash

from replica.errors import FormatError
from replica.model import DeltaId, Epoch, KeyId, ReplicaId

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAGIC = b"RPLDELT1"
END_MAGIC = b"RPLDEND1"
HEADER_BYTES = 160
TRAILER_BYTES = 32
SALT_BYTES = 32
COMMITMENT_BYTES = 32
MAX_MANIFEST_BYTES = 64 << 20
"""Of the sealed manifest; about a million segments, 4 TiB of raw data in one delta."""
MIN_MANIFEST_BYTES = 16 + 8
"""A seal's tag and the two counts: anything shorter is no manifest."""

_HEADER = struct.Struct("<8sII16s16sQ16s16s32s32s")
_TRAILER = struct.Struct("<QII")
_CHECK = struct.Struct("<Q")


@dataclass(frozen=True)
class Header:
    """Who sealed what, as in the file's first 160 bytes."""

    replica_id: ReplicaId
    delta_id: DeltaId
    epoch: Epoch
    key_id: KeyId
    salt: bytes
    commitment: bytes

    @property
    def raw(self) -> bytes:
        """The 160 bytes."""
        body = _HEADER.pack(
            MAGIC,
            0,
            HEADER_BYTES,
            self.replica_id.bytes,
            self.delta_id.bytes,
            self.epoch.counter,
            self.epoch.holder.bytes,
            self.key_id.bytes,
            self.salt,
            self.commitment,
        )
        return body + _CHECK.pack(xxhash.xxh3_64_intdigest(body))


@dataclass(frozen=True)
class Trailer:
    """Where the sealed manifest lies; it ends where the trailer begins."""

    manifest_offset: int
    manifest_bytes: int

    @property
    def raw(self) -> bytes:
        """The 32 bytes."""
        body = _TRAILER.pack(self.manifest_offset, self.manifest_bytes, 0)
        return body + _CHECK.pack(xxhash.xxh3_64_intdigest(body)) + END_MAGIC


def decode_header(data: Buffer, name: str = "the delta") -> Header:
    """The header in exactly 160 bytes. FormatError, naming `name`, for anything else."""
    raw = bytes(data)
    if len(raw) != HEADER_BYTES:
        raise FormatError(f"{name} is too short to be a delta file")
    magic, flags, length, replica, delta, counter, holder, key, salt, commitment = _HEADER.unpack_from(raw)
    if magic != MAGIC:
        raise FormatError(f"{name} is no delta file of a known version")
    if _CHECK.unpack_from(raw, _HEADER.size)[0] != xxhash.xxh3_64_intdigest(raw[: _HEADER.size]):
        raise FormatError(f"the header of {name} is damaged")
    if flags or length != HEADER_BYTES or counter >= 1 << 63:
        raise FormatError(f"the header of {name} has flags or lengths of an unknown version")
    ids = ReplicaId(UUID(bytes=replica)), DeltaId(UUID(bytes=delta))
    return Header(*ids, Epoch(counter, UUID(bytes=holder)), KeyId(UUID(bytes=key)), salt, commitment)


def decode_trailer(data: Buffer, file_bytes: int, name: str = "the delta") -> Trailer:
    """The trailer of a file of `file_bytes`. FormatError unless the manifest fits exactly before it."""
    raw = bytes(data)
    if len(raw) != TRAILER_BYTES or raw[24:] != END_MAGIC:
        raise FormatError(f"{name} is not complete: it has no trailer")
    offset, length, reserved = _TRAILER.unpack_from(raw)
    if _CHECK.unpack_from(raw, 16)[0] != xxhash.xxh3_64_intdigest(raw[:16]) or reserved:
        raise FormatError(f"the trailer of {name} is damaged")
    if not MIN_MANIFEST_BYTES <= length <= MAX_MANIFEST_BYTES or offset < HEADER_BYTES:
        raise FormatError(f"the trailer of {name} says there is a manifest of {length} bytes at {offset}")
    if offset + length + TRAILER_BYTES != file_bytes:
        raise FormatError(f"{name} has {file_bytes} bytes, its trailer says {offset + length + TRAILER_BYTES}")
    return Trailer(offset, length)
