"""`replica status`: what each side knows by itself, without asking the other."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from replica.cli.command import Command, config_option, json_option
from replica.cli.output import duration, error_fields, print_json, print_table, size
from replica.model import rfc3339

if TYPE_CHECKING:
    from replica.durable import FileSystem
    from replica.errors import ReplicaError
    from replica.primary.status import MachineStatus
    from replica.receiver.spec import SiteSpec
    from replica.store import ReplicaReader

NAMED = 8
"""So many damaged points, files and receipts of a machine are named each."""


@click.command(cls=Command)
@config_option("sender.toml or receiver.toml")
@json_option
def status(config: Path, as_json: bool) -> None:
    """Show every machine: its newest point, how far behind it is, what went wrong last.

    Which side it is follows from what the configuration says. Nothing is
    asked over the network.

    \b
    Examples:
      replica status -c sender.toml
      replica status --json -c receiver.toml
    """
    from replica.config import kind_of

    if kind_of(config) == "sender":
        _sender(config, as_json)
    else:
        _receiver(config, as_json)


def _receiver(config: Path, as_json: bool) -> None:
    from replica.cli.replicas import full_name
    from replica.config import load_receiver
    from replica.durable import FileSystem
    from replica.errors import ReplicaError

    fs, spec = FileSystem(), load_receiver(config)
    readers, broken = _found(fs, spec)
    told: list[tuple[str, str]] = []
    rows: list[dict[str, object]] = []
    unreadable = [{"directory": str(path), "error": error_fields(error)} for path, error in broken]
    for reader in readers:
        name, directory = full_name(reader), str(reader.layout.root)
        try:
            row, texts = _replica(fs, reader), warnings(fs, spec, reader)
        except ReplicaError as error:
            identity = {"machine": reader.identity.machine, "owner": reader.identity.owner}
            unreadable.append({**identity, "directory": directory, "error": error_fields(error)})
            told.append((name, f"it cannot be read: {error}"))
            continue
        rows.append({**row, "warnings": texts})
        told += [(name, text) for text in texts]
    if as_json:
        print_json([*rows, *unreadable])
        return
    if not rows and not unreadable:
        click.echo("no replica yet")
    if rows:
        headers = ("machine", "owner", "point", "frozen at", "behind", "points", "stored", "head", "state")
        print_table(headers, [_line(row) for row in rows])
    for row in rows:
        for text in _damage(row):
            click.echo(f"{row['owner']}/{row['machine']}: {text}")
    for name, text in told:
        click.echo(f"{name}: {text}")
    for path, failure in broken:
        click.echo(f"{path}: {failure}")


def _found(fs: FileSystem, spec: SiteSpec) -> tuple[list[ReplicaReader], list[tuple[Path, ReplicaError]]]:
    """Every replica that can be opened, and what cannot be read: replicas, or a whole storage. None hides another."""
    from dataclasses import replace

    from replica.cli.replicas import all_replicas
    from replica.errors import ReplicaError

    readers: list[ReplicaReader] = []
    broken: list[tuple[Path, ReplicaError]] = []
    for name, storage in spec.storages.items():
        try:
            found, unreadable = all_replicas(fs, replace(spec, storages={name: storage}))
        except ReplicaError as error:
            broken.append((storage.path, error))
            continue
        readers += found
        broken += unreadable
    readers.sort(key=lambda reader: (reader.identity.machine, reader.identity.owner, str(reader.identity.replica_id)))
    return readers, broken


def warnings(fs: FileSystem, spec: SiteSpec, reader: ReplicaReader) -> list[str]:
    """What an operator should change before it matters: floodable retention, unknown locks, space."""
    from replica.errors import ReplicaError
    from replica.store.marks import Marks
    from replica.store.retention import FLOODABLE
    from replica.store.space import judge

    found, directory = [], reader.layout.root
    marks = Marks(fs, reader.layout)
    try:
        locked = marks.locked(marks.now())
    except ReplicaError as error:
        found.append(str(error))
        locked = {}
    if spec.policy(reader.identity.owner, reader.identity.machine).is_floodable and not locked:
        found.append(f"retention: {FLOODABLE}")
    space = judge(fs.free_bytes(directory), fs.total_bytes(directory), spec.limits(directory))
    if space.is_low:
        what = "nothing is taken until there is more (min_free)" if space.short_bytes else "below warn_free"
        found.append(f"{size(space.free_bytes)} of {size(space.total_bytes)} are free in {directory.parent}: {what}")
    return found


def _damage(row: dict[str, object]) -> list[str]:
    """What `DAMAGED POINTS` and a damaged receipt mean, in words."""
    points, files, receipts = row["not_restorable"], row["damaged"], row["receipts_damaged"]
    assert isinstance(points, list) and isinstance(files, list) and isinstance(receipts, list)
    found = [f"point {p['point']} is not restorable: {p['reason']}" for p in points[:NAMED]]
    if len(points) > NAMED:
        found.append(f"{len(points) - NAMED} more points are not restorable, see `replica points`")
    found += [f"{path} is damaged: the points that need it are lost or not restorable" for path in files[:NAMED]]
    if receipts:
        more = f" and {len(receipts) - NAMED} more" if len(receipts) > NAMED else ""
        numbers = ", ".join(map(str, receipts[:NAMED]))
        found.append(f"the receipts of points {numbers}{more} are damaged; the content of the points is not affected")
    return found


def _replica(fs: FileSystem, reader: ReplicaReader) -> dict[str, object]:
    from replica.store.receipts import ReceiptFiles, ReceiptWord

    identity, head, listed = reader.identity, reader.head, reader.points()
    frozen_at = listed[-1].state.frozen_at_ns if listed else None
    receipts = ReceiptFiles(fs, reader.layout)
    words = {p.state.point: receipts.word(p.state) for p in listed}
    return {
        "machine": identity.machine,
        "owner": identity.owner,
        "replica_id": str(identity.replica_id),
        "trust_group": identity.trust_group,
        "head_format": identity.head_format,
        "point": head.point,
        "frozen_at": None if frozen_at is None else rfc3339(frozen_at),
        "behind_seconds": None if frozen_at is None else round(max(0.0, time.time() - frozen_at / 1e9), 3),
        "points": len(listed),
        "bytes": sum(p.stored_bytes for p in listed),
        "restorable": all(p.restorable for p in listed) and not reader.damaged,
        "not_restorable": [{"point": p.state.point, "reason": p.why} for p in listed if not p.restorable],
        "damaged": [str(path) for path in reader.damaged],
        "damaged_leaves": sum(d.stop - d.first for d in reader.marks.leaves),
        "copying": head.partial,
        "receipt": words[listed[-1].state.point].value if listed else None,
        "receipts_damaged": [point for point, word in words.items() if word is ReceiptWord.DAMAGED],
        "applying": None if reader.applying is None else str(reader.applying),
        "disks": {d.disk.name: d.disk.size_bytes for d in head.machine_disks},
        "roots": head.roots,
    }


def _line(row: dict[str, object]) -> tuple[str, ...]:
    behind, stored = row["behind_seconds"], row["bytes"]
    state = "applying" if row["applying"] else "copying" if row["copying"] else "ok"
    state = state if row["restorable"] else "DAMAGED POINTS"
    if state == "ok" and row["receipt"] in ("missing", "damaged"):
        state = f"receipt {row['receipt']}"
    if state == "ok" and row["receipts_damaged"]:
        state = "receipts damaged"
    if row["damaged_leaves"]:
        state = f"DAMAGED HEAD ({row['damaged_leaves']} leaves; the next sync repairs them)"
    return (
        str(row["machine"]),
        str(row["owner"]),
        str(row["point"]),
        str(row["frozen_at"] or "never"),
        duration(behind) if isinstance(behind, float) else "-",
        str(row["points"]),
        size(stored) if isinstance(stored, int) else "-",
        str(row["head_format"]),
        state,
    )


def _sender(config: Path, as_json: bool) -> None:
    from replica.config import load_sender
    from replica.durable import FileSystem
    from replica.primary.status import machine_status

    spec = load_sender(config)
    statuses = [machine_status(FileSystem(), spec, machine) for machine in spec.machines]
    if as_json:
        print_json([_machine(status) for status in statuses])
        return
    headers = ("machine", "to", "point", "frozen at", "behind", "next cycle in", "state")
    print_table(
        headers,
        [
            (
                s.machine,
                s.to,
                str(s.point),
                "never" if s.frozen_at_ns is None else rfc3339(s.frozen_at_ns),
                "-" if s.rpo_seconds is None else duration(s.rpo_seconds),
                "-" if s.next_due_ns is None else duration(max(0.0, s.next_due_ns / 1e9 - time.time())),
                s.state.value,
            )
            for s in statuses
        ],
    )
    for s in statuses:
        if s.copying is not None:
            click.echo(f"{s.machine}: copying, {size(s.copying.done_bytes)} of {size(s.copying.total_bytes)}")
        if s.last_error is not None:
            hint = f"; {s.last_error.hint}" if s.last_error.hint else ""
            click.echo(f"{s.machine}, {rfc3339(s.last_error.at_ns)}: {s.last_error.message}{hint}")
        for alert in s.alerts:
            click.echo(f"{s.machine}, {rfc3339(alert.at_ns)}: ALERT: {alert.message}")


def _machine(status: MachineStatus) -> dict[str, object]:
    error = status.last_error
    return {
        "machine": status.machine,
        "to": status.to,
        "state": status.state.value,
        "replica_id": None if status.replica_id is None else str(status.replica_id),
        "point": status.point,
        "frozen_at": None if status.frozen_at_ns is None else rfc3339(status.frozen_at_ns),
        "behind_seconds": None if status.rpo_seconds is None else round(status.rpo_seconds, 3),
        "copying": None
        if status.copying is None
        else {"bytes_done": status.copying.done_bytes, "bytes_total": status.copying.total_bytes},
        "last_error": None
        if error is None
        else {"code": error.code, "message": error.message, "hint": error.hint, "at": rfc3339(error.at_ns)},
        "alerts": [
            {"disk": a.disk, "tracker": a.tracker, "point": a.point, "at": rfc3339(a.at_ns), "message": a.message}
            for a in status.alerts
        ],
        "next_due": None if status.next_due_ns is None else rfc3339(status.next_due_ns),
    }
