"""`replica restore`: a point as image files."""

from __future__ import annotations

import signal
from pathlib import Path

import click

from replica.cli.bars import bars
from replica.cli.command import Command, config_option, json_option
from replica.cli.output import print_json


@click.command(cls=Command)
@click.argument("machine")
@click.option("--point", type=click.IntRange(min=1), metavar="N", help="Which point; the newest without it.")
@click.option(
    "--to",
    "target",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="Where the files go; the directory is made if missing, existing files are never overwritten.",
)
@click.option(
    "--format", "image_format", type=click.Choice(["raw", "vhd"]), help="Of the files; the head's without it."
)
@click.option("--allow-lost", is_flag=True, help="Write zeros where content is lost, and name every such range.")
@config_option("receiver.toml")
@json_option
def restore(
    machine: str,
    point: int | None,
    target: Path,
    image_format: str | None,
    allow_lost: bool,
    config: Path,
    as_json: bool,
) -> int:
    """Write a recovery point of MACHINE into DIR as one image per disk.

    The content is checked against the point's Merkle roots before a file gets
    its name: what is called DIR/os.raw is the disk as it was. Files that travel
    with the machine (`files` in the sender's configuration) go to DIR/files/,
    each under the path that it has at the primary. Works whether
    `serve` runs or not, and replication goes on meanwhile.

    \b
    Examples:
      replica restore web-1 --to out/ -c receiver.toml
      replica restore web-1 --point 3 --format vhd --to out/ -c receiver.toml
    """
    from replica.cli.replicas import find_replica
    from replica.config import load_receiver
    from replica.durable import FileSystem
    from replica.store import HeadFormat, machine_files, restore_point

    fs = FileSystem()
    reader = find_replica(fs, load_receiver(config), machine)
    form: HeadFormat = "vhd" if (image_format or reader.identity.head_format) == "vhd" else "raw"
    with reader.open_point(point) as opened, bars(as_json) as bar:
        lost: dict[str, list[tuple[int, int]]] = {}
        gone = lost if allow_lost else None
        try:
            files = restore_point(fs, opened, target, form, bar(f"restore {machine}"), missing=gone)
        except KeyboardInterrupt:
            if as_json:
                raise  # it becomes the one document
            click.echo("replica: interrupted; nothing is left of it, a restore always begins anew", err=True)
            return 128 + signal.SIGINT
        there = machine_files(opened, allow_lost=allow_lost)
        left_out = opened.state.files is not None and not there
        written = [str(target / "files" / path) for path in there]
        number = opened.state.point
    if left_out:
        click.echo("replica: WARNING: the machine's files are damaged and were left out", err=True)
    for name, ranges in lost.items():
        click.echo(
            f"replica: WARNING: disk {name} is NOT the point: its root was not checked, and zeros are at", err=True
        )
        for start, stop in ranges:
            click.echo(f"replica:   bytes {start} to {stop - 1}", err=True)
    if as_json:
        disks = {name: str(path) for name, path in files.items()}
        print_json({"point": number, "files": disks, "machine_files": written, "lost": lost})
        return 0
    checked = "restored, but for what is lost" if lost else "restored and checked"
    click.echo(f"point {number} of {machine} is {checked}:")
    for name, path in files.items():
        click.echo(f"  {name}: {path}")
    for file in written:
        click.echo(f"  {file}")
    return 0
