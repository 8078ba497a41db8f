"""`replica image`: look at disk images, check them, and convert them."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from replica.cli.bars import bars
from replica.cli.command import Command, json_option, parents_option
from replica.cli.output import print_json, print_table, size

if TYPE_CHECKING:
    from replica.images import ImageInfo

_FORMAT = "Of the image; told by its name without it."


class ImageLocation(click.Path):
    """A path, or an NBD URI."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        from replica.images import location

        return location(str(value))


@click.group()
def image() -> None:
    """Look at disk images, check them, convert them. None of it needs a configuration."""


@image.command(cls=Command)
@click.argument("path", metavar="IMG", type=ImageLocation())
@click.option("--format", "form", metavar="FORMAT", help=_FORMAT)
@parents_option
@json_option
def info(path: Path, form: str | None, parents: tuple[Path, ...], as_json: bool) -> None:
    """Format, sizes, chain, allocation and health of an image.

    What the content looks like is shown where it differs, and decides nothing: a guest can write any content.

    \b
    Examples:
      replica image info web-1.vhd
      replica image info web-1.avhd --parents /bases --json
    """
    from replica.images import image_info

    found = image_info(path, form, parents=parents)
    if as_json:
        print_json(found)
    else:
        _print(found)


@image.command(cls=Command)
@click.argument("path", metavar="IMG", type=ImageLocation())
@click.option("--format", "form", metavar="FORMAT", help=_FORMAT)
@parents_option
@json_option
def check(path: Path, form: str | None, parents: tuple[Path, ...], as_json: bool) -> None:
    """Check an image's structures and its parents', and read all that is allocated.

    Ends with 0 if all is as it should be, with 4 if the image cannot be read,
    or can be read though something is wrong with it. Nothing is changed.
    """
    from replica.durable import FileSystem
    from replica.errors import ImageError
    from replica.images import describe, format_of, read_through
    from replica.images import open as open_image

    fs = FileSystem()
    with open_image(path, form, fs=fs, parents=parents) as opened, bars(as_json) as bar:
        found = describe(fs, opened, format_of(path, form))
        count = read_through(opened, bar(f"check {path.name}"))
    remarks = [remark for file in found.chain for remark in file.remarks]
    if remarks:
        hint = "let the program that wrote it repair it, or convert it"
        raise ImageError(f"image {path} can be read, but: {'; '.join(remarks)}", hint=hint)
    if as_json:
        print_json({"path": str(path), "read_bytes": count, "health": found.health})
        return
    click.echo(f"{path} is sound: {size(count)} of {size(found.size_bytes)} are allocated and were read")


@image.command(cls=Command)
@click.argument("source", metavar="SRC", type=ImageLocation())
@click.argument("target", metavar="DST", type=ImageLocation())
@click.option("--format", "form", metavar="FORMAT", required=True, help="Of DST: raw, vhd, vhdx or nbd.")
@click.option("--subformat", metavar="KIND", help="Of DST: dynamic or fixed; the format's usual one without it.")
@click.option("--source-format", metavar="FORMAT", help="Of SRC; told by its name without it.")
@click.option("--force", is_flag=True, help="Replace DST if it is there.")
@parents_option
@json_option
def convert(
    source: Path,
    target: Path,
    form: str,
    subformat: str | None,
    source_format: str | None,
    force: bool,
    parents: tuple[Path, ...],
    as_json: bool,
) -> int:
    """Write the disk in SRC, its parents' content included, as one new image DST.

    What is zero stays a hole. DST gets its name when all of it is on stable
    storage, so whatever is called DST is whole. SRC must stand still meanwhile.
    A block device (raw) or an NBD export (nbd) is overwritten in place, with --force.

    \b
    Examples:
      replica image convert web-1.avhd web-1.raw --format raw
      replica image convert web-1.raw web-1.vhd --format vhd --subformat fixed
    """
    from replica.images import convert as convert_image
    from replica.images import image_info
    from replica.images import open as open_image

    with open_image(source, source_format, parents=parents) as opened, bars(as_json) as bar:
        try:
            convert_image(
                opened, target, form, subformat=subformat, force=force, progress=bar(f"convert {source.name}")
            )
        except KeyboardInterrupt:
            click.echo("replica: interrupted; nothing is left of it, a conversion always begins anew", err=True)
            return 128 + signal.SIGINT
    found = image_info(target, form)
    if as_json:
        print_json(found)
    else:
        click.echo(f"{target}: {size(found.size_bytes)} as {found.format} ({found.subformat}), ", nl=False)
        click.echo(f"{size(found.occupied_bytes)} on its file system")
    return 0


def _print(found: ImageInfo) -> None:
    own = found.chain[0]
    looks = found.content_looks_like
    lines = {
        "image": found.path,
        "format": f"{found.format} ({found.subformat})",
        "size": f"{size(found.size_bytes)} ({found.size_bytes} bytes)",
        **{f"  {name} size": f"{size(count)} ({count} bytes)" for name, count in own.sizes.items()},
        "sectors": f"{found.sector_bytes} bytes",
        "blocks": size(own.block_bytes) if own.block_bytes else "",
        "made by": own.creator,
        "id": own.id,
        "allocated": size(found.allocated_bytes),
        "file": f"{size(found.file_bytes)}, {size(found.occupied_bytes)} on its file system",
        "log": own.log if own.log != "none" else "",
        "looks like": f"{looks} by its content; a guest can imitate that" if looks and looks != found.format else "",
        "health": found.health,
    }
    for name, text in lines.items():
        if text:
            click.echo(f"{name + ':':<16} {text}")
    if len(found.chain) > 1:
        click.echo()
        rows = [
            [file.path, file.subformat, size(file.size_bytes), size(file.allocated_bytes or 0), file.id]
            for file in found.chain
        ]
        print_table(["chain", "kind", "size", "own blocks", "id"], rows)
    for file in found.chain:
        for remark in file.remarks:
            click.echo(f"remark: {remark}")
