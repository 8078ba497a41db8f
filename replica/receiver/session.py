"""Acting for one identity, inside the process: `transport.api.Receiver` and `PointSource` over a `Site`.

Waiting is the only thing that differs between callers: `commit` blocks its
thread for as long as it was told; the HTTPS server waits in its event loop on
`start_commit(…).done` and then asks for the `outcome`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from replica.errors import UnknownMachineError
from replica.model import DeltaId, Disk, DiskId, Epoch, ReplicaId, State
from replica.receiver.slot import Job, Slot
from replica.receiver.stores import OpenPoint
from replica.transport.wire import (
    Adopt,
    Begin,
    Begun,
    Enrol,
    Frame,
    GrainQuery,
    PointSummary,
    ReplicaInfo,
    StillDamaged,
    TreeQuery,
    check_digest,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from replica.receiver.site import Site

READ_BYTES = 1 << 20


class Session:
    """`transport.api.Receiver` and `PointSource` inside this process, for one identity. Thread-safe."""

    def __init__(self, site: Site, identity: str) -> None:
        self._site = site
        self.identity = identity

    @property
    def bytes_sent(self) -> int:
        """Always 0: nothing leaves the process."""
        return 0

    def abort(self) -> None:
        """Nothing hangs in one process."""

    def close(self) -> None:
        """Nothing to close."""

    def check_allowed(self) -> None:
        """ForbiddenError if no entry lets this identity in. Does not block."""
        self._site.check_allowed(self.identity)

    def check_owned(self, replica_id: ReplicaId) -> None:
        """What every call about a replica asks first: ForbiddenError, UnknownMachineError, or why it is unreadable."""
        self._slot(replica_id)

    def replicas(self, machine: str = "") -> list[ReplicaInfo]:
        return self._site.owned(self.identity, machine)

    def replica(self, replica_id: ReplicaId) -> ReplicaInfo:
        return self._slot(replica_id).info(receipt=True)

    def enrol(self, replica_id: ReplicaId, enrol: Enrol) -> ReplicaInfo:
        return self._site.enrol(self.identity, replica_id, enrol)

    def adopt(self, replica_id: ReplicaId, adopt: Adopt) -> ReplicaInfo:
        slot = self._slot(replica_id)
        slot.adopt(adopt)
        return slot.info()

    def begin(self, replica_id: ReplicaId, delta_id: DeltaId, begin: Begin) -> Begun:
        return self._slot(replica_id).begin(delta_id, begin)

    def put_segment(
        self, replica_id: ReplicaId, delta_id: DeltaId, number: int, offset: int, digest: bytes, blob: Buffer
    ) -> None:
        frame = Frame(number, offset, digest, memoryview(blob).cast("B"))
        check_digest(frame)
        self.put_frames(replica_id, delta_id, [frame])

    def put_frames(self, replica_id: ReplicaId, delta_id: DeltaId, frames: list[Frame]) -> None:
        """Several segments whose digests were checked."""
        self._slot(replica_id).receive(delta_id, frames)

    def commit(
        self, replica_id: ReplicaId, delta_id: DeltaId, tail: bytes, tail_offset: int, wait_seconds: float
    ) -> ReplicaInfo | None:
        job = self.start_commit(replica_id, delta_id, tail, tail_offset)
        try:
            job.done.exception(timeout=wait_seconds)
        except TimeoutError:
            return None
        return self.outcome(replica_id, job)

    def start_commit(self, replica_id: ReplicaId, delta_id: DeltaId, tail: bytes, tail_offset: int) -> Job:
        """`commit` for callers that wait in their own way: on `Job.done`, then `outcome`."""
        return self._slot(replica_id).start_commit(delta_id, tail, tail_offset)

    def outcome(self, replica_id: ReplicaId, job: Job) -> ReplicaInfo:
        return self._slot(replica_id).outcome(job)

    def discard(self, replica_id: ReplicaId, delta_id: DeltaId) -> None:
        self._slot(replica_id).discard(delta_id)

    def repair(
        self, replica_id: ReplicaId, disk_id: DiskId, first: int, epoch: Epoch, digest: bytes, content: Buffer
    ) -> StillDamaged:
        frame = Frame(first, 0, digest, memoryview(content).cast("B"))
        check_digest(frame)
        return self.repair_leaves(replica_id, disk_id, epoch, frame)

    def repair_leaves(self, replica_id: ReplicaId, disk_id: DiskId, epoch: Epoch, frame: Frame) -> StillDamaged:
        """Leaves whose digest was checked."""
        return StillDamaged(self._slot(replica_id).repair(disk_id, frame.number, epoch, frame.blob))

    def nodes(self, replica_id: ReplicaId, disk_id: DiskId, query: TreeQuery) -> bytes:
        return self._site.nodes(self.identity, replica_id, disk_id, query)

    def grains(self, replica_id: ReplicaId, disk_id: DiskId, query: GrainQuery) -> bytes:
        return self._site.grains(self.identity, replica_id, disk_id, query)

    def points(self, replica_id: ReplicaId) -> list[PointSummary]:
        points = self._site.reader(self.identity, replica_id).points()
        return [PointSummary(p.state, p.stored_bytes, p.restorable) for p in points]

    def read(
        self, replica_id: ReplicaId, point: int, disk_id: DiskId, offset: int = 0, length: int | None = None
    ) -> Iterator[bytes]:
        with self.open_point(replica_id, point) as opened:
            disk = find_disk(opened.state, str(disk_id))
            stop = disk.size_bytes if length is None else min(disk.size_bytes, offset + length)
            yield from read_pieces(opened, disk, offset, stop)

    def open_point(self, replica_id: ReplicaId, point: int) -> OpenPoint:
        """A pinned point, for reading; a context manager."""
        return self._site.reader(self.identity, replica_id).open_point(point)

    def receipt(self, replica_id: ReplicaId, point: int) -> bytes:
        return self._site.reader(self.identity, replica_id).receipt(point)

    def tree(self, replica_id: ReplicaId, disk_id: DiskId, level: int, first: int, count: int) -> bytes:
        return self._site.tree(self.identity, replica_id, disk_id, level, first, count)

    def _slot(self, replica_id: ReplicaId) -> Slot:
        return self._site.slot(self.identity, replica_id)


def find_disk(state: State, disk: str) -> Disk:
    """A disk of a state by its id or its name. UnknownMachineError names those there are."""
    for entry in state.disks:
        if disk == str(entry.disk.id) or (disk == entry.disk.name and entry.disk.id != state.files):
            return entry.disk
    names = ", ".join(entry.disk.name for entry in state.machine_disks) or "none"
    raise UnknownMachineError(f"point {state.point} has no disk {disk!r}", hint=f"it has {names}")


def read_pieces(point: OpenPoint, disk: Disk, start: int, stop: int) -> Iterator[bytes]:
    """The disk's bytes [start, stop) in pieces of at most 1 MiB."""
    for offset in range(start, stop, READ_BYTES):
        buffer = bytearray(min(READ_BYTES, stop - offset))
        point.read_into(disk.id, offset, buffer)
        yield bytes(buffer)
