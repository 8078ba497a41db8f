"""`replica resync`: compare a machine with its replica, and ship what differs."""

from __future__ import annotations

from pathlib import Path

import click

from replica.cli.bars import bars
from replica.cli.command import Command, config_option, json_option
from replica.cli.output import duration, print_json, size, warn_of_open_keys
from replica.cli.sync import chosen, entry_of, keys_of, stopping, warn
from replica.errors import BusyError


@click.command(cls=Command)
@click.argument("machine")
@config_option("sender.toml")
@json_option
def resync(machine: str, config: Path, as_json: bool) -> int:
    """Compare MACHINE with its replica, ship what differs, make a point.

    What is known of the replica is made anew from the two sides' Merkle trees:
    the images are read once, and nothing is sent that the replica has. A sync
    does the same by itself whenever it must; this does it though nothing seems
    wrong.

    \b
    Example:
      replica resync web-1 -c sender.toml
    """
    from replica.config import load_sender
    from replica.durable import FileSystem
    from replica.primary.runner import sync_machines
    from replica.transport.tls import client_context

    spec = load_sender(config)
    machines = chosen(spec, machine)
    client_context(spec.tls)
    warn_of_open_keys(keys_of(spec))
    with stopping() as stop, bars(as_json) as bar:
        (outcome,) = sync_machines(FileSystem(), spec, machines, progress=bar, stop=stop, rebuild=True)
    if stop.number:
        if as_json:
            print_json(entry_of(outcome))
        click.echo("replica: interrupted; nothing is lost, run it again to go on", err=True)
        return 128 + stop.number
    if outcome.error is not None:
        raise outcome.error
    result = outcome.result
    if result is None:
        raise BusyError("the resync was stopped by a signal", hint="run it again to go on")
    warn(result)
    if as_json:
        print_json(entry_of(outcome))
        return 0
    click.echo(
        f"{machine}: {size(result.bytes_scanned)} read, {size(result.bytes_differing or 0)} differed from the replica; "
        f"{size(result.bytes_changed)} changed, {size(result.bytes_wire)} sent, {duration(result.seconds)}; "
        f"point {result.point}"
    )
    return 0
