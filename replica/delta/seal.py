"""Sealing: AES-256-GCM under a key that belongs to one delta file and one attempt.

For every delta file 64 bytes are derived with HKDF-SHA256 (RFC 5869) from the
replica's data key, a fresh random salt, and who and what the file is. The
first half is the AES key; the second goes into the header as a *commitment*:
AES-GCM alone lets one ciphertext open under two keys, so the commitment is
compared (in constant time) before anything is opened.

Why no (key, nonce) pair ever repeats. A nonce is kind ‖ segment ‖ chunk, and a
key lives and dies with the `Sealer` that drew its salt: a salt cannot be handed
in, is never stored on the sender's side, and the sealer refuses to seal the
same (kind, segment) twice. Whoever lost the sealed bytes makes a new sealer,
and with it a new salt and a new key.

A seal's associated data are the header's digest, the kind, the position, and
what the plaintext says about itself (raw length, flags): so no sealed piece
opens in another file, at another place, or as something else.

Keys, salts and claims are decided here. The cipher itself is native
(`native/src/seal.rs`), because whole segments are sealed and opened in one call.
"""

from __future__ import annotations

import hmac
import os
import threading
from enum import IntEnum
from typing import TYPE_CHECKING

from blake3 import blake3
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from replica import _native
from replica.delta.header import COMMITMENT_BYTES, SALT_BYTES, Header
from replica.delta.keys import DataKey, Keyring, KeySource
from replica.errors import FormatError, KeyMissingError
from replica.model import DeltaId, Epoch, ReplicaId

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["DataKey", "KeySource", "Keyring", "Kind", "Opener", "Sealer", "derive"]

TAG_BYTES = _native.TAG_BYTES
AES_KEY_BYTES = 32
FORMAT_NAME = b"replica delta v1"


class Kind(IntEnum):
    """What is sealed; the first word of the nonce."""

    MANIFEST = 1
    TABLE = 2
    CHUNK = 3


def derive(key: DataKey, salt: bytes, replica_id: ReplicaId, delta_id: DeltaId, epoch: Epoch) -> tuple[bytes, bytes]:
    """(AES key, commitment) of one delta file."""
    who = replica_id.bytes + epoch.counter.to_bytes(8, "little") + epoch.holder.bytes + delta_id.bytes
    hkdf = HKDF(SHA256(), AES_KEY_BYTES + COMMITMENT_BYTES, salt, FORMAT_NAME + who)
    both = hkdf.derive(key.secret)
    return both[:AES_KEY_BYTES], both[AES_KEY_BYTES:]


class Sealer:
    """Seals one delta file, with a fresh salt. Thread-safe."""

    def __init__(self, key: DataKey, replica_id: ReplicaId, delta_id: DeltaId, epoch: Epoch) -> None:
        salt = os.urandom(SALT_BYTES)
        secret, commitment = derive(key, salt, replica_id, delta_id, epoch)
        self.header = Header(replica_id, delta_id, epoch, key.id, salt, commitment)
        self.cipher = _native.Cipher(secret, blake3(self.header.raw).digest(), "the delta")
        self._lock = threading.Lock()
        self._claimed: set[int] = set()
        self._below = 0
        self._manifest = False

    def claim_segment(self, number: int) -> None:
        """Take segment `number` for sealing: once, or AssertionError (a fault of the engine, never of its input)."""
        with self._lock:
            assert 0 <= number < 1 << 32, f"segment number {number}"
            assert number >= self._below, f"segment {number} is sealed twice"
            assert number not in self._claimed, f"segment {number} is sealed twice"
            self._claimed.add(number)
            while self._below in self._claimed:
                self._claimed.remove(self._below)
                self._below += 1

    def claim_manifest(self) -> None:
        """Take the manifest for sealing: once, or AssertionError."""
        with self._lock:
            assert not self._manifest, "the manifest is sealed twice"
            self._manifest = True

    def seal(self, kind: Kind, segment: int, chunk: int, data: Buffer, raw_bytes: int, flags: int = 0) -> bytes:
        """Ciphertext and tag. The caller has claimed the segment or the manifest and counts its chunks up."""
        return self.cipher.seal(kind, segment, chunk, data, raw_bytes, flags)


class Opener:
    """Opens what the `Sealer` with this header sealed. Thread-safe.

    KeyMissingError if `keys` has no such key, one that is damaged, or one that did not seal this file: nothing is said
    of the file itself then.
    """

    def __init__(self, header: Header, keys: KeySource, name: str = "the delta") -> None:
        try:
            key = keys.get(header.key_id)
        except FormatError as error:
            raise KeyMissingError(
                f"{name} cannot be opened: {error.message}",
                hint="put that key file back from the other site, or from where keys are kept in escrow",
            ) from error
        secret, commitment = derive(key, header.salt, header.replica_id, header.delta_id, header.epoch)
        if not hmac.compare_digest(commitment, header.commitment):
            raise KeyMissingError(f"{name} was not sealed with the key {header.key_id} that is here")
        self.name = name
        self.cipher = _native.Cipher(secret, blake3(header.raw).digest(), name)

    def open(self, kind: Kind, segment: int, chunk: int, sealed: Buffer, raw_bytes: int, flags: int = 0) -> bytes:
        """The plaintext. DamageError unless it was sealed in this file, at this place, as this."""
        return self.cipher.open(kind, segment, chunk, sealed, raw_bytes, flags)
