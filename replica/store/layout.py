"""What lies where in one replica's directory, and its two small documents.

    <storage>/<replica id>/
      replica.toml            identity and owner, for people too        (atomic replace)
      state                   head state, epoch, applying               (atomic replace)
      head/<disk id>.img      flat image; head/<disk name>.img points to it
      head/<disk id>.tree     Merkle tree of the image
      incoming/<delta id>     received, not yet applied; `.part` and `.index` while it arrives
      points/<delta id>       inverse: undoes the delta of that id, and so holds the older point
      pins/<delta id>         readers of the state of that id hold a shared kernel lock on it
      keys/<key id>           data keys (0600)
      marks/damage            leaves of the head that are known to be rotten (atomic replace)
      lock                    the one writer holds it
      damage.lock             held while `marks/damage` is changed
      head.lock               held exclusively while the head is being rewritten

Files are named by the disk's id and not by its name, because a rename would
otherwise have to be made atomic with a commit; the link by name is a
convenience that nothing reads and every start makes anew.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import tomli_w

from replica.durable import FileSystem
from replica.errors import FormatError
from replica.model import DeltaId, DiskId, Epoch, Frozen, ReplicaId, State, check_name

HeadFormat = Literal["raw", "vhd"]
MAX_IDENTITY_BYTES = 64 << 10


class Identity(Frozen, frozen=True):
    """Who a replica is. Written once at enrolment; never replaced by enrolling again."""

    replica_id: ReplicaId
    machine: str
    owner: str
    trust_group: str
    head_format: HeadFormat
    created_at_ns: int

    def __post_init__(self) -> None:
        check_name(self.machine, "machine name")


class StoreState(Frozen, frozen=True):
    """The document `state`: what the head is, who may write, and what is being applied."""

    head: State
    epoch: Epoch
    applying: DeltaId | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths inside one replica's directory."""

    root: Path

    @property
    def identity(self) -> Path:
        return self.root / "replica.toml"

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def head(self) -> Path:
        return self.root / "head"

    @property
    def incoming(self) -> Path:
        return self.root / "incoming"

    @property
    def points(self) -> Path:
        return self.root / "points"

    @property
    def pins(self) -> Path:
        return self.root / "pins"

    @property
    def marks(self) -> Path:
        return self.root / "marks"

    @property
    def damage(self) -> Path:
        return self.marks / "damage"

    @property
    def keys(self) -> Path:
        return self.root / "keys"

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    @property
    def head_lock(self) -> Path:
        return self.root / "head.lock"

    def image(self, disk_id: DiskId) -> Path:
        return self.head / f"{disk_id}.img"

    def tree(self, disk_id: DiskId) -> Path:
        return self.head / f"{disk_id}.tree"

    def point(self, undone: DeltaId) -> Path:
        return self.points / str(undone)

    def pin(self, state: DeltaId) -> Path:
        return self.pins / str(state)


def write_identity(fs: FileSystem, layout: Layout, identity: Identity) -> None:
    fs.replace_bytes(layout.identity, tomli_w.dumps(msgspec.to_builtins(identity)).encode())


def read_identity(fs: FileSystem, layout: Layout) -> Identity:
    """Raises StorageError (no such file) or FormatError."""
    data = fs.read_bytes(layout.identity, MAX_IDENTITY_BYTES)
    try:
        return msgspec.convert(tomllib.loads(data.decode()), Identity)
    except (ValueError, msgspec.ValidationError) as error:
        raise FormatError(f"{layout.identity} is not valid: {error}") from error


def replica_directories(fs: FileSystem, storage: Path) -> list[Path]:
    """Every replica in a storage: the directories that hold a `replica.toml`.

    Enrolment writes that file last, so a directory without it is the rest of
    an enrolment that was cut, and the next one starts over in it.
    """
    return [storage / name for name in fs.list_names(storage) if fs.exists(storage / name / "replica.toml")]
