"""What a replica site is told to be: the values a configuration file, or a program, makes it from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from replica.store.retention import DEFAULT_POLICY, Policy
from replica.store.space import DEFAULT_LIMITS, SpaceLimits
from replica.transport.tls import TlsFiles

MAX_POINTS_PER_HOUR = 3600
"""Points that a replica takes per hour, on average: one a second. Each costs a file, and time at every look."""
MAX_REPLICAS = 1024
"""Replicas of one identity. Each holds a descriptor and some memory for as long as the receiver runs."""


@dataclass(frozen=True, slots=True)
class StorageSpec:
    """A directory that replicas are kept in, the format of the head images in it, and what must stay free there."""

    name: str
    path: Path
    head: Literal["raw", "vhd"] = "raw"
    limits: SpaceLimits = DEFAULT_LIMITS


@dataclass(frozen=True, slots=True)
class AllowSpec:
    """Lets every identity that matches the pattern `primary` replicate into `storage`, so many machines each."""

    primary: str
    storage: str
    trust_group: str = ""
    max_replicas: int = MAX_REPLICAS


@dataclass(frozen=True, slots=True)
class MachineRetention:
    """The policy of machines whose name (`web-1`, or with its owner: `hv-1/web-1`) matches a pattern."""

    machine: str
    policy: Policy

    def matches(self, owner: str, machine: str) -> bool:
        return any(fnmatchcase(name, self.machine) for name in (machine, f"{owner}/{machine}"))


@dataclass(frozen=True, slots=True)
class SiteSpec:
    """Everything about one replica site. `allow` and `machines` are in order: the first match counts."""

    listen_host: str
    listen_port: int
    tls: TlsFiles
    storages: Mapping[str, StorageSpec]
    allow: Sequence[AllowSpec]
    retention: Policy = DEFAULT_POLICY
    machines: Sequence[MachineRetention] = ()
    max_points_per_hour: int = MAX_POINTS_PER_HOUR
    receipt_key: Path | None = None
    """What receipts are signed with; without it each storage has a key of its own (`store.receipt_key`)."""

    def policy(self, owner: str, machine: str) -> Policy:
        """Which points of a machine stay."""
        return next((entry.policy for entry in self.machines if entry.matches(owner, machine)), self.retention)

    def limits(self, directory: Path) -> SpaceLimits:
        """What must stay free where a replica lies."""
        storages = self.storages.values()
        return next((storage.limits for storage in storages if storage.path == directory.parent), DEFAULT_LIMITS)
