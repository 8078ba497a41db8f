"""Signing receipts, and checking what was signed, with nothing but a public key: Ed25519 (RFC 8032).

Apart from `receipt`, because of the two only the receiver and an auditor need it, and a sender is started often.
"""

from __future__ import annotations

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from replica.errors import ConfigError, FormatError
from replica.receipt import Receipt, SignedReceipt

_DOMAIN = b"replica receipt v1\n"


def sign(receipt: Receipt, key: Ed25519PrivateKey) -> SignedReceipt:
    """Deterministic: the same receipt and key give the same bytes."""
    body = msgspec.json.encode(receipt)
    return SignedReceipt(receipt, body, key.sign(_DOMAIN + body))


def verify(signed: SignedReceipt, key: Ed25519PublicKey) -> None:
    """FormatError unless the receipt was signed, bit for bit, by the owner of this key."""
    receipt = signed.receipt
    if receipt.key_id != key_id_of(key):
        raise FormatError(
            f"the receipt of point {receipt.point} is signed by the key {receipt.key_id[:16]}…, not by "
            f"{key_id_of(key)[:16]}…",
            hint="check it with that receiver's key; after a change of key the old one is needed for old receipts",
        )
    try:
        key.verify(signed.signature, _DOMAIN + signed.body)
    except InvalidSignature:
        raise FormatError(
            f"the signature of the receipt of point {receipt.point} does not fit",
            hint="it was changed after it was signed; it proves nothing",
        ) from None


def key_id_of(key: Ed25519PublicKey) -> str:
    """SHA-256 of the public key's DER form: `openssl pkey -pubin -in receipt.pub -outform DER | sha256sum`."""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo))
    return digest.finalize().hex()


def encode_public(key: Ed25519PublicKey) -> bytes:
    """PEM."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def decode_public(data: bytes, name: str) -> Ed25519PublicKey:
    """The public key in a PEM file. ConfigError."""
    try:
        key = serialization.load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{name} is no public key: {error}", hint="give the receiver's receipt.pub") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{name} is no Ed25519 key", hint="give the receiver's receipt.pub")
    return key
