"""What a sender talks to: one protocol, implemented over HTTPS and inside a process.

`transport.client.HttpReceiver` and `receiver.site.Site.session(identity)` both
implement `Receiver`, and one conformance suite holds them to this page.

The model is a multipart upload in which every call is idempotent: a call whose
answer was lost is made again, unchanged, with the same result.

    info = receiver.replica(id)                            # head, epoch: what to build on
    begun = receiver.begin(id, delta, Begin(info.head.delta_id, info.epoch, header))
    for number, offset, digest, blob in sealed:            # leaving out what `begun` lists
        receiver.put_segment(id, delta, number, offset, digest, blob)
    done = receiver.commit(id, delta, tail, tail_offset, wait_seconds=30)
    while done is None:                                    # still applying
        info = receiver.replica(id)
        if info.applying == delta: sleep
        elif info.head.delta_id == delta: done = info
        else: done = receiver.commit(…)                    # starts again, or raises what stopped it

Every call raises a `ReplicaError`: `TransportError` if the other side could not
be reached or the connection broke (retryable), else the error the receiver
meant. No implementation is thread-safe unless it says so, but for `abort`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from replica.model import DeltaId, DiskId, Epoch, ReplicaId
from replica.transport.wire import (
    Adopt,
    Begin,
    Begun,
    Enrol,
    GrainQuery,
    PointSummary,
    ReplicaInfo,
    StillDamaged,
    TreeQuery,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Receiver(Protocol):
    """The replica site, as one primary sees it."""

    @property
    def bytes_sent(self) -> int:
        """HTTP bytes written so far, before TLS, request lines and headers and repeats included."""

    def replicas(self, machine: str = "") -> list[ReplicaInfo]:
        """Those owned by the caller, with that machine name; all of them without a name."""

    def replica(self, replica_id: ReplicaId) -> ReplicaInfo:
        """UnknownMachineError if there is none, ForbiddenError if it is somebody else's."""

    def enrol(self, replica_id: ReplicaId, enrol: Enrol) -> ReplicaInfo:
        """Make the replica. Again with the same key: no change. Never replaces an owner or a key."""

    def adopt(self, replica_id: ReplicaId, adopt: Adopt) -> ReplicaInfo:
        """Become its only writer. ConflictError: the epoch is another; BusyError: a sender was just at it."""

    def begin(self, replica_id: ReplicaId, delta_id: DeltaId, begin: Begin) -> Begun:
        """Open a delta, discarding another incomplete one. FencedError, BaseMismatchError, BusyError."""

    def put_segment(
        self, replica_id: ReplicaId, delta_id: DeltaId, number: int, offset: int, digest: bytes, blob: Buffer
    ) -> None:
        """Store one sealed segment; any order, any number of times."""

    def commit(
        self, replica_id: ReplicaId, delta_id: DeltaId, tail: bytes, tail_offset: int, wait_seconds: float
    ) -> ReplicaInfo | None:
        """Manifest last. The new state once it is committed, None if it still is at work after `wait_seconds`."""

    def discard(self, replica_id: ReplicaId, delta_id: DeltaId) -> None:
        """Give an incomplete delta up; nothing happens if it is not there."""

    def repair(
        self, replica_id: ReplicaId, disk_id: DiskId, first: int, epoch: Epoch, digest: bytes, content: Buffer
    ) -> StillDamaged:
        """What the source holds in consecutive leaves from `first` on, to repair damaged ones of the head with.

        `digest` is BLAKE3-256 of `content`, which ends with a leaf or with the disk. FencedError, BusyError.
        """

    def nodes(self, replica_id: ReplicaId, disk_id: DiskId, query: TreeQuery) -> bytes:
        """Digests (32 bytes each) of the head's Merkle tree, range after range.

        BaseMismatchError if the head is not `query.base`; BusyError while it is being rewritten.
        """

    def grains(self, replica_id: ReplicaId, disk_id: DiskId, query: GrainQuery) -> bytes:
        """What the grains of leaves of the head are: u64 per grain, then a byte per leaf, leaf after leaf.

        A grain's digest is 0 where it is all zero, else XXH3-64 under the secret with 0 made 1 (little-endian). The
        byte is 1 where the leaf is what the tree says, 0 where it is damaged: its grains are then not known.
        ProtocolError for more than `wire.MAX_GRAIN_BYTES`; else raises what `nodes` raises.
        """

    def abort(self) -> None:
        """From any thread: break off the call that another one is in, which raises TransportError.

        A call that begins later connects anew. Where calls cannot hang (in one process) nothing happens.
        """

    def close(self) -> None:
        """End the session; more calls may follow and open it again."""


class PointSource(Protocol):
    """Reading what a replica holds; the caller owns it. Both implementations of `Receiver` are one, too."""

    def points(self, replica_id: ReplicaId) -> list[PointSummary]:
        """Oldest first."""

    def read(
        self, replica_id: ReplicaId, point: int, disk_id: DiskId, offset: int = 0, length: int | None = None
    ) -> Iterator[bytes]:
        """A disk's bytes at a point, piece by piece, in bounded memory."""

    def receipt(self, replica_id: ReplicaId, point: int) -> bytes:
        """The signed receipt of a point, byte for byte. PointGoneError: no such point, or none was issued yet."""

    def tree(self, replica_id: ReplicaId, disk_id: DiskId, level: int, first: int, count: int) -> bytes:
        """`count` Merkle digests (32 bytes each) of the head, from node `first` of `level`; level 0 is the leaves."""
