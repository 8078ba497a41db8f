"""Repair of the replica's head: what the source holds in leaves that rotted there, sent again.

The receiver names leaves of its head that are damaged. What the source has in them
now is sent, a MiB at a time and nothing else, until it names no more; the receiver takes it only
if the committed Merkle root proves that it is what they had held, or what lacks of it
(`store.repair`). So nothing has to be frozen or known here: content that changed
meanwhile, even while it was read, is just not taken.

What could not be repaired has changed at the source. The next delta carries all of
those leaves (`grains`), so that the new state is right whatever becomes of the old.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping
from functools import partial

import numpy as np

from replica import images
from replica.durable import FileSystem
from replica.errors import ReplicaError
from replica.model import DamagedLeaves, Disk, DiskId
from replica.primary.record import MachineRecord
from replica.primary.retry import Patience
from replica.primary.spec import MachineSpec
from replica.tracking.hash import Window
from replica.transport.api import Receiver
from replica.transport.wire import digest_of

BODY_BYTES = 1 << 20
_log = logging.getLogger(__name__)


class Repair:
    """The damaged leaves of one replica during one cycle."""

    def __init__(self, fs: FileSystem, machine: MachineSpec, receiver: Receiver, patience: Patience) -> None:
        self._fs, self._machine, self._receiver, self._patience = fs, machine, receiver, patience
        self.left: list[DamagedLeaves] = []
        """What the source has not as it was; all of it goes into the next delta."""
        self.bytes_sent = 0
        self.bytes_repaired = 0
        """What the receiver took of it: those leaves of the head are good again."""

    def run(self, record: MachineRecord, damaged: tuple[DamagedLeaves, ...]) -> None:
        """Send what the source has in `damaged`, and in what the receiver names after it: it names so many at a time.

        Raises what the receiver raises.
        """
        self.left = []
        disks = {disk.id: disk for disk in record.disks}
        asked = _leaves(damaged, disks)  # what was removed or cut is not there: the next delta says so
        total_bytes = sum(disk.size_bytes for disk in record.disks)
        while asked and self.bytes_sent <= 2 * total_bytes:  # a receiver that names them for ever is not believed
            for leaves in _runs(asked):
                self._repair(record, disks[leaves.disk_id], leaves)
            left = _leaves(self.left, disks)
            if asked <= left:
                break
            info = self._patience.call(partial(self._receiver.replica, record.replica_id))
            asked = _leaves(info.damaged, disks) - left
        if damaged:
            changed = sum(d.stop - d.first for d in self.left)
            outcome = f"{changed} of them have changed since" if changed else "all of them are repaired"
            sent = self.bytes_sent
            _log.warning(
                "machine %r: leaves of its replica rotted; %d bytes sent again, %s", record.machine, sent, outcome
            )

    def _repair(self, record: MachineRecord, disk: Disk, leaves: DamagedLeaves) -> None:
        stop, step = min(leaves.stop, disk.count_leaves), max(1, BODY_BYTES // disk.leaf_bytes)
        for first in range(leaves.first, stop, step):
            last = min(first + step, stop)
            content = self._read(disk, first, last)
            if content is None:
                self.left.append(DamagedLeaves(disk.id, first, last))
                continue
            left = self._patience.call(partial(self._send, record, disk.id, first, content))
            self.left += left
            self.bytes_sent += len(content)
            self.bytes_repaired += max(0, len(content) - sum(d.stop - d.first for d in left) * disk.leaf_bytes)

    def _send(self, record: MachineRecord, disk_id: DiskId, first: int, content: bytes) -> tuple[DamagedLeaves, ...]:
        digest = digest_of(content)
        return self._receiver.repair(record.replica_id, disk_id, first, record.epoch, digest, content).leaves

    def _read(self, disk: Disk, first: int, stop: int) -> bytes | None:
        """The leaves as the source has them; None if it cannot be read there now (the cycle will say why)."""
        spec = next((spec for spec in self._machine.disks if spec.name == disk.name), None)
        if spec is None:
            return None
        begin, end = first * disk.leaf_bytes, min(stop * disk.leaf_bytes, disk.size_bytes)
        buffer = np.empty(end - begin, dtype=np.uint8)
        try:
            with images.open(spec.image, spec.format, fs=self._fs, parents=spec.parents) as image:
                if image.size_bytes < end:
                    return None
                image.read_into(begin, buffer.data)
        except ReplicaError as error:
            _log.warning(
                "machine %r: cannot read disk %r to repair its replica: %s", self._machine.name, disk.name, error
            )
            return None
        return buffer.tobytes()


def _leaves(damaged: Iterable[DamagedLeaves], disks: Mapping[DiskId, Disk]) -> set[tuple[DiskId, int]]:
    """Each of them, of the disks that there are: a receiver names a few thousand at a time."""
    return {
        (leaves.disk_id, number)
        for leaves in damaged
        if leaves.disk_id in disks
        for number in range(leaves.first, min(leaves.stop, disks[leaves.disk_id].count_leaves))
    }


def _runs(leaves: Iterable[tuple[DiskId, int]]) -> Iterator[DamagedLeaves]:
    """Ascending, with neighbours in one."""
    ordered = sorted(leaves, key=lambda leaf: (leaf[0].bytes, leaf[1]))
    for _, run in itertools.groupby(enumerate(ordered), lambda item: (item[1][0], item[1][1] - item[0])):
        found = [leaf for _, leaf in run]
        yield DamagedLeaves(found[0][0], found[0][1], found[-1][1] + 1)


def mark_dirty(window: Window, disk: Disk, leaves: list[DamagedLeaves]) -> None:
    """Report every grain of these leaves that the window has as dirty, whether it changed or not."""
    if window.dirty is None:
        return
    for entry in leaves:
        if entry.disk_id == disk.id:
            first = max(0, entry.first * disk.grains_per_leaf - window.first_grain)
            stop = max(0, entry.stop * disk.grains_per_leaf - window.first_grain)
            window.dirty[first:stop] = 1
