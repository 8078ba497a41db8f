"""`replica verify`: the head against its Merkle tree."""

from __future__ import annotations

from pathlib import Path

import click

from replica.cli.bars import bars
from replica.cli.command import Command, config_option, json_option
from replica.cli.output import complain, print_json, size
from replica.errors import DamageError


@click.command(cls=Command)
@click.argument("machine")
@config_option("receiver.toml")
@json_option
def verify(machine: str, config: Path, as_json: bool) -> int:
    """Check MACHINE's head: every byte of it against its Merkle tree.

    Holes are not read, they must be zero in the tree, too. A mismatch is
    damage on the storage: the ranges are listed, and the exit code is 11. They
    are noted, too, and the next sync of the machine sends them again.
    Works whether `serve` runs or not.

    \b
    Example:
      replica verify web-1 -c receiver.toml
    """
    from replica.cli.replicas import find_replica
    from replica.config import load_receiver
    from replica.durable import FileSystem
    from replica.store.damage import note_verdicts

    fs = FileSystem()
    reader = find_replica(fs, load_receiver(config), machine)
    with bars(as_json) as bar:
        verdicts = reader.verify(bar(f"verify {machine}"))
    note_verdicts(fs, reader.layout, verdicts)
    damaged = [verdict for verdict in verdicts if verdict.mismatches]
    if as_json:
        disks = {
            v.disk.name: {
                "bytes": v.disk.size_bytes,
                "bytes_read": v.checked_bytes,
                "mismatches": [{"offset": offset, "length": length} for offset, length in v.mismatches],
            }
            for v in verdicts
        }
        print_json({"ok": not damaged, "disks": disks})
    else:
        for v in verdicts:
            bad = sum(length for _, length in v.mismatches)
            text = f"{len(v.mismatches)} ranges with {size(bad)} differ" if bad else "as it should be"
            click.echo(f"{v.disk.name}: {size(v.disk.size_bytes)}, {size(v.checked_bytes)} read: {text}")
            for offset, length in v.mismatches:
                click.echo(f"  bytes {offset} to {offset + length - 1}")
    if not damaged:
        return 0
    names = ", ".join(v.disk.name for v in damaged)
    error = DamageError(
        f"the head of {machine} is damaged on disk {names}",
        hint="the next sync of the machine sends it again; check the storage below it",
    )
    complain(error)
    return error.exit_code
