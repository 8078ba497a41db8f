"""Who may do what: pure decisions about values, without a store, a socket or a clock.

An *identity* is the common name of a verified client certificate; nothing
else says who is asking. The rules, in the order they are asked:

1. The first `[[allow]]` entry whose pattern matches the identity (shell
   wildcards, case counts) lets it in and says which storage and trust group
   its new replicas get. No match, no access, to anything (`authorise`).
2. A replica is seen and written by the identity that enrolled it and by no
   other; the refusal does not say whose it is (`check_owner`).
3. Enrolling again never replaces an owner, a machine's name or a key. One
   owner has at most one replica of a machine's name, also if that one is still
   empty: its first copy may be days under way. Whoever finds its machine taken
   adopts that replica, or an operator removes it (`check_new`, `check_again`).
   How many machines an owner may have is limited by its entry.
4. Adopting makes another holder the writer. It must wait while the present one
   is in the middle of a delta, that is: opened one, did not end it, and sent
   something in the last minute. Between two cycles it need not wait: the other
   is then fenced, and told so (`check_adopt`).
5. What is sent into a delta counts only in the epoch it was begun in (`check_delta`).
6. A replica takes so many points an hour on average and no more, so that flooding costs neither the receiver its
   directories nor others their time (`Pace`). Parts of a long copy need bandwidth, which bounds them, and how many a
   copy has is not the receiver's to say; but such as bring next to nothing are counted, too, by themselves.

Each function returns what was decided or raises the error to answer with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from uuid import UUID

from replica.errors import BusyError, ConflictError, FencedError, ForbiddenError, UnknownMachineError
from replica.model import DeltaId, Epoch, ReplicaId
from replica.receiver.spec import MAX_REPLICAS, AllowSpec
from replica.store import Identity

ACTIVE_SECONDS = 60.0
SMALL_PART_BYTES = 1 << 20
"""A part of a copy that is smaller than this, sealed, counts."""
SMALL_PARTS_PER_HOUR = 3600


@dataclass(frozen=True, slots=True)
class Activity:
    """A delta under way: who began it, in which epoch, and when something of it last came (monotonic seconds)."""

    delta_id: DeltaId
    epoch: Epoch
    at_seconds: float


@dataclass(frozen=True, slots=True)
class Pace:
    """How many points a replica may still make: an hour's worth at once, refilled evenly (monotonic seconds)."""

    left: float
    at_seconds: float

    def at(self, now_seconds: float, per_hour: int) -> Pace:
        passed = max(0.0, now_seconds - self.at_seconds)
        return Pace(min(float(per_hour), self.left + passed * per_hour / 3600), now_seconds)

    def check(self, now_seconds: float, per_hour: int, what: str = "points") -> None:
        """BusyError if the next one comes too soon."""
        if self.at(now_seconds, per_hour).left < 1:
            raise BusyError(
                f"more than {per_hour} {what} came within an hour",
                hint="choose a larger `every` for this machine, or a larger `max_points_per_hour` at the receiver",
            )

    def take(self, now_seconds: float, per_hour: int) -> Pace:
        """After a point was made."""
        pace = self.at(now_seconds, per_hour)
        return Pace(pace.left - 1, now_seconds)


def authorise(allow: Sequence[AllowSpec], identity: str) -> AllowSpec:
    """The entry that lets `identity` in, or ForbiddenError."""
    for entry in allow:
        if fnmatchcase(identity, entry.primary):
            return entry
    raise ForbiddenError(
        f"no [[allow]] entry matches {identity!r}", hint="add one to the receiver's configuration and restart it"
    )


def unknown(replica_id: ReplicaId) -> UnknownMachineError:
    return UnknownMachineError(
        f"the receiver has no replica {replica_id}",
        hint="put its directory back, or move <state>/<machine>/ away at the sender to make a new first copy",
    )


def check_owner(owner: str, identity: str, replica_id: ReplicaId) -> None:
    if owner != identity:
        raise ForbiddenError(
            f"replica {replica_id} belongs to another primary than {identity!r}",
            hint="a replica is used with the certificate identity that enrolled it",
        )


def check_new(present: Iterable[Identity], identity: str, machine: str, max_replicas: int = MAX_REPLICAS) -> None:
    """May `identity` enrol a replica of `machine` beside the present ones?"""
    own = [other for other in present if other.owner == identity]
    for other in own:
        if other.machine == machine:
            raise ConflictError(
                f"{identity!r} already has a replica of machine {machine!r}: {other.replica_id}",
                hint="adopt it, or stop the receiver and move that replica's directory away to start over",
            )
    if len(own) >= max_replicas:
        raise ConflictError(
            f"{identity!r} has {len(own)} replicas already, as many as it may",
            hint="raise `max_replicas` in the receiver's [[allow]] entry, or move directories of machines that are "
            "gone away there, and restart it",
        )


def check_again(present: Identity, identity: str, machine: str, *, same_key: bool) -> None:
    """May an enrolment that names an existing replica be answered as if it had just made it?"""
    check_owner(present.owner, identity, present.replica_id)
    if present.machine != machine:
        raise ConflictError(
            f"replica {present.replica_id} is of machine {present.machine!r}, not {machine!r}",
            hint="a renamed machine keeps its replica; enrol another machine under a new id",
        )
    if not same_key:
        raise ConflictError(
            f"replica {present.replica_id} of machine {machine!r} has another data key",
            hint="bring the key it was enrolled with back into `keys`; a key is never replaced",
        )


def check_adopt(active: Activity | None, holder: UUID, now_seconds: float) -> None:
    """May `holder` become the writer now?"""
    if active is None or active.epoch.holder == holder:
        return
    idle_seconds = now_seconds - active.at_seconds
    if idle_seconds < ACTIVE_SECONDS:
        raise BusyError(
            f"another sender is in the middle of a delta: it sent something {idle_seconds:.0f} s ago",
            hint=f"stop it, or wait until it is silent for {ACTIVE_SECONDS:.0f} s",
        )


def check_delta(active: Activity | None, delta_id: DeltaId, epoch: Epoch) -> None:
    """Is what comes for `delta_id` still of the replica's present epoch?"""
    if active is not None and active.delta_id == delta_id and active.epoch != epoch:
        raise FencedError(
            f"another sender took this replica over while delta {delta_id} was under way: "
            f"the replica is at epoch {epoch.counter}, the delta is of {active.epoch.counter}",
            hint="stop one of the two senders; the one that goes on adopts the replica again",
        )
