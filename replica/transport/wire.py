"""What travels: JSON documents, segment frames and problems, each bounded and checked once.

Documents are JSON and described by the structs below; decoding refuses
unknown fields, wrong types and values out of bounds (`ProtocolError`). Bulk
data travels in frames, not in JSON. A frame is little-endian:

    offset  size  field
         0     4  number   segment number; 0xFFFFFFFF marks the tail (sealed manifest and trailer)
         4     8  offset   where the blob lies in the delta file
        12     4  length   bytes of the blob, at least 1
        16    32  digest   BLAKE3-256 of the blob
        48     …  blob

A segment body is one or more frames with consecutive numbers, the first being
the number in the URL; a commit body is exactly one tail frame. The digest is
checked before the store sees a byte: a bit that flipped on the way (TLS ends
at a proxy, memory rots) costs a repeat of that request and nothing else.

An error is a `Problem` (RFC 9457). `to_problem` and `from_problem` carry a
`ReplicaError` over the wire and give back the very class that was raised.

    frame = encode_frame(7, offset, digest, blob)          # 48 bytes; the blob follows
    frames = decode_segments(body, first=7)                # views into the body, nothing copied
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple, TypeVar
from uuid import UUID

import blake3
import msgspec

from replica.errors import BY_CODE, BaseMismatchError, ProtocolError, ReplicaError, TransportError
from replica.model import DIGEST_BYTES, DamagedLeaves, DeltaId, Epoch, Frozen, KeyId, ReplicaId, State, check_name

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAX_BODY_BYTES = 16 << 20
"""A segment body. A segment is about 4 MiB, so several small ones fit and the largest one does."""
MAX_TAIL_BYTES = 32 << 20
"""A manifest with its trailer: some 400,000 segments, 1.5 TiB in one delta. One identity's share of body memory."""
MAX_DOCUMENT_BYTES = 64 << 10
"""A JSON document in a request."""
MAX_RESPONSE_BYTES = 16 << 20
"""A JSON document in an answer (all replicas of one primary)."""
MAX_FILE_HEADER_BYTES = 4096
MAX_WAIT_SECONDS = 60
MAX_FIRST_EPOCH = 1 << 62
MAX_TREE_NODES = 1 << 16
MAX_DAMAGED_LEAVES = 4096
MAX_RANGES = 2048
"""Ranges of nodes or leaves in one question: about half of what a document may have."""
MAX_GRAIN_BYTES = 64 << 20
"""What one question about grains may make the receiver read."""
SECRET_BYTES = 192
KEY_BYTES = 32

TAIL_NUMBER = 0xFFFFFFFF
FRAME = struct.Struct(f"<IQI{DIGEST_BYTES}s")
PROBLEM_TYPE = "application/problem+json"
DOCUMENT_TYPE = "application/json"
_URN = "urn:replica:error:"

T = TypeVar("T")


class Problem(Frozen, frozen=True, omit_defaults=True):
    """An error on the wire, RFC 9457. `head` is the actual state when the delta's base was not it."""

    type: str
    title: str
    status: int
    detail: str
    hint: str = ""
    retryable: bool = False
    head: UUID | None = None


class ReplicaInfo(Frozen, frozen=True):
    """What its owner may know of a replica.

    `applying` is the delta whose commit is under way (asked for, not yet
    done); `receiving` the one that is open for segments. `stopped` says why
    the replica takes nothing at present; everything it has is kept.
    `damaged` are leaves of the head that rotted (at most `MAX_DAMAGED_LEAVES`
    at a time): the sender sends what the source has in them. `receipt`
    is the head's (docs/FORMAT.md), null in lists and while there is none.
    """

    replica_id: ReplicaId
    machine: str
    owner: str
    epoch: Epoch
    head: State
    applying: DeltaId | None = None
    receiving: DeltaId | None = None
    stopped: Problem | None = None
    damaged: tuple[DamagedLeaves, ...] = ()
    receipt: bytes | None = None


class StillDamaged(Frozen, frozen=True):
    """The leaves among those just sent whose content was not what they had held."""

    leaves: tuple[DamagedLeaves, ...]


class Enrol(Frozen, frozen=True):
    """Make a replica. The data key travels here, inside mutual TLS, and nowhere else."""

    machine: str
    key_id: KeyId
    key: bytes
    epoch: Epoch

    def __post_init__(self) -> None:
        check_name(self.machine, "machine name")
        if len(self.key) != KEY_BYTES:
            raise ValueError(f"a data key has {KEY_BYTES} bytes")
        if self.epoch.counter > MAX_FIRST_EPOCH:
            raise ValueError(f"an epoch begins at {MAX_FIRST_EPOCH} at most, for it grows with every adoption")

    def __repr__(self) -> str:
        return f"Enrol(machine={self.machine!r}, key_id={self.key_id}, key=…, epoch={self.epoch})"


class Adopt(Frozen, frozen=True):
    """Make `holder` the only writer, provided that the epoch still is `expected`."""

    expected: Epoch
    holder: UUID


class Begin(Frozen, frozen=True):
    """Open a delta on top of `base`. `header` is the delta file's header, as it will lie in the file."""

    base: DeltaId
    epoch: Epoch
    header: bytes

    def __post_init__(self) -> None:
        if not 0 < len(self.header) <= MAX_FILE_HEADER_BYTES:
            raise ValueError(f"a delta file's header has 1 to {MAX_FILE_HEADER_BYTES} bytes")


class Begun(Frozen, frozen=True):
    """Which segments are at the receiver already: half-open ranges of numbers, ascending."""

    received: list[tuple[int, int]]


class TreeQuery(Frozen, frozen=True):
    """Digests of the Merkle tree of the head that `base` made: nodes of `level` (0 the leaves), by ranges.

    A range is (first, count); they ascend and do not overlap, here and below.
    """

    base: DeltaId
    level: int
    ranges: list[tuple[int, int]]

    def __post_init__(self) -> None:
        _check_ranges(self.ranges, MAX_TREE_NODES)


class GrainQuery(Frozen, frozen=True):
    """Digests of the grains of some leaves of the head that `base` made, keyed with the asking tracker's secret.

    The secret tells nobody anything of the disk; with it, content that collides could be constructed. It travels to
    the site that holds the content anyway, and is kept there no longer than the answer takes.
    """

    base: DeltaId
    secret: bytes
    ranges: list[tuple[int, int]]

    def __post_init__(self) -> None:
        if len(self.secret) != SECRET_BYTES:
            raise ValueError(f"a tracker's secret has {SECRET_BYTES} bytes")
        _check_ranges(self.ranges, MAX_TREE_NODES)

    def __repr__(self) -> str:
        return f"GrainQuery(base={self.base}, secret=…, ranges={self.ranges})"


def _check_ranges(ranges: list[tuple[int, int]], limit: int) -> None:
    reached = 0
    for first, count in ranges:
        if first < reached or count < 1:
            raise ValueError("ranges are (first, count), ascending and not empty")
        reached = first + count
    if not 1 <= len(ranges) <= MAX_RANGES or sum(count for _, count in ranges) > limit or reached > 1 << 32:
        raise ValueError(f"1 to {MAX_RANGES} ranges of at most {limit} together can be asked for")


class PointSummary(Frozen, frozen=True):
    """One recovery point, as listed."""

    state: State
    stored_bytes: int
    restorable: bool


class Frame(NamedTuple):
    """One segment (or tail) inside a body; `blob` is a view into it."""

    number: int
    offset: int
    digest: bytes
    blob: memoryview


def encode(document: Frozen | list[ReplicaInfo] | list[PointSummary]) -> bytes:
    return msgspec.json.encode(document)


def decode(data: Buffer, kind: type[T], what: str) -> T:
    """The document in `data`, or ProtocolError naming `what`."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(f"{what} is not valid: {error}") from error


def digest_of(blob: Buffer) -> bytes:
    return blake3.blake3(blob).digest()


def encode_frame(number: int, offset: int, digest: bytes, blob: Buffer) -> bytes:
    """The 48 bytes that go before `blob`."""
    return FRAME.pack(number, offset, memoryview(blob).nbytes, digest)


def decode_segments(body: Buffer, first: int) -> list[Frame]:
    """The frames of a segment body whose URL says `first`. Every digest was checked when this returns."""
    frames: list[Frame] = []
    view = memoryview(body).cast("B")
    while view:
        frame, view = _split(view)
        if frame.number != first + len(frames) or frame.number == TAIL_NUMBER:
            raise ProtocolError(f"segment {frame.number} where {first + len(frames)} was to come")
        frames.append(frame)
    if not frames:
        raise ProtocolError("a segment body without a segment")
    for frame in frames:
        check_digest(frame)
    return frames


def decode_tail(body: Buffer) -> Frame:
    """The one frame of a commit body, its digest checked."""
    frame, rest = _split(memoryview(body).cast("B"))
    if rest or frame.number != TAIL_NUMBER:
        raise ProtocolError("a commit body is one frame: the manifest and trailer")
    check_digest(frame)
    return frame


def check_digest(frame: Frame) -> None:
    if digest_of(frame.blob) != frame.digest:
        what = "the manifest" if frame.number == TAIL_NUMBER else f"segment {frame.number}"
        raise TransportError(f"{what} was damaged on the way: its digest does not fit", hint="it is sent again")


def _split(view: memoryview) -> tuple[Frame, memoryview]:
    if len(view) < FRAME.size:
        raise ProtocolError(f"a body ends inside a frame's header of {FRAME.size} bytes")
    number, offset, length, digest = FRAME.unpack_from(view)
    end = FRAME.size + length
    if length == 0 or end > len(view):
        raise ProtocolError(f"a frame of {length} bytes in a body with {len(view) - FRAME.size} left")
    return Frame(number, offset, digest, view[FRAME.size : end]), view[end:]


def to_problem(error: ReplicaError) -> Problem:
    """The problem document of an error."""
    return Problem(
        type=_URN + error.code,
        title=type(error).__name__.removesuffix("Error"),
        status=error.status,
        detail=error.message,
        hint=error.hint,
        retryable=error.retryable,
        head=error.head if isinstance(error, BaseMismatchError) else None,
    )


def from_problem(problem: Problem) -> ReplicaError:
    """The error a problem document was made from; an unknown code keeps its meaning by status and retryable."""
    kind = BY_CODE.get(problem.type.removeprefix(_URN))
    if kind is None:
        kind = TransportError if problem.retryable else ProtocolError if problem.status < 500 else ReplicaError
    if kind is BaseMismatchError:
        return BaseMismatchError(problem.detail, hint=problem.hint, head=problem.head)
    return kind(problem.detail, hint=problem.hint)
