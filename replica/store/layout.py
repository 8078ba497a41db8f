"""What lies where in one replica's directory, and its two small documents.

    <storage>/<replica id>/
      replica.toml            identity and owner, for people too        (atomic replace)
      identity.copy           the same, with a checksum
      state                   head state, epoch, applying               (atomic replace)
      state.copy              the same, written after it: damage to one of them costs nothing
      head/<disk id>.img      flat image; head/<disk name>.img points to it
      head/<disk id>.tree     Merkle tree of the image
      incoming/<delta id>     received, not yet applied; `.part` and `.index` while it arrives
      points/<delta id>       inverse: undoes the delta of that id, and so holds the older point
      receipts/<delta id>     signed receipt of the point that this delta made; `.links` beside it (see `receipts`)
      marks/verify-…          what the last verification found, and how far this one is
      pins/<delta id>         readers of the state of that id hold a shared kernel lock on it
      pins.lock               shared while a reader takes its pin, exclusive while inverses are replaced or removed
      marks/retention         point locks and the observed time         (atomic replace)
      marks.lock              held while that document is changed, and while inverses are replaced or removed
      keys/<key id>           data keys (0600)
      marks/damage            leaves of the head that are known to be rotten (atomic replace)
      lock                    the one writer holds it
      damage.lock             held while `marks/damage` is changed
      head.lock               held exclusively while the head is being rewritten
      commit.lock             held while a commit is at work, for readers that let it go first

Files are named by the disk's id and not by its name, because a rename would
otherwise have to be made atomic with a commit; the link by name is a
convenience that nothing reads and every start makes anew.

Of the two copies of the state the one with the larger `serial` counts. A step is
taken only when both are durable, so the older of them is at most one step behind:
it is what a crash before that step would have left.
"""

from __future__ import annotations

import tomllib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import tomli_w

from replica import documents
from replica.durable import FileSystem
from replica.errors import FormatError, StorageError
from replica.model import NEVER, DeltaId, DiskId, Epoch, Frozen, ReplicaId, Stamp, State, check_name

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
    """The document `state`: what the head is, who may write, what is being applied, and when the head was committed.

    `marks`: there was a directory `marks/`; where it is gone now, point locks may be, too (`marks`).
    """

    head: State
    epoch: Epoch
    applying: DeltaId | None = None
    committed: Stamp = NEVER
    serial: int = 0
    marks: bool = False


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
    def identity_copy(self) -> Path:
        return self.root / "identity.copy"

    @property
    def state_copy(self) -> Path:
        return self.root / "state.copy"

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
    def pins_lock(self) -> Path:
        return self.root / "pins.lock"

    @property
    def receipts(self) -> Path:
        return self.root / "receipts"

    @property
    def marks(self) -> Path:
        return self.root / "marks"

    @property
    def retention(self) -> Path:
        return self.marks / "retention"

    @property
    def damage(self) -> Path:
        return self.marks / "damage"

    @property
    def marks_lock(self) -> Path:
        return self.root / "marks.lock"

    @property
    def damage_lock(self) -> Path:
        return self.root / "damage.lock"

    @property
    def keys(self) -> Path:
        return self.root / "keys"

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    @property
    def head_lock(self) -> Path:
        return self.root / "head.lock"

    @property
    def commit_lock(self) -> Path:
        return self.root / "commit.lock"

    def image(self, disk_id: DiskId) -> Path:
        return self.head / f"{disk_id}.img"

    def tree(self, disk_id: DiskId) -> Path:
        return self.head / f"{disk_id}.tree"

    def point(self, undone: DeltaId) -> Path:
        return self.points / str(undone)

    def receipt(self, state: DeltaId) -> Path:
        return self.receipts / str(state)

    def pin(self, state: DeltaId) -> Path:
        return self.pins / str(state)


def write_identity(fs: FileSystem, layout: Layout, identity: Identity) -> None:
    """`replica.toml` first, since it makes the directory a replica; the copy tells that it was one."""
    fs.replace_bytes(layout.identity, tomli_w.dumps(msgspec.to_builtins(identity)).encode())
    documents.save(fs, layout.identity_copy, identity)


def read_identity(fs: FileSystem, layout: Layout) -> Identity:
    """From `replica.toml`, or its copy where that cannot be read. Raises StorageError (neither is there), FormatError.

    The file for people has no checksum, so a bit that flipped in it may go unnoticed: it must say what the copy says.
    """
    copy: Identity | None = None
    with suppress(FormatError):
        copy = documents.load(fs, layout.identity_copy, Identity) if fs.exists(layout.identity_copy) else None
    try:
        data = fs.read_bytes(layout.identity, MAX_IDENTITY_BYTES)
        found = msgspec.convert(tomllib.loads(data.decode()), Identity)
    except StorageError:
        if copy is None:
            raise
        return copy
    except (ValueError, msgspec.ValidationError) as error:
        if copy is not None:
            return copy
        raise FormatError(f"{layout.identity} is not valid: {error}") from error
    if copy is not None and copy != found:
        raise FormatError(
            f"{layout.identity} and {layout.identity_copy} do not say the same",
            hint=f"one of them is damaged or was changed: remove {layout.identity} to go on with the copy, "
            "or the copy if the change was meant",
        )
    return found


def heal_identity(fs: FileSystem, layout: Layout, identity: Identity) -> None:
    """Write again what of the two is missing or unreadable. For the writer."""
    with suppress(FormatError, StorageError, ValueError, msgspec.ValidationError):
        data = fs.read_bytes(layout.identity, MAX_IDENTITY_BYTES)
        same = msgspec.convert(tomllib.loads(data.decode()), Identity) == identity
        if same and documents.load(fs, layout.identity_copy, Identity) == identity:
            return
    write_identity(fs, layout, identity)


def save_state(fs: FileSystem, layout: Layout, state: StoreState) -> None:
    """Both copies, durable when this returns."""
    documents.save(fs, layout.state, state)
    documents.save(fs, layout.state_copy, state)


def load_state(fs: FileSystem, layout: Layout) -> StoreState:
    """The newer of the readable copies; one of another replica counts only if there is no other.

    Raises StorageError (it is not there) or FormatError, whichever `state` itself raises.
    """
    found: list[StoreState] = []
    failures: list[FormatError | StorageError] = []
    for path in (layout.state, layout.state_copy):
        try:
            found.append(documents.load(fs, path, StoreState))
        except (FormatError, StorageError) as error:
            failures.append(error)
    if not found:
        hint = "keep the directory as it is: nothing says any more which state its head has"
        raise type(failures[0])(failures[0].message, hint=failures[0].hint or hint) from failures[0]
    return max(found, key=lambda state: (str(state.head.replica_id) == layout.root.name, state.serial))


def replica_directories(fs: FileSystem, storage: Path) -> list[Path]:
    """Every replica in a storage: the directories that hold a `replica.toml`, or its copy if it was lost.

    Enrolment writes them last, so a directory without them is the rest of
    an enrolment that was cut, and the next one starts over in it.
    """
    names = ("replica.toml", "identity.copy")
    return [storage / name for name in fs.list_names(storage) if any(fs.exists(storage / name / n) for n in names)]
