"""Resync: trackers that are lost, damaged or foreign are rebuilt to describe the replica's head (`tracking.rebuild`).

    resync = Resync(fs, directory, machine, receiver, patience)
    found = resync.run(base, disks, paths, …)        # disk id -> what was found

It costs one local read, and of the wire a walk over two trees; the cycle then
ships what differs, as it always does. A source that stands still is rebuilt
inside the instant that becomes the point, and only the windows that differ are
read again; a machine with freeze commands is rebuilt while it runs, so that
the long read is no time of its freeze.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from replica.durable import FileSystem
from replica.images import Image
from replica.model import DeltaId, Disk, DiskId, ReplicaId, State
from replica.primary.retry import Patience
from replica.progress import Progress, silent
from replica.tracking.rebuild import Ranges, Rebuilt, rebuild
from replica.transport.api import Receiver
from replica.transport.wire import GrainQuery, TreeQuery

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeadDisk:
    """`tracking.rebuild.Head` over the wire: one disk of the head that `base` made. Every question is patient."""

    receiver: Receiver
    patience: Patience
    replica_id: ReplicaId
    disk_id: DiskId
    base: DeltaId

    def nodes(self, level: int, ranges: Ranges) -> bytes:
        query = TreeQuery(self.base, level, ranges)
        return self.patience.call(lambda: self.receiver.nodes(self.replica_id, self.disk_id, query))

    def grains(self, secret: bytes, ranges: Ranges) -> bytes:
        query = GrainQuery(self.base, secret, ranges)
        return self.patience.call(lambda: self.receiver.grains(self.replica_id, self.disk_id, query))


def resync(
    fs: FileSystem,
    directory: Path,
    receiver: Receiver,
    patience: Patience,
    base: State,
    disks: Sequence[Disk],
    open_image: Callable[[Disk], Image],
    progress: Progress = silent,
) -> Mapping[DiskId, Rebuilt]:
    """Rebuild the trackers of `disks`, which `base` (the replica's head) has, from the images that are opened.

    Raises DamageError if the head's tree is damaged, BaseMismatchError if the head is another by now, and what the
    images, the link and the state directory raise.
    """
    found: dict[DiskId, Rebuilt] = {}
    done = total = 0
    if progress is not silent:
        for disk in disks:
            with open_image(disk) as image:
                total += sum(stop - start for start, stop in image.allocated(0, image.size_bytes))
    for disk in disks:
        state = base.disk(disk.id)
        assert state is not None
        head = HeadDisk(receiver, patience, base.replica_id, disk.id, base.delta_id)
        report = _from(progress, done, total)
        with open_image(disk) as image:
            rebuilt = rebuild(fs, directory, state, base.delta_id, image, head, patience.check, report)
        done += rebuilt.bytes_read
        if rebuilt.leaves_unknown:
            _log.warning(
                "disk %r: the replica cannot say what %d leaves of its head hold, they are shipped anew; "
                "`replica verify` there names them",
                disk.name,
                rebuilt.leaves_unknown,
            )
        _log.info("disk %r: %d bytes of leaves differ from the replica's head", disk.name, rebuilt.bytes_differing)
        found[disk.id] = rebuilt
    return found


def _from(progress: Progress, base: int, total: int) -> Callable[[int], None]:
    return lambda done: progress(min(base + done, total), total) if total else None
