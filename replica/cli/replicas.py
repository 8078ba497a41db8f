"""Which replica an operator means: NAME, OWNER/NAME or the replica's UUID."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

from replica.durable import FileSystem
from replica.errors import ReplicaError, UnknownMachineError

if TYPE_CHECKING:
    from replica.receiver.spec import SiteSpec
    from replica.store import ReplicaReader


def all_replicas(fs: FileSystem, spec: SiteSpec) -> tuple[list[ReplicaReader], list[tuple[Path, ReplicaError]]]:
    """Every replica of every storage, sorted by machine and owner; and the directories that cannot be read."""
    from replica.store import ReplicaReader, replica_directories

    readers: list[ReplicaReader] = []
    broken: list[tuple[Path, ReplicaError]] = []
    for storage in spec.storages.values():
        for directory in replica_directories(fs, storage.path):
            try:
                readers.append(ReplicaReader(fs, directory))
            except ReplicaError as error:
                broken.append((directory, error))
    readers.sort(key=lambda reader: (reader.identity.machine, reader.identity.owner, str(reader.identity.replica_id)))
    return readers, broken


def full_name(reader: ReplicaReader) -> str:
    """`hv-1/web-1`."""
    return f"{reader.identity.owner}/{reader.identity.machine}"


def find_replica(fs: FileSystem, spec: SiteSpec, name: str) -> ReplicaReader:
    """The one replica `name` means. UnknownMachineError names what there is, or the candidates."""
    readers, broken = all_replicas(fs, spec)
    found = [r for r in readers if name in (r.identity.machine, full_name(r), str(r.identity.replica_id))]
    if len(found) == 1:
        return found[0]
    if found:
        same = len({full_name(r) for r in found}) < len(found)
        names = ", ".join(f"{full_name(r)} ({r.identity.replica_id})" if same else full_name(r) for r in found)
        raise UnknownMachineError(f"{name!r} names {len(found)} replicas", hint=f"say which: {names}")
    for directory, error in broken:
        if _same_id(directory.name, name) or not readers:
            raise error
    there = ", ".join(sorted({full_name(r) for r in readers})) or "no replica yet"
    unreadable = f" (and {len(broken)} that cannot be read, see `replica status`)" if broken else ""
    raise UnknownMachineError(f"no replica of a machine {name!r}", hint=f"there is {there}{unreadable}")


def _same_id(directory: str, name: str) -> bool:
    try:
        return UUID(directory) == UUID(name)
    except ValueError:
        return False
