"""`replica enrol`: make a machine's replica at the receiver, and ship nothing."""

from __future__ import annotations

from pathlib import Path

import click

from replica.cli.command import Command, config_option, json_option
from replica.cli.output import print_json
from replica.cli.sync import chosen


@click.command(cls=Command)
@click.argument("machine")
@config_option("sender.toml")
@json_option
def enrol(machine: str, config: Path, as_json: bool) -> None:
    """Make MACHINE's replica at the receiver, and ship nothing.

    The first sync does this by itself. Do it alone where existing images are
    to become the replica's base (`replica adopt` at the receiver). Again: no
    change.

    \b
    Example:
      replica enrol web-1 -c sender.toml
    """
    from replica.config import load_sender
    from replica.durable import FileSystem
    from replica.primary.enrol import enrol_machine
    from replica.transport.client import HttpReceiver

    spec = load_sender(config)
    (found,) = chosen(spec, machine)
    receiver = HttpReceiver(found.to, spec.tls)
    try:
        info = enrol_machine(FileSystem(), spec, found, receiver)
    finally:
        receiver.close()
    if as_json:
        print_json({"machine": found.name, "replica_id": str(info.replica_id), "point": info.head.point})
        return
    click.echo(f"{found.name}: replica {info.replica_id}, point {info.head.point}")
