"""A head: the disks that deltas are applied to.

skeleton
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from replica.merkle import MerkleTree
from replica.model import Disk, DiskId, State

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Head(Protocol):
    """What `apply` needs. Offsets and lengths in bytes, inside the disk's size."""

    @property
    def disks(self) -> tuple[Disk, ...]:
        """The disks as they are now (during a commit: after `set_disks`, the new ones)."""
        ...

    @property
    def state(self) -> State:
        """The committed state."""
        ...

    def read_into(self, disk_id: DiskId, offset: int, buffer: Buffer) -> None: ...
    def write(self, disk_id: DiskId, offset: int, data: Buffer) -> None: ...
    def zero(self, disk_id: DiskId, offset: int, length: int) -> None: ...
    def set_disks(self, disks: Sequence[Disk]) -> None:
        """Add (empty: reads zero, empty tree), remove, resize (bytes past the old size read zero). Idempotent, and
        finishes what an interrupted call began: whatever is there afterwards, exactly `disks` are."""
        ...

    def tree(self, disk_id: DiskId) -> MerkleTree: ...
    def flush(self) -> None:
        """Between `write` and `settle`: everything written is on stable storage and out of the page cache."""
        ...
