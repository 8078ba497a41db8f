"""A machine's small configuration files, as the content of one more disk.

They are kept as an archive at the start of a disk of fixed size, all zeros
behind it; the state names that disk in `files`. So they are tracked, shipped,
sealed, kept and restored by what does it for every disk, and at the same instant.

Layout, little-endian (docs/FORMAT.md, "Machine files"):

    8   magic "RPLFIL01"
    8   u64 length of the body
    8   u64 XXH3-64 of the body
    …   body: u32 length of the table, the table, the files' content in the order of the table

The table is JSON, `[{"path": …, "size_bytes": …}, …]`, ascending by path. A path
is that of the file at the primary without its leading slash. Equal files make
equal bytes; bytes that are not exactly what `encode` makes of what `decode` found
are refused, since whoever made them was no sender of this version. A restore
creates files by these paths, so `check_path` lets nothing through that could lead
out of a directory.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

import msgspec
import xxhash

from replica.errors import FormatError
from replica.model import Frozen

FILES_DISK_NAME = "machine-files"
"""Reserved: no disk of a machine can have this name."""
FILES_DISK_BYTES = 16 << 20
MAX_FILE_BYTES = 1 << 20
MAX_FILES_BYTES = 8 << 20
MAX_FILES = 256
MAX_PATH_BYTES = 1024
_MAX_COMPONENT_BYTES = 255
_MAX_TABLE_BYTES = 4 << 20

_MAGIC = b"RPLFIL01"
_HEADER = struct.Struct("<8sQQ")
_TABLE = struct.Struct("<I")


class _Entry(Frozen, frozen=True):
    path: str
    size_bytes: int


def check_path(path: str) -> str:
    """Return `path` if a file may be restored under it in any directory, else raise ValueError."""
    try:
        length = len(path.encode())
    except UnicodeEncodeError:
        raise ValueError(f"path {path!r} is not valid Unicode") from None
    if not 0 < length <= MAX_PATH_BYTES or not path.isprintable() or "\\" in path:
        raise ValueError(f"path {path!r} must have 1 to {MAX_PATH_BYTES} printable bytes, and no backslash")
    for part in path.split("/"):
        if part in ("", ".", "..") or len(part.encode()) > _MAX_COMPONENT_BYTES:
            raise ValueError(f"path {path!r} has an empty part, one of dots, or one that is too long")
    return path


def encode(files: Mapping[str, bytes]) -> bytes:
    """The archive. Raises ValueError for what is out of bounds."""
    _check(files)
    names = sorted(files)
    table = msgspec.json.encode([_Entry(name, len(files[name])) for name in names])
    body = b"".join((_TABLE.pack(len(table)), table, *(files[name] for name in names)))
    return _HEADER.pack(_MAGIC, len(body), xxhash.xxh3_64_intdigest(body)) + body


def decode(data: bytes) -> dict[str, bytes]:
    """Path -> content, from the bytes of the disk (whatever is behind the archive must be zeros). FormatError."""
    if len(data) < _HEADER.size:
        raise _damaged("it is too short")
    magic, length, check = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise _damaged("it is of no known version")
    end = _HEADER.size + length
    if not _TABLE.size <= length <= len(data) - _HEADER.size or any(memoryview(data)[end:].tobytes().lstrip(b"\0")):
        raise _damaged("its length does not fit")
    body = memoryview(data)[_HEADER.size : end]
    (table_bytes,) = _TABLE.unpack_from(body)
    if xxhash.xxh3_64_intdigest(body) != check:
        raise _damaged("its checksum does not fit")
    if table_bytes > min(_MAX_TABLE_BYTES, length - _TABLE.size):
        raise _damaged("its table does not fit")
    at = _TABLE.size + table_bytes
    try:
        entries = msgspec.json.decode(body[_TABLE.size : at], type=list[_Entry])
        files: dict[str, bytes] = {}
        for entry in entries:
            if not 0 <= entry.size_bytes <= min(MAX_FILE_BYTES, length - at):
                raise ValueError("a file's size does not fit")
            files[entry.path] = bytes(body[at : at + entry.size_bytes])
            at += entry.size_bytes
        if encode(files) != data[:end]:
            raise ValueError("it is not as it would be written")
    except (msgspec.MsgspecError, ValueError) as error:
        raise _damaged(str(error)) from error
    return files


def _check(files: Mapping[str, bytes]) -> None:
    if len(files) > MAX_FILES:
        raise ValueError(f"{len(files)} files are more than the {MAX_FILES} that a machine can have")
    for path, content in files.items():
        check_path(path)
        if len(content) > MAX_FILE_BYTES:
            raise ValueError(f"{path} has {len(content)} bytes, more than {MAX_FILE_BYTES}")
        parts = path.split("/")
        for count in range(1, len(parts)):
            if "/".join(parts[:count]) in files:
                raise ValueError(f"{path} lies in a file of the same name as its directory")
    if sum(map(len, files.values())) > MAX_FILES_BYTES:
        raise ValueError(f"the files together have more than {MAX_FILES_BYTES} bytes")


def _damaged(why: str) -> FormatError:
    return FormatError(
        f"the machine's files cannot be unpacked: {why}", hint="the disks of the point are not affected by that"
    )
