"""Small state files: one JSON document and its checksum, replaced atomically.

A document is `<json>\\n<xxh3-64 of the json, 16 hex digits>\\n`. The checksum is
against accidents (a torn or rotten file), not against an adversary. A file that
does not fit is never guessed at: `FormatError`, and the caller stops or rebuilds.
Nor does one that is larger than `MAX_DOCUMENT_BYTES`; none such is saved.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec
import xxhash

from replica.durable import FileSystem
from replica.errors import FormatError, StorageError

MAX_DOCUMENT_BYTES = 4 << 20

T = TypeVar("T")


def encode(value: object) -> bytes:
    body = msgspec.json.encode(value)
    return body + b"\n" + xxhash.xxh3_64_hexdigest(body).encode() + b"\n"


def decode(data: bytes, kind: type[T], name: str) -> T:
    """The value in `data`, or FormatError naming `name`."""
    body, mark, check = data[:-18], data[-18:-17], data[-17:]
    if mark != b"\n" or check != xxhash.xxh3_64_hexdigest(body).encode() + b"\n":
        raise FormatError(f"{name} is damaged: its checksum does not fit")
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, msgspec.ValidationError, ValueError) as error:
        raise FormatError(f"{name} is not valid: {error}") from error


def save(fs: FileSystem, path: Path, value: object, *, private: bool = False) -> None:
    """Replace the document durably: after a crash it is the old one or the new one.

    StorageError, also where it would be too large to be loaded: the old one stays then.
    """
    data = encode(value)
    if len(data) > MAX_DOCUMENT_BYTES:
        raise StorageError(f"{path} would have {len(data)} bytes, more than the {MAX_DOCUMENT_BYTES} it may have")
    fs.replace_bytes(path, data, private=private)


def load(fs: FileSystem, path: Path, kind: type[T]) -> T:
    """Read the document. Raises StorageError (cannot read) or FormatError (damaged)."""
    with fs.open(path) as file:
        size = file.size()
        if size > MAX_DOCUMENT_BYTES:
            raise FormatError(f"{path} has {size} bytes, more than the {MAX_DOCUMENT_BYTES} it may have")
        data = file.read(0, size)
    return decode(data, kind, str(path))
