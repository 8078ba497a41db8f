"""read: a point's bytes through the chain of inverses down to the head.

skeleton
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from replica.delta.change import DiskChange
from replica.delta.extents import Rows
from replica.model import DiskId, State

if TYPE_CHECKING:
    from typing_extensions import Buffer

Below = Callable[[DiskId, int, memoryview], None]
"""Reads the head: (disk, offset, buffer to fill). Called only inside the head's size."""


class Layer(Protocol):
    """One inverse with random access. DeltaFileReader is one."""

    @property
    def base(self) -> State: ...
    @property
    def result(self) -> State: ...
    @property
    def disks(self) -> tuple[DiskChange, ...]: ...
    def overlapping(self, disk: int, first: int, stop: int) -> range:
        """Numbers of the segments of disk `disk` that may touch grains [first, stop)."""
        ...

    def rows(self, number: int) -> Rows: ...
    def payload_into(self, number: int, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the segment's payload bytes from `offset`."""
        ...


class ChainReader:
    """Reads the state that the first layer leads to.

    `layers` are nearest the point first; layers[i].base == layers[i+1].result; the last one's base is the state of
    the head that `below` reads. `head` says that state (needed when there are no layers).
    `newer` is asked after every read from below: layers it returns (a commit went on meanwhile; nearest the point
    first) are appended and the read is done again, so a head that is being written is never seen.
    Thread-safe.
    """

    def __init__(
        self, head: State, layers: Sequence[Layer], below: Below, newer: Callable[[], Sequence[Layer]] = tuple
    ) -> None:
        raise NotImplementedError

    @property
    def state(self) -> State:
        raise NotImplementedError

    def read_into(self, disk_id: DiskId, offset: int, buffer: Buffer) -> None:
        """Exactly len(buffer) bytes inside the disk's size (ValueError otherwise)."""
        raise NotImplementedError

    def runs(self, disk_id: DiskId, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(offset, length, layer index) ascending, in bytes: who answers; len(layers) is the head; ranges that are
        zero are left out."""
        raise NotImplementedError
