"""A receipt: what the receiver signs of a point, and what it proves. Signing and checking it is in `signing`.

A receipt file is two lines:

    <body>         JSON of `Receipt`, exactly as the engine encodes it; another spelling is refused
    <signature>    Ed25519 over "replica receipt v1\\n" ‖ body, 128 lower-case hex digits

It says: this receiver had this point durable on its storage, with these Merkle
roots, after it had read the changed leaves back. A point is *proven* if every
leaf of every disk had been recomputed from the source for this very point;
otherwise the receipt says since when, and which trackers were believed.

Receipts of a replica are a chain in the order in which they were issued, over
branches and changes of key: `serial` counts them, and `previous` is the link
that the one before made:

    link = BLAKE3 derive-key "replica 2026-11 receipt link v1" (previous ‖ BLAKE3(body))

A receipt that went with its point leaves only the digest of its body: from the
digests of those between two receipts anybody can compute that one leads to the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

import msgspec
from blake3 import blake3

from replica.errors import FormatError, RootMismatchError
from replica.model import DIGEST_BYTES, MAX_DISKS, DeltaId, DiskId, Epoch, Frozen, ReplicaId, State

FORMAT = 1
MAX_RECEIPT_BYTES = 1 << 20
NO_LINK = bytes(DIGEST_BYTES).hex()
"""What the first receipt has before it."""

_LINK_CONTEXT = "replica 2026-11 receipt link v1"
_HEX = re.compile(r"[0-9a-f]{64}")
_EXPORT = "have it exported anew with `replica receipt export`; if it is so at the receiver, it rotted there"
_DISTRUST = "one of them was exchanged, or the receiver signed another history: ask its operator which and why"
_SIGNATURE = re.compile(rb"[0-9a-f]{128}")


class ReceiptDisk(Frozen, frozen=True):
    """One disk at the point. `root` is in hex; `read_point` and `trusted` as in `model.DiskState`."""

    id: DiskId
    name: str
    size_bytes: int
    leaf_bytes: int
    root: str
    read_point: int
    trusted: tuple[str, ...]


class Receipt(Frozen, frozen=True):
    """The signed statement. `committed_at_ns` is by the receiver's wall clock."""

    format: int
    algorithm: Literal["Ed25519"]
    key_id: str
    serial: int
    previous: str
    replica_id: ReplicaId
    machine: str
    epoch: Epoch
    delta_id: DeltaId
    point: int
    frozen_at_ns: int
    committed_at_ns: int
    proven: bool
    disks: tuple[ReceiptDisk, ...]

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"receipts of format {self.format} are not known here")
        if self.serial < 1 or self.point < 1 or len(self.disks) > MAX_DISKS:
            raise ValueError("serial, point or number of disks is out of range")
        if not all(_HEX.fullmatch(text) for text in (self.key_id, self.previous, *(d.root for d in self.disks))):
            raise ValueError("key id, previous link and roots are 64 lower-case hex digits")
        if self.proven != _is_proven(self.point, (disk.read_point for disk in self.disks)):
            raise ValueError("`proven` is not what the disks' `read_point` say")

    @classmethod
    def of(cls, state: State, machine: str, key_id: str, committed_at_ns: int, before: SignedReceipt | None) -> Receipt:
        """What is to be signed for a committed point, after the receipt that was issued before it."""
        disks = tuple(
            ReceiptDisk(
                entry.disk.id,
                entry.disk.name,
                entry.disk.size_bytes,
                entry.disk.leaf_bytes,
                entry.root.hex(),
                entry.read_point,
                entry.trusted,
            )
            for entry in state.disks
        )
        return cls(
            format=FORMAT,
            algorithm="Ed25519",
            key_id=key_id,
            serial=before.receipt.serial + 1 if before else 1,
            previous=before.link if before else NO_LINK,
            replica_id=state.replica_id,
            machine=machine,
            epoch=state.epoch,
            delta_id=state.delta_id,
            point=state.point,
            frozen_at_ns=state.frozen_at_ns,
            committed_at_ns=committed_at_ns,
            proven=_is_proven(state.point, (entry.read_point for entry in state.disks)),
            disks=disks,
        )

    def describes(self, state: State) -> bool:
        """Whether it is a receipt of exactly this state: same ids, time, disks and roots."""
        same = Receipt.of(state, self.machine, self.key_id, self.committed_at_ns, None)
        return msgspec.structs.replace(same, serial=self.serial, previous=self.previous) == self


def _is_proven(point: int, read_points: Iterable[int]) -> bool:
    found = set(read_points)
    return found == {point}


class SignedReceipt(Frozen, frozen=True):
    """A receipt with its exact bytes. Made by `signing.sign` and by `parse`, which does not check the signature."""

    receipt: Receipt
    body: bytes
    signature: bytes

    @property
    def data(self) -> bytes:
        """The file."""
        return self.body + b"\n" + self.signature.hex().encode() + b"\n"

    @property
    def body_digest(self) -> bytes:
        return blake3(self.body).digest()

    @property
    def link(self) -> str:
        """What the next receipt names as its `previous`."""
        return next_link(self.receipt.previous, self.body_digest)


def parse(data: bytes, name: str = "the receipt") -> SignedReceipt:
    """The receipt in `data`, its form checked to the last byte, its signature not. FormatError naming `name`."""
    body, _, rest = data.partition(b"\n")
    if len(data) > MAX_RECEIPT_BYTES or rest[128:] != b"\n" or not _SIGNATURE.fullmatch(rest[:128]):
        raise FormatError(
            f"{name} is no receipt: a receipt is one line of JSON and a signature of 128 hex digits", hint=_EXPORT
        )
    try:
        receipt = msgspec.json.decode(body, type=Receipt)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise FormatError(f"{name} is no valid receipt: {error}", hint=_EXPORT) from error
    if msgspec.json.encode(receipt) != body:
        raise FormatError(f"{name} is not in the one form a receipt may have", hint=_EXPORT)
    return SignedReceipt(receipt, body, bytes.fromhex(rest[:128].decode()))


def next_link(previous: str, body_digest: bytes) -> str:
    """The link that a receipt makes, from the one before it and the digest of its body."""
    return blake3(bytes.fromhex(previous) + body_digest, derive_key_context=_LINK_CONTEXT).hexdigest()


def check_chain(older: SignedReceipt, newer: SignedReceipt, between: bytes) -> None:
    """FormatError unless `newer` follows `older`. `between`: body digests of receipts before `newer`, 32 bytes each.

    Only those after `older` are used: there may be more.
    """
    one, other = older.receipt, newer.receipt
    missing = other.serial - one.serial - 1
    name = f"the receipt of point {other.point} (number {other.serial})"
    if one.replica_id != other.replica_id:
        raise FormatError(
            f"{name} is of another replica than the one before it", hint="give the receipts of one replica at a time"
        )
    if missing < 0:
        raise FormatError(f"{name} does not follow number {one.serial}: there are two of that number", hint=_DISTRUST)
    if other.previous == NO_LINK:
        raise FormatError(
            f"{name} names none before it: the chain was begun anew",
            hint="the receipt before it was damaged at the receiver when this one was signed; check those after it",
        )
    if missing * DIGEST_BYTES > len(between):
        raise FormatError(
            f"{name} cannot be linked to number {one.serial}: {missing} receipts between them are not here",
            hint="give the files between them, or the `.links` file that is kept and exported beside the receipt",
        )
    link, start = older.link, len(between) - missing * DIGEST_BYTES
    for at in range(start, len(between), DIGEST_BYTES):
        link = next_link(link, between[at : at + DIGEST_BYTES])
    if link != other.previous:
        raise FormatError(
            f"{name} does not follow number {one.serial}: the receipts between them are other ones", hint=_DISTRUST
        )


def check_shipped(signed: SignedReceipt, state: State) -> None:
    """What a sender checks: RootMismatchError unless the receipt is of exactly the state that it shipped."""
    if not signed.receipt.describes(state):
        raise RootMismatchError(
            f"the receiver's receipt of delta {signed.receipt.delta_id} is not of what was shipped as point "
            f"{state.point} (delta {state.delta_id})",
            hint="the point is not trusted; both sides are compared, and what differs is shipped",
        )
