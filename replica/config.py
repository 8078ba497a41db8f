"""The two configuration files, read into the specs that sender and receiver are built from.

`sender.toml` becomes a `SenderSpec`, `receiver.toml` a `SiteSpec`. Reading is
strict: an unknown key, a duplicate name, a storage nobody declared and an odd
duration are refused with file and line, since a policy that was misspelt and
silently ignored is found out on the day of the disaster. Relative paths are
relative to the file they stand in. Every key is explained in
docs/OPERATIONS.md.

Certificates are *not* looked at here: restoring a point must work when they
are gone. What talks TLS opens them and names what is wrong.
"""

from __future__ import annotations

import os
import re
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from replica import toml
from replica.errors import ConfigError
from replica.model import MAX_DISKS, Consistency, check_name
from replica.toml import Source

if TYPE_CHECKING:
    from replica.primary.spec import DiskSpec, MachineSpec, SenderSpec
    from replica.receiver.spec import SiteSpec
    from replica.store.retention import Policy
    from replica.store.space import Limit, SpaceLimits
    from replica.transport.tls import TlsFiles

DEFAULT_FREEZE_LIMIT = "30s"
DEFAULT_AUDIT_PERIOD = "7d"

MIN_PART_BYTES, MAX_PART_BYTES = 4 << 20, 64 << 30

_UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400}

Text = Annotated[str, Meta(min_length=1)]


class TlsTable(msgspec.Struct, frozen=True):
    """`[tls]`: the site's authority, and this side's certificate and key."""

    ca: Text
    cert: Text
    key: Text


class StorageTable(msgspec.Struct, frozen=True):
    """`[[storage]]`: a directory that replicas live in, and the format of their heads."""

    name: Text
    path: Text
    head: Literal["raw", "vhd"] = "raw"
    warn_free: Text | None = None
    min_free: Text | None = None


class AllowTable(msgspec.Struct, frozen=True):
    """`[[allow]]`: which certificate identities may replicate, and into which storage."""

    primary: Text
    storage: Text
    trust_group: Text = "default"
    max_replicas: Annotated[int, Meta(ge=1, le=100_000)] | None = None


Count = Annotated[int, Meta(ge=0, le=100_000)]
AtLeastOne = Annotated[int, Meta(ge=1, le=100_000)]


class RulesTable(msgspec.Struct, frozen=True, kw_only=True):
    """The rules by which points stay; what is not there is as it is by default."""

    keep_last: AtLeastOne | None = None
    hourly: Count | None = None
    daily: Count | None = None
    weekly: Count | None = None
    monthly: Count | None = None
    yearly: Count | None = None
    min_count: AtLeastOne | None = None
    min_age: Text | None = None
    shed_buckets: bool | None = None


class MachineRetentionTable(RulesTable, frozen=True, kw_only=True):
    """`[[retention.machine]]`: what differs from `[retention]` for machines whose name matches."""

    machine: Text


class RetentionTable(RulesTable, frozen=True, kw_only=True):
    """`[retention]`: which points every replica keeps."""

    max_points_per_hour: Annotated[int, Meta(ge=1, le=100_000)] | None = None
    machine: tuple[MachineRetentionTable, ...] = ()


class ReceiptsTable(msgspec.Struct, frozen=True):
    """`[receipts]`: the key that receipts are signed with; each storage has its own without it."""

    key: Text | None = None


class ReceiverFile(msgspec.Struct, frozen=True):
    """`receiver.toml` as it is written."""

    listen: Text
    tls: TlsTable
    storage: tuple[StorageTable, ...]
    allow: tuple[AllowTable, ...] = ()
    retention: RetentionTable = RetentionTable()
    receipts: ReceiptsTable = ReceiptsTable()


class DiskTable(msgspec.Struct, frozen=True):
    """`[[machine.disk]]`: one disk and the image that holds it."""

    name: Text
    image: Text
    format: Text | None = None
    formerly: Text | None = None
    parents: tuple[Text, ...] = ()
    offline: bool = False


class MachineTable(msgspec.Struct, frozen=True):
    """`[[machine]]`: disks that must be recovered to the same instant, where to and how often."""

    name: Text
    to: Text
    disk: tuple[DiskTable, ...]
    every: Text = "5min"
    freeze: Text | Annotated[list[Text], Meta(min_length=1)] | None = None
    thaw: Text | Annotated[list[Text], Meta(min_length=1)] | None = None
    freeze_limit: Text = DEFAULT_FREEZE_LIMIT
    consistency: Consistency = Consistency.CRASH
    files: tuple[Text, ...] = ()
    audit_period: Text = DEFAULT_AUDIT_PERIOD


class SenderFile(msgspec.Struct, frozen=True):
    """`sender.toml` as it is written."""

    name: Text
    state: Text
    tls: TlsTable
    machine: tuple[MachineTable, ...]
    keys: Text = "keys/"
    part: Text = "4GiB"
    parallel: Annotated[int, Meta(ge=1, le=16)] = 4


def parse_duration(text: str) -> float:
    """Seconds in `30s`, `5min`, `1h`, `1h30min`, `1.5h`. Raises ValueError."""
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*(s|min|h|d)\s*", text)
    if not parts or "".join(n + u for n, u in parts) != "".join(text.split()):
        raise ValueError(f"{text!r} is no duration; write a number and a unit, such as 30s, 5min or 1h")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def parse_size(text: str) -> int:
    """Bytes in `64MiB`, `4GiB`, `1.5TiB`. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KiB|MiB|GiB|TiB)", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no size; write a number and a unit, such as 64MiB or 4GiB")
    count = float(match[1]) * 1024 ** (1 + ("KiB", "MiB", "GiB", "TiB").index(match[2]))
    if count >= 1 << 63:
        raise ValueError(f"{text[:32]!r} is larger than any disk")
    return int(count)


def parse_limit(text: str) -> Limit:
    """A size, or a share of the file system: `10GiB`, `5%`. Raises ValueError."""
    from replica.store.space import Limit

    if found := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text):
        if float(found[1]) > 90:
            raise ValueError(f"{text!r} is more than 90%, which would leave no room for points")
        return Limit(share=float(found[1]) / 100)
    try:
        return Limit(size_bytes=parse_size(text))
    except ValueError as error:
        raise ValueError(f"{text!r} is no size and no share; write it like 10GiB or 5%") from error


def parse_rate(text: str) -> float:
    """Bytes per second in `100MiB/s`, `1GiB/s`, `500KiB/s`. Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KiB|MiB|GiB)/s", text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no rate; write a number and a unit, such as 100MiB/s")
    rate = float(found[1]) * {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}[found[2]]
    if not 1 << 10 <= rate < 1 << 63:
        raise ValueError(f"{text[:32]!r} is out of range; 1KiB/s is the least")
    return rate


def parse_listen(text: str) -> tuple[str, int]:
    """Host and port of `127.0.0.1:8443`, `[::]:8443` or `:8443` (every address). Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if host[:1] == "[" and host[-1:] == "]" and ":" in host:
        host = host[1:-1]
    elif any(c in host for c in "[]:"):
        colon = ""
    if not colon or not _is_number(port) or not 0 <= int(port) <= 65535 or (host and not is_host(host)):
        raise ValueError(f"{text!r} is no address to listen on; write host:port, such as 0.0.0.0:8443 or [::]:8443")
    return host, int(port)


def parse_url(text: str) -> str:
    """`https://host[:port]` without a slash at its end. Raises ValueError."""
    try:
        url = urlsplit(text)
        host, port = url.hostname or "", url.port
    except ValueError as error:
        raise ValueError(f"{text!r} is no receiver's address: {error}") from error
    plain = url.path in ("", "/") and not url.query and not url.fragment and url.username is None
    if url.scheme != "https" or not plain or not is_host(host) or port == 0 or url.netloc.endswith(":"):
        raise ValueError(f"{text!r} is no receiver's address")
    return text.rstrip("/")


def is_host(text: str) -> bool:
    """Whether that can be a host's name (RFC 1123 §2.1, or one that IDNA encodes) or an address."""
    if ":" in text:
        try:
            return ip_address(text.partition("%")[0]).version == 6
        except ValueError:
            return False
    if any(c.isspace() or not c.isprintable() for c in text):
        return False
    try:
        labels = text.removesuffix(".").encode("idna").split(b".")
    except UnicodeError:
        return False
    return all(re.fullmatch(rb"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?", label) for label in labels)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 5


def kind_of(path: Path) -> Literal["sender", "receiver"]:
    """Which of the two files this is, judged by what it says and not by its name."""
    table = toml.Source(path).table
    sender = len(table.keys() & {"name", "state", "machine", "keys"})
    receiver = len(table.keys() & {"listen", "storage", "allow", "retention", "receipts"})
    if sender == receiver:
        raise ConfigError(
            f"{path} is neither a sender's nor a receiver's configuration",
            hint="a sender has `state` and [[machine]], a receiver has `listen` and [[storage]]",
        )
    return "sender" if sender > receiver else "receiver"


def _read_as(path: Path, kind: Literal["sender", "receiver"]) -> None:
    if kind_of(path) != kind:
        other = "receiver" if kind == "sender" else "sender"
        raise ConfigError(f"{path} is a {other}'s configuration", hint=f"give the {kind}'s with -c")


def load_receiver(path: Path) -> SiteSpec:
    """`receiver.toml` as a SiteSpec. Raises ConfigError with file and line."""
    from replica.receiver.spec import (
        MAX_POINTS_PER_HOUR,
        MAX_REPLICAS,
        AllowSpec,
        MachineRetention,
        SiteSpec,
        StorageSpec,
    )
    from replica.store.retention import Policy

    _read_as(path, "receiver")
    source, file = toml.read(path, ReceiverFile)
    try:
        host, port = parse_listen(file.listen)
    except ValueError as error:
        source.fail(("listen",), str(error))
    _unique(source, "storage", [storage.name for storage in file.storage], ("storage",))
    if not file.storage:
        source.fail((), "no [[storage]] is declared", "add one with a name and a path")
    storages = {
        s.name: StorageSpec(s.name, _path(path, s.path), s.head, _limits(source, s, ("storage", n)))
        for n, s in enumerate(file.storage)
    }
    for number, entry in enumerate(file.allow):
        if entry.storage not in storages:
            hint = f"declared are: {', '.join(storages)}"
            source.fail(("allow", number, "storage"), f"storage {entry.storage!r} is not declared", hint)
    retention = _policy(source, file.retention, Policy(), ("retention",))
    machines = [
        MachineRetention(table.machine, _policy(source, table, retention, ("retention", "machine", number)))
        for number, table in enumerate(file.retention.machine)
    ]
    allow = [AllowSpec(a.primary, a.storage, a.trust_group, a.max_replicas or MAX_REPLICAS) for a in file.allow]
    return SiteSpec(
        listen_host=host,
        listen_port=port,
        tls=_tls(path, file.tls),
        storages=storages,
        allow=allow,
        retention=retention,
        machines=machines,
        max_points_per_hour=file.retention.max_points_per_hour or MAX_POINTS_PER_HOUR,
        receipt_key=_path(path, file.receipts.key) if file.receipts.key else None,
    )


def _limits(source: Source, table: StorageTable, place: toml.Place) -> SpaceLimits:
    from replica.store.space import SpaceLimits

    limits = {}
    for key in ("warn_free", "min_free"):
        text = getattr(table, key)
        if text is not None:
            try:
                limits[key] = parse_limit(text)
            except ValueError as error:
                source.fail((*place, key), f"`{key}`: {error}")
    return SpaceLimits(**limits)


def _policy(
    source: Source, table: RetentionTable | MachineRetentionTable, otherwise: Policy, place: toml.Place
) -> Policy:
    """The policy that a table says, with another one's values where it says nothing."""
    names = {f.name for f in msgspec.structs.fields(table)} & {f.name for f in msgspec.structs.fields(otherwise)}
    values = {name: getattr(table, name) for name in names if getattr(table, name) is not None}
    if table.min_age is not None:
        try:
            values["min_age_seconds"] = parse_duration(table.min_age)
            return msgspec.structs.replace(otherwise, **values)
        except ValueError as error:
            source.fail((*place, "min_age"), f"`min_age`: {error}")
    return msgspec.structs.replace(otherwise, **values)


def load_sender(path: Path) -> SenderSpec:
    """`sender.toml` as a SenderSpec. Raises ConfigError with file and line."""
    from replica.primary.spec import SenderSpec

    _read_as(path, "sender")
    source, file = toml.read(path, SenderFile)
    _unique(source, "machine", [machine.name for machine in file.machine], ("machine",))
    if not file.machine:
        source.fail((), "no [[machine]] is declared", "add one with a name, `to` and a [[machine.disk]]")
    try:
        part_bytes = parse_size(file.part)
    except ValueError as error:
        source.fail(("part",), f"`part`: {error}")
    if not MIN_PART_BYTES <= part_bytes <= MAX_PART_BYTES:
        source.fail(("part",), f"`part` = {file.part!r} is out of range", "4MiB to 64GiB are allowed")
    return SenderSpec(
        name=file.name,
        state=_path(path, file.state),
        keys=_path(path, file.keys),
        tls=_tls(path, file.tls),
        machines=tuple(_machine(source, m, ("machine", n)) for n, m in enumerate(file.machine)),
        parallel=file.parallel,
        part_bytes=part_bytes,
    )


def _machine(source: Source, table: MachineTable, place: toml.Place) -> MachineSpec:
    from replica.primary.spec import MachineSpec

    if not table.disk:
        source.fail(place, f"machine {table.name!r} has no disk", "add a [[machine.disk]] with a name and an image")
    disks = len(table.disk) + bool(table.files)
    if disks > MAX_DISKS:
        text = f"machine {table.name!r} has {disks} disks{', the one of its `files` included' if table.files else ''}"
        source.fail(place, text, f"at most {MAX_DISKS} can be kept at the same instant")
    _unique(source, "machine.disk", [disk.name for disk in table.disk], (*place, "disk"))
    _own_images(source, table.disk, (*place, "disk"))
    if (table.freeze is None) != (table.thaw is None):
        source.fail(place, f"machine {table.name!r} has only one of `freeze` and `thaw`", "give both or neither")
    try:
        to = parse_url(table.to)
    except ValueError as error:
        source.fail((*place, "to"), str(error), "write https://host:port")
    seconds = {}
    durations = {"every": table.every, "freeze_limit": table.freeze_limit, "audit_period": table.audit_period}
    for key, text in durations.items():
        try:
            seconds[key] = parse_duration(text)
        except ValueError as error:
            source.fail((*place, key), f"`{key}`: {error}")
        if not 1 <= seconds[key] <= 366 * 86400:
            source.fail((*place, key), f"`{key}` = {text!r} is out of range", "1s to 366d are allowed")
    try:
        check_name(table.name, "machine name")
        return MachineSpec(
            name=table.name,
            to=to,
            every_seconds=seconds["every"],
            disks=tuple(_disk(source, d, (*place, "disk", n)) for n, d in enumerate(table.disk)),
            freeze=table.freeze,
            thaw=table.thaw,
            freeze_limit_seconds=seconds["freeze_limit"],
            consistency=table.consistency,
            audit_period_seconds=seconds["audit_period"],
            files=_files(source, table.files, place),
        )
    except ValueError as error:
        source.fail((*place, "name"), str(error))


def _own_images(source: Source, disks: tuple[DiskTable, ...], place: toml.Place) -> None:
    """Two disks with one image are a slip: one of them would be restored with the other's content."""
    from replica.images import is_uri

    owners: dict[Path, str] = {}
    for number, disk in enumerate(disks):
        path = _image(source, disk.image, (*place, number, "image"))
        path = path if is_uri(path) else Path(os.path.realpath(path))
        if path in owners:
            what = f"disks {owners[path]!r} and {disk.name!r} have the same image, {path}"
            source.fail((*place, number, "image"), what, "each disk has an image of its own")
        owners[path] = disk.name


def _files(source: Source, files: tuple[str, ...], place: toml.Place) -> tuple[Path, ...]:
    """Small files that travel with the machine, by their absolute paths."""
    from replica.primary.files import archive_path

    paths = [Path(os.path.normpath(_path(source.path, name))) for name in files]
    for number, path in enumerate(paths):
        try:
            archive_path(path)
        except ValueError as error:
            source.fail((*place, "files", number), f"`files`: {error}", "name the file itself")
        if path in paths[:number]:
            source.fail((*place, "files", number), f"file {path} is named twice", "name each once")
    return tuple(paths)


def _disk(source: Source, table: DiskTable, place: toml.Place) -> DiskSpec:
    from replica.images import FORMATS
    from replica.primary.spec import DiskSpec

    if table.format is not None and table.format not in FORMATS:
        what = f"`machine.disk.format`: {table.format!r} is not known"
        source.fail((*place, "format"), what, f"known are: {', '.join(FORMATS)}")
    try:
        parents = tuple(_path(source.path, folder) for folder in table.parents)
        image = _image(source, table.image, (*place, "image"))
        return DiskSpec(table.name, image, table.format, table.formerly, parents, table.offline)
    except ValueError as error:
        source.fail((*place, "name"), str(error))


def _image(source: Source, text: str, place: toml.Place) -> Path:
    """A path, or an NBD URI."""
    from replica.errors import ImageError
    from replica.images import location

    try:
        return location(text, source.path.absolute().parent)
    except ImageError as error:
        source.fail(place, error.message, error.hint)


def _tls(path: Path, table: TlsTable) -> TlsFiles:
    from replica.transport.tls import TlsFiles

    return TlsFiles(ca=_path(path, table.ca), cert=_path(path, table.cert), key=_path(path, table.key))


def _path(file: Path, text: str) -> Path:
    """A path of the configuration, absolute; relative ones start at the file."""
    return file.absolute().parent / text


def _unique(source: Source, what: str, names: list[str], place: toml.Place) -> None:
    for number, name in enumerate(names):
        if name in names[:number]:
            source.fail((*place, number), f"two of [[{what}]] are named {name!r}", "names are unique")
