"""`replica adopt`: existing images become the base of a replica that is still empty."""

from __future__ import annotations

from pathlib import Path

import click

from replica.cli.bars import bars
from replica.cli.command import Command, config_option, json_option, parents_option
from replica.cli.output import print_json, size


@click.command(cls=Command)
@click.argument("machine")
@click.option(
    "--disk",
    "disks",
    multiple=True,
    required=True,
    metavar="NAME=IMAGE",
    help="A disk, by its name at the primary, and the image (raw, VHD or VHDX) that holds an older state of it.",
)
@parents_option
@config_option("receiver.toml")
@json_option
def adopt(machine: str, disks: tuple[str, ...], parents: tuple[Path, ...], config: Path, as_json: bool) -> None:
    """Make existing images the base of MACHINE's replica.

    An old copy, a restored backup: the replica must be enrolled (`replica
    enrol` at the primary) and still be empty, and `serve` must not run. The
    images are copied, and stay as they are. The next sync ships only what
    differs from them, and makes point 1. Give all disks at once: those that
    are not given are copied whole, since a second adopt is refused.

    \b
    Examples:
      replica adopt web-1 --disk os=/backup/os.vhd --disk data=/backup/data.raw -c receiver.toml
      replica adopt web-1 --disk os=/snapshots/os.avhd --parents /bases -c receiver.toml
    """
    from replica.cli.replicas import find_replica
    from replica.config import load_receiver
    from replica.durable import FileSystem
    from replica.store import adopt_images

    images: dict[str, Path] = {}
    for text in disks:
        name, equals, path = text.partition("=")
        if not equals or not name or not path:
            raise click.UsageError(f"--disk {text!r}: write NAME=IMAGE")
        if name in images:
            raise click.UsageError(f"--disk {text!r}: disk {name!r} is named twice")
        images[name] = Path(path)
    fs = FileSystem()
    reader = find_replica(fs, load_receiver(config), machine)
    with bars(as_json) as bar:
        head = adopt_images(fs, reader.layout.root, images, bar(f"adopt {machine}"), parents=parents)
    sizes = {state.disk.name: state.disk.size_bytes for state in head.disks}
    if as_json:
        print_json({"machine": reader.identity.machine, "disks": sizes, "roots": head.roots})
        return
    for name, size_bytes in sizes.items():
        click.echo(f"{name}: {size(size_bytes)} adopted")
    click.echo(f"the next sync of {machine} ships what differs, and makes its first point")
    click.echo(f"disks of {machine} that are not among these are copied whole by it")
