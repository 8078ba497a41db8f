"""What a sender is told to do: machines, their disks, where to and how often.

Frozen values without I/O, built by `config` from `sender.toml` or by an
integration in code. They are wishes; what is true is in the state directory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from replica.machine_files import FILES_DISK_NAME
from replica.model import Consistency, check_name
from replica.tracking.audit import DEFAULT_PERIOD_SECONDS, DEFAULT_SAMPLE
from replica.tracking.external import Tracker
from replica.tracking.instant import Command, FreezeSpec
from replica.transport.tls import TlsFiles

DEFAULT_EVERY_SECONDS = 300.0
DEFAULT_FREEZE_LIMIT_SECONDS = 30.0
DEFAULT_PARALLEL = 4
PART_BYTES = 4 << 30
"""How much a delta holds at most, raw, while a long copy goes on: what a cut costs."""


@dataclass(frozen=True)
class DiskSpec:
    """One disk of a machine and the image that holds it. `format` None: told by the image's name.

    `formerly`: what it was called before, where its name and its image's path changed at once (see `disks`).
    `parents`: folders, besides the image's own, that parents of a differencing image may lie in.
    `offline`: nobody writes to it; believed where it cannot be shown, of block devices and NBD exports (`still`).
    `image` may be an NBD URI, as `images.location` makes it.
    """

    name: str
    image: Path
    format: str | None = None
    formerly: str | None = None
    parents: tuple[Path, ...] = ()
    offline: bool = False

    def __post_init__(self) -> None:
        check_name(self.name, "disk name")
        if self.name == FILES_DISK_NAME:
            raise ValueError(f"disk name {self.name!r} is reserved for the machine's files")


@dataclass(frozen=True)
class MachineSpec:
    """One machine: disks that are recovered to the same instant, and how that instant is made.

    `freeze` and `thaw` are commands (a list is an argv, a string is run by
    `sh -c`); see `tracking.instant`. `consistency` is what they achieve and
    only counts when they are configured. `files` are small files that travel with each point (`files`).

    `tracker` is an integration's, if it has one (`tracking.external`); else every allocated byte is hashed. The audit
    reads every leaf once in `audit_period_seconds`, and of what the tracker reports clean `audit_sample` grains per
    disk in every cycle (`tracking.audit`).
    """

    name: str
    to: str
    disks: tuple[DiskSpec, ...]
    every_seconds: float = DEFAULT_EVERY_SECONDS
    freeze: Command | None = None
    thaw: Command | None = None
    freeze_limit_seconds: float = DEFAULT_FREEZE_LIMIT_SECONDS
    consistency: Consistency = Consistency.CRASH
    files: tuple[Path, ...] = ()
    audit_period_seconds: float = DEFAULT_PERIOD_SECONDS
    audit_sample: int = DEFAULT_SAMPLE
    tracker: Tracker | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        check_name(self.name, "machine name")
        names = [disk.name for disk in self.disks]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"machine {self.name!r} needs disks with names that differ")
        if not self.audit_period_seconds > 0 or self.audit_sample < 0:
            raise ValueError(f"machine {self.name!r} needs a period and a sample that an audit can have")

    @property
    def images(self) -> dict[str, Path]:
        """Disk name -> image."""
        return {disk.name: disk.image for disk in self.disks}

    @property
    def freezing(self) -> FreezeSpec:
        offline = frozenset(disk.name for disk in self.disks if disk.offline)
        return FreezeSpec(self.freeze, self.thaw, self.freeze_limit_seconds, self.consistency, offline)


@dataclass(frozen=True)
class SenderSpec:
    """One sender: its state and key directories, its certificate, and its machines."""

    name: str
    state: Path
    keys: Path
    tls: TlsFiles
    machines: tuple[MachineSpec, ...] = field(default=())
    parallel: int = DEFAULT_PARALLEL
    part_bytes: int = PART_BYTES

    def machine_directory(self, machine: str) -> Path:
        """Where that machine's state lives; its key is elsewhere, in `keys`."""
        return self.state / machine
