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
    from replica.store import ReplicaReader


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
    from replica.cli.replicas import all_replicas
    from replica.config import load_receiver
    from replica.durable import FileSystem

    fs = FileSystem()
    readers, broken = all_replicas(fs, load_receiver(config))
    rows = [_replica(reader) for reader in readers]
    if as_json:
        print_json([*rows, *({"directory": str(path), "error": error_fields(error)} for path, error in broken)])
        return
    if not rows and not broken:
        click.echo("no replica yet")
    if rows:
        headers = ("machine", "owner", "point", "frozen at", "behind", "points", "stored", "head", "state")
        print_table(headers, [_line(row) for row in rows])
    for path, error in broken:
        click.echo(f"{path}: {error}")


def _replica(reader: ReplicaReader) -> dict[str, object]:
    identity, head, listed = reader.identity, reader.head, reader.points()
    frozen_at = head.frozen_at_ns
    return {
        "machine": identity.machine,
        "owner": identity.owner,
        "replica_id": str(identity.replica_id),
        "trust_group": identity.trust_group,
        "head_format": identity.head_format,
        "point": head.point,
        "frozen_at": None if head.is_empty else rfc3339(frozen_at),
        "behind_seconds": None if head.is_empty else round(max(0.0, time.time() - frozen_at / 1e9), 3),
        "points": len(listed),
        "bytes": sum(p.stored_bytes for p in listed),
        "restorable": all(p.restorable for p in listed),
        "applying": None if reader.applying is None else str(reader.applying),
        "disks": {d.disk.name: d.disk.size_bytes for d in head.disks},
        "roots": head.roots,
    }


def _line(row: dict[str, object]) -> tuple[str, ...]:
    behind, stored = row["behind_seconds"], row["bytes"]
    state = "applying" if row["applying"] else "ok" if row["restorable"] else "DAMAGED POINTS"
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

    raise NotImplementedError
