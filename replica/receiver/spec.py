"""What a replica site is told to be: the values a configuration file, or a program, makes it from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from replica.transport.tls import TlsFiles


@dataclass(frozen=True, slots=True)
class StorageSpec:
    """A directory that replicas are kept in, and the format of the head images in it."""

    name: str
    path: Path
    head: Literal["raw", "vhd"] = "raw"


@dataclass(frozen=True, slots=True)
class AllowSpec:
    """Lets every identity that matches the pattern `primary` replicate into `storage`."""

    primary: str
    storage: str
    trust_group: str = ""


@dataclass(frozen=True, slots=True)
class SiteSpec:
    """Everything about one replica site. `allow` is in order: the first match counts."""

    listen_host: str
    listen_port: int
    tls: TlsFiles
    storages: Mapping[str, StorageSpec]
    allow: Sequence[AllowSpec]
    keep_last: int = 24
