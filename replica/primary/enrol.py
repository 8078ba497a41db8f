"""Becoming the writer of a replica: making it, or finding one's own again.

A machine without a state directory asks the receiver for the replicas of its
name that belong to its certificate:

- none: a new one is made. Its data key and its record are durable here before
  the receiver hears of it, so that a crash in between leaves nothing that
  nobody knows, and doing it again is the same enrolment;
- one with the same disks (names and sizes), or still empty, whose key is in
  `keys`: it is adopted. The epoch grows, whoever wrote before is fenced. Where
  none has the very same disks, since they changed meanwhile, the only one that
  has a disk of the same name;
- anything else is for an operator to decide.

Adoption costs reading the disks once: what the replica holds is not known here.
"""

from __future__ import annotations

import msgspec

from replica.delta import DataKey, Keyring
from replica.durable import FileSystem
from replica.errors import BusyError, ConflictError, KeyMissingError
from replica.model import Epoch, ReplicaId, State, random_id
from replica.plan import check_epoch
from replica.primary.disks import Wanted, known_disks, match_disks, measure, names_of
from replica.primary.record import MachineDirectory, MachineRecord, Stage
from replica.primary.spec import MachineSpec, SenderSpec
from replica.tracking.audit import ANYBODY, DiskAudit
from replica.transport.api import Receiver
from replica.transport.wire import Adopt, Enrol, ReplicaInfo


def keyring(fs: FileSystem, spec: SenderSpec, replica_id: ReplicaId) -> Keyring:
    """The replica's keys; outside of all state."""
    return Keyring(fs, spec.keys / str(replica_id))


def contact(
    fs: FileSystem,
    spec: SenderSpec,
    machine: MachineSpec,
    directory: MachineDirectory,
    receiver: Receiver,
    wanted: tuple[Wanted, ...],
) -> tuple[MachineRecord, DataKey, ReplicaInfo]:
    """Be the writer of this machine's replica. `wanted`: its disks as they are configured and measured.

    Idempotent after a crash anywhere. Raises ConflictError, KeyMissingError, BusyError and all the receiver raises.
    """
    record = directory.load()
    if record is not None:
        record = directory.finish_fold(record)
    else:
        record = directory.save(_find(fs, spec, machine, receiver, wanted) or _make(fs, spec, machine, wanted))
    key = keyring(fs, spec, record.replica_id).get(record.key_id)
    if record.stage is Stage.ENROLLING:
        info = _enrol(directory, receiver, record, key)
        record = directory.save(msgspec.structs.replace(record, stage=Stage.ENROLLED))
    elif record.stage is Stage.ADOPTING:
        record, info = adopt(directory, receiver, record)
    else:
        info = look(receiver, record)
    if record.head is None and not info.head.is_empty:
        record = _take_ids(directory, record, wanted, info.head)
    return record, key, info


def _take_ids(
    directory: MachineDirectory, record: MachineRecord, wanted: tuple[Wanted, ...], head: State
) -> MachineRecord:
    """Nothing was committed from here, and the replica has a head: existing images that became it at the receiver.

    Its disks are this machine's by their names.
    """
    disks, paths = match_disks(wanted, known_disks((), (), head))
    if (disks, paths) == (record.disks, record.images):
        return record
    return directory.save(msgspec.structs.replace(record, disks=disks, images=paths))


def enrol_machine(fs: FileSystem, spec: SenderSpec, machine: MachineSpec, receiver: Receiver) -> ReplicaInfo:
    """Make the replica at the receiver, or find it there, and ship nothing. Idempotent. Raises what `contact` does."""
    directory = MachineDirectory(fs, spec.machine_directory(machine.name))
    with directory.locked(machine.name):
        return contact(fs, spec, machine, directory, receiver, measure(fs, machine))[2]


def become_another(directory: MachineDirectory, record: MachineRecord) -> MachineRecord:
    """Decide, durably, to adopt the replica under a new holder; nothing it holds is taken for known any more."""
    return directory.save(msgspec.structs.replace(record, holder=random_id(), stage=Stage.ADOPTING, trusted=False))


def adopt(directory: MachineDirectory, receiver: Receiver, record: MachineRecord) -> tuple[MachineRecord, ReplicaInfo]:
    """Carry out an adoption that was decided; idempotent. FencedError if another sender was quicker."""
    try:
        info = receiver.adopt(record.replica_id, Adopt(record.epoch, record.holder))
    except ConflictError:
        check_epoch(record.machine, record.epoch, receiver.replica(record.replica_id).epoch)
        raise
    done = msgspec.structs.replace(record, stage=Stage.ENROLLED, epoch=info.epoch, head=info.head, trusted=False)
    return directory.save(done), info


def look(receiver: Receiver, record: MachineRecord) -> ReplicaInfo:
    """What the replica is now. One that stopped is asked to take its writer again, which makes it try to recover.

    It may be at that by itself; then it is busy, and what it says next tells how far it is.
    """
    info = receiver.replica(record.replica_id)
    if info.stopped is None or info.epoch != record.epoch:
        return info
    try:
        return receiver.adopt(record.replica_id, Adopt(record.epoch, record.holder))
    except BusyError:
        return receiver.replica(record.replica_id)


def _enrol(directory: MachineDirectory, receiver: Receiver, record: MachineRecord, key: DataKey) -> ReplicaInfo:
    """Enrol; if that is refused for good, nobody has this replica: the next contact looks again which there is."""
    try:
        return receiver.enrol(record.replica_id, Enrol(record.machine, key.id, key.secret, record.epoch))
    except ConflictError:
        directory.forget()
        raise


def _make(fs: FileSystem, spec: SenderSpec, machine: MachineSpec, wanted: tuple[Wanted, ...]) -> MachineRecord:
    """A replica that so far exists only here. Its key is durable when this returns."""
    replica_id, holder, key = ReplicaId(random_id()), random_id(), DataKey.generate()
    keyring(fs, spec, replica_id).add(key)
    epoch = Epoch(1, holder)
    disks, paths = match_disks(wanted, ())
    return MachineRecord(machine.name, replica_id, key.id, holder, epoch, Stage.ENROLLING, disks, images=paths)


def _find(
    fs: FileSystem, spec: SenderSpec, machine: MachineSpec, receiver: Receiver, wanted: tuple[Wanted, ...]
) -> MachineRecord | None:
    """The one replica that must be this machine's own, ready to be adopted. None if there is none of its name."""
    named = [info for info in receiver.replicas(machine.name) if info.machine == machine.name]
    if not named:
        return None
    _check_readable(machine.name, named)
    matching = [info for info in named if info.head.is_empty or _same_disks(info.head, wanted)]
    if not matching:
        matching = [info for info in named if _share_a_disk(info.head, wanted)]
    if len(matching) != 1:
        raise ConflictError(
            f"machine {machine.name!r} has no state here, and {len(matching)} of its {len(named)} replicas "
            "at the receiver have its disks",
            hint=f"put its state directory back, or name the machine otherwise; they are "
            f"{', '.join(str(info.replica_id) for info in named)}",
        )
    (info,) = matching
    key = keyring(fs, spec, info.replica_id).newest
    if key is None:
        raise KeyMissingError(
            f"machine {machine.name!r} has a replica {info.replica_id}, but its data key is not in "
            f"{spec.keys / str(info.replica_id)}",
            hint="put that directory back from where keys are kept in escrow, or name the machine otherwise",
        )
    disks, paths = match_disks(wanted, known_disks((), (), info.head))
    audits = tuple(DiskAudit(disk.id, distrusted=(ANYBODY,)) for disk in disks)  # whom to believe is lost, too
    return MachineRecord(
        machine.name,
        info.replica_id,
        key.id,
        random_id(),
        info.epoch,
        Stage.ADOPTING,
        disks,
        None,
        False,
        paths,
        audits,
    )


def _check_readable(machine: str, named: list[ReplicaInfo]) -> None:
    """A replica that stopped and shows no head may hold points all the same: it is nobody's to pass over."""
    for info in named:
        if info.stopped is not None and info.head.is_empty:
            raise ConflictError(
                f"machine {machine!r} has a replica {info.replica_id} that the receiver cannot read: "
                f"{info.stopped.detail}",
                hint="no other one is made; repair it there, or name the machine otherwise",
            )


def _same_disks(head: State, wanted: tuple[Wanted, ...]) -> bool:
    held = sorted((state.disk.name, state.disk.size_bytes) for state in head.machine_disks)
    return held == sorted((wish.disk.name, wish.disk.size_bytes) for wish in wanted if wish.image)


def _share_a_disk(head: State, wanted: tuple[Wanted, ...]) -> bool:
    """Whether a disk of the machine has, or formerly had, the name of one in `head`."""
    names = {name for wish in wanted if wish.image for name in (wish.disk.name, wish.formerly)}
    return not names_of(head).isdisjoint(names)
