"""`replica restore`: a point as image files."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click

from replica.cli.bars import bars
from replica.cli.command import Command, config_option, json_option
from replica.cli.output import print_json

if TYPE_CHECKING:
    from replica.durable import FileSystem
    from replica.store import ReplicaReader


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
    "--format",
    "image_format",
    type=click.Choice(["raw", "vhd", "vhdx", "qcow2"]),
    help="Of the files; the head's without it. qcow2 needs qemu-utils.",
)
@click.option("--subformat", metavar="KIND", help="fixed or dynamic; without it a vhd is fixed and a vhdx dynamic.")
@click.option("--chain", is_flag=True, help="All points up to --point: the oldest whole, each later one on top of it.")
@click.option("--since", type=click.IntRange(min=1), metavar="N", help="With --chain: the oldest point of the chain.")
@click.option("--allow-lost", is_flag=True, help="Write zeros where content is lost, and name every such range.")
@config_option("receiver.toml")
@json_option
def restore(
    machine: str,
    point: int | None,
    target: Path,
    image_format: str | None,
    subformat: str | None,
    chain: bool,
    since: int | None,
    allow_lost: bool,
    config: Path,
    as_json: bool,
) -> int:
    """Write a recovery point of MACHINE into DIR as one image per disk.

    The content is checked against the point's Merkle roots before a file gets
    its name: what is called DIR/os.raw is the disk as it was, and what is zero
    is a hole. Files that travel with the machine (`files` in the sender's
    configuration) go to DIR/files/, each under the path that it has at the
    primary. Works whether `serve` runs or not, and replication goes on meanwhile.

    With --chain every point leaves, as DIR/os-3.vhdx (whole), DIR/os-4.vhdx (what
    differs from it), and so on. A hypervisor opens any of them; they stay together.

    \b
    Examples:
      replica restore web-1 --to out/ -c receiver.toml
      replica restore web-1 --point 3 --format vhdx --to out/ -c receiver.toml
      replica restore web-1 --chain --since 3 --format vhdx --to out/ -c receiver.toml
    """
    from replica.cli.replicas import find_replica
    from replica.config import load_receiver
    from replica.durable import FileSystem
    from replica.store import machine_files, restore_point

    if since is not None and not chain:
        raise click.UsageError("--since is of a --chain")
    if chain and allow_lost:
        raise click.UsageError("--chain has only points that are whole; leave --allow-lost away, or --chain")
    fs = FileSystem()
    reader = find_replica(fs, load_receiver(config), machine)
    form = image_format or reader.identity.head_format
    if chain:
        return _chain(fs, reader, target, form, subformat, since, point, as_json)
    with reader.open_point(point) as opened, bars(as_json) as bar:
        lost: dict[str, list[tuple[int, int]]] = {}
        gone = lost if allow_lost else None
        progress = bar(f"restore {machine}")
        try:
            files = restore_point(fs, opened, target, form, progress, subformat=subformat, missing=gone)
        except KeyboardInterrupt:
            if as_json:
                raise  # it becomes the one document
            return _interrupted()
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


def _chain(
    fs: FileSystem,
    reader: ReplicaReader,
    target: Path,
    form: str,
    subformat: str | None,
    first: int | None,
    last: int | None,
    as_json: bool,
) -> int:
    from replica.images.exporting import ExportFormat
    from replica.store import export_points

    machine = reader.identity.machine
    kind = ExportFormat.of(form, subformat, chain=True)
    with bars(as_json) as bar:
        try:
            points = export_points(fs, reader, target, kind, bar(f"restore {machine}"), first=first, last=last)
        except KeyboardInterrupt:
            return _interrupted()
    if as_json:
        rows = [
            {
                "point": entry.point,
                "files": {name: str(path) for name, path in entry.files.items()},
                "machine_files": str(entry.machine_files) if entry.machine_files else None,
            }
            for entry in points
        ]
        print_json({"points": rows})
        return 0
    click.echo(f"{len(points)} points of {machine} are restored and checked:")
    for entry in points:
        for name, path in entry.files.items():
            click.echo(f"  point {entry.point}, {name}: {path}")
        if entry.machine_files:
            click.echo(f"  point {entry.point}: {entry.machine_files}")
    return 0


def _interrupted() -> int:
    click.echo("replica: interrupted; nothing is left of it, a restore always begins anew", err=True)
    return 128 + signal.SIGINT
