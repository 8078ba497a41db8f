"""`replica points`: what can be restored."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from replica.cli.command import Command, config_option, json_option
from replica.cli.output import complain, duration, print_json, print_table, size

if TYPE_CHECKING:
    from replica.durable import FileSystem
    from replica.model import DeltaId
    from replica.receiver.spec import SiteSpec
    from replica.store import ReplicaReader


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
    from replica.store.receipts import ReceiptFiles

    fs, spec = FileSystem(), load_receiver(config)
    reader = find_replica(fs, spec, machine)
    why, locks = reasons(fs, reader, spec)
    listed = reader.points()
    receipts = ReceiptFiles(fs, reader.layout)
    for path in reader.damaged:
        click.echo(f"replica: {path} is damaged: the points that need it are lost or not restorable", err=True)
    for marked in reader.marks.leaves:
        disk = next((d.disk for d in reader.head.disks if d.disk.id == marked.disk_id), None)
        if disk is not None:
            first, stop = marked.first * disk.leaf_bytes, min(marked.stop * disk.leaf_bytes, disk.size_bytes)
            click.echo(
                f"replica: disk {disk.name} of the head is damaged, bytes {first} to {stop - 1}: points that read them "
                "are not restorable until the next sync repairs them",
                err=True,
            )
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
                    "lost": [{"disk": r.disk, "offset": r.offset, "length": r.length} for r in p.lost],
                    "committed_at": rfc3339(p.committed.wall_ns) if p.committed.wall_ns else None,
                    "kept": why.get(p.state.delta_id, ""),
                    "locked_until": rfc3339(locks[p.state.delta_id]) if p.state.delta_id in locks else None,
                    "reason": p.reason or None,
                    "receipt": receipts.word(p.state).value,
                    "notes": list(p.state.notes),
                }
                for p in listed
            ]
        )
        return
    for p in listed:
        for lost in p.lost[:8]:
            click.echo(
                f"replica: point {p.state.point}: {lost.length} bytes at {lost.offset} of disk {lost.disk!r} are lost; "
                "`replica restore --allow-lost` restores the rest",
                err=True,
            )
    if not listed:
        click.echo(f"{machine} has no point yet")
        return
    now = time.time()
    print_table(
        ("point", "frozen at", "age", "consistency", "stored", "restorable", "committed at", "kept as", "receipt"),
        [
            (
                str(p.state.point),
                rfc3339(p.state.frozen_at_ns),
                duration(max(0.0, now - p.state.frozen_at_ns / 1e9)),
                p.state.consistency.value,
                size(p.stored_bytes) if p.stored_bytes or p.restorable else "-",
                "yes" if p.restorable else "NO",
                rfc3339(p.committed.wall_ns) if p.committed.wall_ns else "-",
                why.get(p.state.delta_id, "") or "-",
                receipts.word(p.state).value,
            )
            for p in listed
        ],
    )
    for p in listed:
        if not p.restorable:
            click.echo(f"point {p.state.point} is not restorable: {p.why}")


def reasons(fs: FileSystem, reader: ReplicaReader, spec: SiteSpec) -> tuple[dict[DeltaId, str], dict[DeltaId, int]]:
    """Why each point stays, or that it goes; and until when (ns) those that are locked now are."""
    from replica.errors import DamageError
    from replica.store.marks import Marks
    from replica.store.retention import Action
    from replica.store.rotation import look

    identity = reader.identity
    decision = look(fs, reader.layout.root, spec.policy(identity.owner, identity.machine))
    why = {v.delta_id: v.reason if v.action is Action.KEEP else f"goes: {v.reason}" for v in decision.verdicts}
    marks = Marks(fs, reader.layout)
    try:
        now = marks.now()
        return why, {mark.delta_id: mark.until_ns for mark in marks.load().locks if mark.holds(now)}
    except DamageError as error:
        complain(error)
        return why, {}
