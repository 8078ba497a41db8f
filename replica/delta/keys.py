"""Data keys, and the directory they are kept in.

A replica has one data key at a time, made by the primary at enrolment; rotation
adds one, and old keys stay while any file names them. Both sides keep theirs in
a directory outside of all state, one private file (mode 0600) per key. Nothing
here ever overwrites or removes a key: losing one loses every point sealed with it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Protocol
from uuid import UUID

from replica import documents
from replica.durable import FileSystem
from replica.errors import ConflictError, FormatError, KeyMissingError
from replica.model import Frozen, KeyId, random_id

SECRET_BYTES = 32


class DataKey(Frozen, frozen=True):
    """A replica's data key. Its repr never shows the secret."""

    id: KeyId
    secret: bytes
    created_at_ns: int = 0

    def __post_init__(self) -> None:
        if len(self.secret) != SECRET_BYTES:
            raise ValueError(f"a data key has {SECRET_BYTES} bytes")

    def __repr__(self) -> str:
        return f"DataKey(id={self.id}, secret=...)"

    @classmethod
    def generate(cls) -> DataKey:
        """A new random key with a new id."""
        return cls(KeyId(random_id()), os.urandom(SECRET_BYTES), time.time_ns())


class KeySource(Protocol):
    """Where keys are looked up. `Keyring` and `MemoryKeys` are ones."""

    def get(self, key_id: KeyId) -> DataKey:
        """The key, or KeyMissingError."""
        ...


class MemoryKeys:
    """Keys handed over by whoever uses the engine as a library."""

    def __init__(self, *keys: DataKey) -> None:
        self._keys = {k.id: k for k in keys}

    def get(self, key_id: KeyId) -> DataKey:
        if key_id not in self._keys:
            raise KeyMissingError(f"the data key {key_id} is not among the keys given")
        return self._keys[key_id]


class Keyring:
    """A directory of key files `<key id>.key`. Stateless: another process may add keys meanwhile. Thread-safe."""

    def __init__(self, fs: FileSystem, directory: Path) -> None:
        self._fs = fs
        self.directory = directory

    def get(self, key_id: KeyId) -> DataKey:
        """KeyMissingError if the key is not here, FormatError if its file is damaged."""
        path = self._path(key_id)
        if not self._fs.exists(path):
            raise KeyMissingError(
                f"the data key {key_id} is not in {self.directory}",
                hint="put it back from where keys are kept in escrow; nothing else opens what it sealed",
            )
        key = documents.load(self._fs, path, DataKey)
        if key.id != key_id:
            raise FormatError(f"{path} holds another key, {key.id}")
        return key

    def add(self, key: DataKey) -> None:
        """Keep a key; durable when this returns.

        The same key again is fine. ConflictError if another secret is here under its id.
        """
        path = self._path(key.id)
        if self._fs.exists(path):
            if self.get(key.id).secret != key.secret:
                raise ConflictError(f"{path} holds another secret for the key {key.id}; it was not replaced")
            with self._fs.open(path, write=True) as file:  # who wrote it may have been killed before its sync
                file.sync()
        else:
            self._fs.make_directory(self.directory, private=True)
            documents.save(self._fs, path, key, private=True)
        self._fs.settle_names(path, levels=3)

    @property
    def ids(self) -> tuple[KeyId, ...]:
        """Of all keys here, oldest first."""
        keys = [self.get(i) for i in self._ids()]
        return tuple(k.id for k in sorted(keys, key=lambda k: (k.created_at_ns, k.id)))

    @property
    def newest(self) -> DataKey | None:
        """The key to seal with, None if there is none."""
        ids = self.ids
        return self.get(ids[-1]) if ids else None

    def _path(self, key_id: KeyId) -> Path:
        return self.directory / f"{key_id}.key"

    def _ids(self) -> list[KeyId]:
        names = [Path(n) for n in self._fs.list_names(self.directory)]
        return [KeyId(UUID(n.stem)) for n in names if n.suffix == ".key" and not n.name.startswith(".")]
