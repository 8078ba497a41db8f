"""`replica points`: what can be restored."""

from __future__ import annotations

import time
from pathlib import Path

import click

from replica.cli.command import Command, config_option, json_option
from replica.cli.output import duration, print_json, print_table, size


@click.command(cls=Command)
@click.argument("machine")
@config_option("receiver.toml")
@json_option
def points(machine: str, config: Path, as_json: bool) -> None:
    """List the recovery points of MACHINE, oldest first.

    MACHINE is a machine's name, OWNER/NAME where two primaries have one of the
    same name, or the replica's UUID. Works whether `serve` runs or not.

    \b
    Examples:
      replica points web-1 -c receiver.toml
      replica points hv-1/web-1 --json -c receiver.toml
    """
    from replica.cli.replicas import find_replica
    from replica.config import load_receiver
    from replica.durable import FileSystem
    from replica.model import rfc3339

    reader = find_replica(FileSystem(), load_receiver(config), machine)
    listed = reader.points()
    for path in reader.damaged:
        click.echo(f"replica: {path} is damaged: the points that need it are lost or not restorable", err=True)
    if as_json:
        print_json(
            [
                {
                    "point": p.state.point,
                    "frozen_at": rfc3339(p.state.frozen_at_ns),
                    "consistency": p.state.consistency.value,
                    "bytes": p.stored_bytes,
                    "roots": p.state.roots,
                    "restorable": p.restorable,
                    "notes": list(p.state.notes),
                }
                for p in listed
            ]
        )
        return
    if not listed:
        click.echo(f"{machine} has no point yet")
        return
    now = time.time()
    print_table(
        ("point", "frozen at", "age", "consistency", "stored", "restorable"),
        [
            (
                str(p.state.point),
                rfc3339(p.state.frozen_at_ns),
                duration(max(0.0, now - p.state.frozen_at_ns / 1e9)),
                p.state.consistency.value,
                size(p.stored_bytes),
                "yes" if p.restorable else "NO",
            )
            for p in listed
        ],
    )
