"""What a sender does next: a pure decision about what both sides know.

    while True:
        step = next_step(primary, replica)
        if isinstance(step, Ship): break           # read the source and send a delta
        ...                                        # do the step, look at both sides again

The sender knows the state its trackers describe (`head`) and perhaps one delta
(`pending`) whose commit it may have asked for and never saw answered. The
replica knows its head, and whether it is at work on a delta. The table, from
the top; the first row that fits is the answer:

    replica of another holder's epoch, or of a later one     FencedError
    replica of an earlier epoch                              ConflictError (its storage was put back)
    replica is applying a delta                              Wait
    replica's head is `pending`, roots equal                 Fold
    replica still holds `pending` without applying it        Cancel, then look again: only now it is definite
    `pending` and another head                               DiscardPending
    a disk has another grain or leaf than at the head        ConflictError
    the sender knows a head, and the replica's is another    Readopt, then look again
    replica's head is empty                                  Ship INITIAL
    replica's head is the sender's, trackers trusted         Ship INCREMENTAL
    any other head                                           Ship RESYNC

A head that moved without the sender, in the sender's own epoch: either its
state directory was copied and the copy is at work, or one of the two sides was
put back to an earlier time. Nobody can tell which from here, and two copies
that go on as if nothing had happened overwrite each other's points for ever. So
the sender becomes another writer first: the epoch grows, and a copy, if there
is one, is fenced. Where there is none, that costs what had to be done anyway.

Disks that were resized, added, removed or renamed since the head are nothing
special: the delta says so. Only grain and leaf of a disk can never change.

A delta always starts from the replica's head as the replica names it; the
number of its point is the head's plus one.
"""

from __future__ import annotations

from enum import StrEnum

from replica.errors import ConflictError, FencedError
from replica.model import DeltaId, Disk, Epoch, Frozen, State


class PrimaryView(Frozen, frozen=True):
    """What the sender's state says. `disks` are the machine's disks as they are now, sorted by id."""

    machine: str
    epoch: Epoch
    disks: tuple[Disk, ...]
    head: State | None
    pending: State | None = None
    trusted: bool = True


class ReplicaView(Frozen, frozen=True):
    """What the receiver says."""

    epoch: Epoch
    head: State
    applying: DeltaId | None = None
    receiving: DeltaId | None = None


class Wait(Frozen, frozen=True):
    """The replica is at work on `delta_id`; ask again."""

    delta_id: DeltaId


class Cancel(Frozen, frozen=True):
    """Ask the receiver to give `delta_id` up, so that nothing can commit it later."""

    delta_id: DeltaId


class Fold(Frozen, frozen=True):
    """The pending delta was committed: the trackers become what it made."""

    result: State


class DiscardPending(Frozen, frozen=True):
    """The pending delta was not and will not be committed."""

    delta_id: DeltaId


class Readopt(Frozen, frozen=True):
    """The replica's head moved without this sender: adopt it under a new holder before anything is shipped."""

    expected: State
    found: State


class Mode(StrEnum):
    """How a delta comes about."""

    INITIAL = "initial"  # all that is not zero, onto nothing
    INCREMENTAL = "incremental"  # what differs from the stored digests
    RESYNC = "resync"  # what differs from a head that the trackers did not describe, found by comparing trees


class Ship(Frozen, frozen=True):
    """Make a delta from `base` and send it."""

    mode: Mode
    base: State

    @property
    def point(self) -> int:
        return self.base.point + 1


Step = Wait | Cancel | Fold | DiscardPending | Readopt | Ship


def next_step(primary: PrimaryView, replica: ReplicaView) -> Step:
    """The table above. Raises FencedError or ConflictError: a decision for somebody else."""
    check_epoch(primary.machine, primary.epoch, replica.epoch)
    if replica.applying is not None:
        return Wait(replica.applying)
    if primary.pending is not None:
        return _settle(primary.pending, replica)
    if not replica.head.is_empty:
        check_disks(primary.machine, primary.disks, replica.head)
    if primary.head is not None and primary.head != replica.head:
        return Readopt(primary.head, replica.head)
    if replica.head.is_empty:
        return Ship(Mode.INITIAL, replica.head)
    if primary.trusted and primary.head is not None:
        return Ship(Mode.INCREMENTAL, replica.head)
    return Ship(Mode.RESYNC, replica.head)


def _settle(pending: State, replica: ReplicaView) -> Step:
    """What became of a delta whose commit may have been asked for."""
    if replica.head == pending:
        return Fold(pending)
    if pending.delta_id == replica.receiving:
        return Cancel(pending.delta_id)
    return DiscardPending(pending.delta_id)


def check_epoch(machine: str, own: Epoch, replica: Epoch) -> None:
    """Raise unless the replica takes deltas of exactly the sender's own epoch."""
    if replica == own:
        return
    if replica.counter < own.counter:
        raise ConflictError(
            f"the replica of machine {machine!r} is at epoch {replica.counter}, "
            f"older than this primary's {own.counter}",
            hint="its storage was put back to an earlier time: move this machine's state directory away to adopt it",
        )
    raise FencedError(
        f"machine {machine!r}: another primary took the replica over "
        f"(epoch {replica.counter}, this one's is {own.counter})",
        hint="it may be a copy of this host with its state directory; if this is the one to go on, stop the other "
        "and move this machine's state directory away to adopt it",
    )


def check_disks(machine: str, disks: tuple[Disk, ...], head: State) -> None:
    """Raise if a disk that the replica's head has, too, is tracked there in other units: no delta can change them."""
    for disk in disks:
        other = head.disk(disk.id)
        if other is not None and (other.disk.grain_bytes, other.disk.leaf_bytes) != (disk.grain_bytes, disk.leaf_bytes):
            raise ConflictError(
                f"disk {disk.name!r} of machine {machine!r} has another geometry than {other.disk.name!r} "
                "at its replica",
                hint="give it back its former grain and leaf size, or replicate it under another id",
            )
