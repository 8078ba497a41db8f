"""`replica prune`: which points go and why, and let them go now."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from replica.cli.command import Command, config_option, json_option
from replica.cli.output import print_json, print_table, size
from replica.errors import BusyError

if TYPE_CHECKING:
    from replica.store.retention import Decision


@click.command(cls=Command)
@click.argument("machine")
@click.option("--dry-run", is_flag=True, help="Only say what would go, and why.")
@config_option("receiver.toml")
@json_option
def prune(machine: str, dry_run: bool, config: Path, as_json: bool) -> None:
    """Let the points of MACHINE go that its retention policy does not keep.

    `serve` does so by itself, with every commit and every few minutes, and
    composes an hour or a day only when that is over; `prune` does not wait for
    that. It needs the replica for itself; --dry-run works beside `serve`.

    \b
    Examples:
      replica prune web-1 --dry-run -c receiver.toml
      replica prune web-1 -c receiver.toml
    """
    from replica.cli.replicas import find_replica
    from replica.config import load_receiver
    from replica.durable import FileSystem
    from replica.store import ReplicaStore
    from replica.store.rotation import Rotated, look

    fs, spec = FileSystem(), load_receiver(config)
    reader = find_replica(fs, spec, machine)
    policy = spec.policy(reader.identity.owner, reader.identity.machine)
    done = Rotated()
    decision = look(fs, reader.layout.root, policy, at_once=True)
    if not dry_run:
        try:
            store = ReplicaStore.open(fs, reader.layout.root)
        except BusyError as error:
            raise BusyError(
                f"the replica of {machine} is in use: {error.message}",
                hint="a running `serve` prunes by itself; to see what would go, add --dry-run",
            ) from error
        try:
            if store.stopped is not None:
                raise store.stopped
            done = store.rotate(policy, at_once=True)
            done += store.thin(policy, at_once=True)
        finally:
            store.close()
    _print(machine, decision, done, dry_run=dry_run, as_json=as_json)


def _print(machine: str, decision: Decision, done: object, *, dry_run: bool, as_json: bool) -> None:
    from replica.store.rotation import Rotated

    assert isinstance(done, Rotated)
    going = [v for v in decision.verdicts if v.action != "keep"]
    bytes_going = sum(v.stored_bytes for v in going)
    if as_json:
        print_json(
            {
                "dry_run": dry_run,
                "points": [
                    {"point": v.number, "action": v.action.value, "reason": v.reason, "bytes": v.stored_bytes}
                    for v in decision.verdicts
                ],
                "bytes_at_most": bytes_going,
                "dropped": list(done.dropped),
                "composed": list(done.composed),
                "bytes_freed": done.freed_bytes,
            }
        )
        return
    if not decision.verdicts:
        click.echo(f"{machine} has no point yet")
        return
    rows = [(str(v.number), v.action.value, size(v.stored_bytes), v.reason) for v in decision.verdicts]
    print_table(("point", "action", "stored", "why"), rows)
    if dry_run:
        click.echo(f"{len(going)} points would go and free {size(bytes_going)} at most")
    else:
        click.echo(f"{len(done.dropped) + len(done.composed)} points went and freed {size(max(0, done.freed_bytes))}")
