"""The key that a receiver signs receipts with: one per storage, the receiver's own.

    <storage>/receipt.key      Ed25519, PEM (PKCS #8), mode 0600
    <storage>/receipt.pub      the public key, PEM: what auditors are given

It is made at first need, and only if none ever existed: neither of the two
files is there, and no replica in the storage has a receipt. Otherwise a missing
key was lost, and a new one made on the quiet would look to an auditor like
somebody else's. Then signing fails with an error that names the file; whoever
wants a new key removes the public key as well and says so to the auditors.

The private key's name comes first, so a public key alone means a lost one; a
private key alone is a cut creation: its name may be in the page cache only, and
after a sync that failed a further one says nothing, so it gets its name anew
before it signs or the public one is written from it.
"""

from __future__ import annotations

import threading
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from replica.durable import FileSystem
from replica.errors import FormatError, KeyMissingError
from replica.signing import encode_public
from replica.store.layout import Layout, replica_directories

KEY_NAME = "receipt.key"
MAX_KEY_BYTES = 16 << 10


class ReceiptKey:
    """The signing key in a file. Read once, at first need. Thread-safe."""

    def __init__(self, fs: FileSystem, path: Path, storages: tuple[Path, ...]) -> None:
        """`storages`: where receipts that the key signed may be."""
        self._fs = fs
        self.path = path
        self._storages = storages
        self._mutex = threading.Lock()
        self._key: Ed25519PrivateKey | None = None

    @classmethod
    def of_storage(cls, fs: FileSystem, storage: Path) -> ReceiptKey:
        return cls(fs, storage / KEY_NAME, (storage,))

    @property
    def public_path(self) -> Path:
        return self.path.with_suffix(".pub")

    def get(self) -> Ed25519PrivateKey:
        """The key; makes it if there never was one. KeyMissingError, FormatError, StorageError."""
        with self._mutex:
            if self._key is None:
                self._key = self._load_or_make()
            return self._key

    def _load_or_make(self) -> Ed25519PrivateKey:
        if not self._fs.exists(self.path) or not self._fs.exists(self.public_path):
            self._make()
        key = self._load()
        if self._fs.read_bytes(self.public_path, MAX_KEY_BYTES) != encode_public(key.public_key()):
            raise FormatError(
                f"{self.public_path} is not the public key of {self.path}",
                hint="put back the one that was lost or exchanged; points are committed meanwhile, receipts wait",
            )
        return key

    def _load(self) -> Ed25519PrivateKey:
        data = self._fs.read_bytes(self.path, MAX_KEY_BYTES)
        hint = "put it back from a copy; points are committed meanwhile, their receipts are signed when it is there"
        try:
            key = serialization.load_pem_private_key(data, None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise FormatError(f"the key of receipts {self.path} is damaged: {error}", hint=hint) from error
        if not isinstance(key, Ed25519PrivateKey):
            raise FormatError(f"the key of receipts {self.path} is no Ed25519 key", hint=hint)
        return key

    def _make(self) -> None:
        """Both files, durably. Under a lock, since two processes may want the first receipt at the same time."""
        with self._fs.lock(self.path.with_suffix(".lock"), wait=True):
            if not self._fs.exists(self.path):
                self._check_new()
                self._publish(
                    Ed25519PrivateKey.generate().private_bytes(
                        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
                    )
                )
            elif self._fs.exists(self.public_path):
                return
            else:
                self._load()
                self._publish(self._fs.read_bytes(self.path, MAX_KEY_BYTES))
            self._fs.replace_bytes(self.public_path, encode_public(self._load().public_key()))

    def _check_new(self) -> None:
        if self._fs.exists(self.public_path) or self._was_used():
            raise KeyMissingError(
                f"the key of receipts {self.path} is gone",
                hint=f"put it back from a copy; if it is lost, remove {self.public_path} and make a new one with "
                f"`openssl genpkey -algorithm ed25519 -out {self.path}`, and tell whoever checks receipts; "
                "points are committed meanwhile",
            )

    def _publish(self, private: bytes) -> None:
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        self._fs.unlink(temporary)
        with self._fs.create(temporary, private=True) as file:
            file.write(0, private)
            file.sync()
        self._fs.publish(temporary, self.path)

    def _was_used(self) -> bool:
        found = (directory for storage in self._storages for directory in replica_directories(self._fs, storage))
        return any(self._fs.list_names(Layout(directory).receipts) for directory in found)
