"""The NBD protocol as bytes: `doc/proto.md` of the NBD project. Numbers, structures and their bounds; no I/O.

Newstyle fixed handshake and transmission, with structured replies. Everything is big-endian.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import Final

NBD_MAGIC: Final = b"NBDMAGIC"
OPTION_MAGIC: Final = b"IHAVEOPT"
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF

HANDSHAKE: Final = struct.Struct(">8s8sH")
OPTION: Final = struct.Struct(">8sII")
OPTION_REPLY: Final = struct.Struct(">QIII")
EXPORT_INFO: Final = struct.Struct(">HQH")
BLOCK_SIZE_INFO: Final = struct.Struct(">HIII")
REQUEST: Final = struct.Struct(">IHHQQI")
SIMPLE_REPLY: Final = struct.Struct(">IIQ")
CHUNK: Final = struct.Struct(">IHHQI")
HOLE: Final = struct.Struct(">QI")
ERROR: Final = struct.Struct(">IH")
OFFSET: Final = struct.Struct(">Q")

MAX_OPTION_REPLY_BYTES: Final = 64 << 10
MAX_OPTION_REPLIES: Final = 64
MAX_STATUS_BYTES: Final = 8 << 20
"""Of one answer to BLOCK_STATUS: a million extents, which is what nbdkit sends at most."""
MAX_BLOCK_BYTES: Final = 64 << 10
"""Of the smallest block that a server may demand ("Block size constraints")."""
MAX_REQUEST_BYTES: Final = 32 << 20
"""What every server takes in one request, if it says nothing else."""
STATUS_BYTES: Final = 1 << 30
"""How much one BLOCK_STATUS asks about."""

FIXED_NEWSTYLE, NO_ZEROES = 1, 2
"""Handshake flags, of the server and of the client alike."""


class Option(IntEnum):
    STARTTLS = 5
    GO = 7
    STRUCTURED_REPLY = 8
    SET_META_CONTEXT = 10


class Reply(IntEnum):
    """Of options."""

    ACK = 1
    INFO = 3
    META_CONTEXT = 4


class Info(IntEnum):
    EXPORT = 0
    BLOCK_SIZE = 3


ERROR_REPLY: Final = 1 << 31
REFUSALS: Final = {
    1: "it does not know that option",
    2: "its policy forbids it",
    3: "it finds the request invalid",
    4: "its platform cannot",
    5: "it demands TLS",
    6: "it has no such export",
    7: "it is shutting down",
    8: "it demands other block sizes",
    9: "the request is too big for it",
}
"""Option errors, without `ERROR_REPLY`."""
UNSUPPORTED, TLS_REQUIRED, UNKNOWN_EXPORT = 1, 5, 6


class Flag(IntFlag):
    """Transmission flags of an export."""

    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    WRITE_ZEROES = 1 << 6
    CAN_MULTI_CONN = 1 << 8


class Command(IntEnum):
    READ = 0
    WRITE = 1
    DISCONNECT = 2
    FLUSH = 3
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class ChunkType(IntEnum):
    """Of a structured reply."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5


DONE: Final = 1
"""The chunk is the last one of its reply."""
ERROR_CHUNK: Final = 1 << 15
OFFSET_ERROR_CHUNK: Final = ERROR_CHUNK + 2
ALLOCATION: Final = b"base:allocation"
STATE_ZERO: Final = 2
"""Of `base:allocation`: the extent reads as zeros. A hole (1) without it may read as anything."""
