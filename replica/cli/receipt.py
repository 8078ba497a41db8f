"""`replica receipt`: what the receiver signed of a point, shown, checked and handed out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from replica.cli.bars import bars
from replica.cli.command import Command, config_option, json_option
from replica.cli.output import complain, print_json, size
from replica.errors import ConfigError, DamageError, FormatError, PointGoneError, RootMismatchError, StorageError
from replica.model import rfc3339

if TYPE_CHECKING:
    from replica.durable import FileSystem
    from replica.receipt import Receipt, ReceiptDisk, SignedReceipt

LINKS = ".links"
MAX_LINKS_BYTES = 1 << 30
_RAW = "it must be raw: `replica restore --format raw`, also where the head is VHD"


@click.group()
def receipt() -> None:
    """Signed receipts: which content a point had, and since when the source was really read."""


@receipt.command(cls=Command)
@click.argument("machine")
@click.option("--point", type=click.IntRange(min=1), metavar="N", help="Which point; the newest without it.")
@config_option("receiver.toml")
@json_option
def show(machine: str, point: int | None, config: Path, as_json: bool) -> None:
    """Show the receipt of a point of MACHINE.

    \b
    Examples:
      replica receipt show web-1 -c receiver.toml
      replica receipt show web-1 --point 3 --json -c receiver.toml
    """
    from replica.cli.replicas import find_replica
    from replica.config import load_receiver
    from replica.durable import FileSystem
    from replica.receipt import parse

    reader = find_replica(FileSystem(), load_receiver(config), machine)
    listed = reader.points()
    if point is None and not listed:
        raise PointGoneError(f"machine {machine!r} has no point yet", hint="its first copy is not complete")
    number = listed[-1].state.point if point is None else point
    signed = parse(reader.receipt(number), f"the receipt of point {number}")
    if as_json:
        print_json(fields(signed))
        return
    _print(signed)


@receipt.command(cls=Command)
@click.argument("machine")
@click.option(
    "--to", "target", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Made if it is missing."
)
@config_option("receiver.toml")
@json_option
def export(machine: str, target: Path, config: Path, as_json: bool) -> int:
    """Write the receipts of all points of MACHINE into DIR, for whoever checks them elsewhere.

    A file POINT-ID.receipt for each, with what links it to the one before
    where receipts between them went with their points. Files that are there
    already stay, unless they are other ones: then it stops. One that is
    damaged is named and left out, and the exit code is 11.

    Whoever checks them needs the public key, too. It is not written into DIR:
    take it from <storage>/receipt.pub once, on a way that you trust.

    \b
    Example:
      replica receipt export web-1 --to audit/ -c receiver.toml
    """
    from replica.cli.replicas import find_replica
    from replica.config import load_receiver
    from replica.durable import FileSystem
    from replica.store.receipts import ReceiptFiles

    fs = FileSystem()
    reader = find_replica(fs, load_receiver(config), machine)
    files = ReceiptFiles(fs, reader.layout)
    fs.make_directory(target)
    written: dict[str, str] = {}
    receipts, damaged = files.look()
    for signed in receipts:
        path = target / f"{signed.receipt.point:08}-{signed.receipt.delta_id}.receipt"
        if fs.exists(path) and fs.read_bytes(path, len(signed.data)) != signed.data:
            raise FormatError(f"{path} is another receipt of the same point", hint="one of the two is not genuine")
        links = files.links(signed.receipt.delta_id)
        if links:  # first, so that a receipt that is there has its own
            fs.replace_bytes(path.with_name(path.name + LINKS), links)
        fs.replace_bytes(path, signed.data)
        written[str(signed.receipt.point)] = str(path)
    if as_json:
        print_json({"files": written, "damaged": [str(path) for path in damaged]})
    else:
        click.echo(f"{len(written)} receipts of {machine} are in {target}")
    if not damaged:
        return 0
    error = DamageError(
        f"{len(damaged)} receipts of {machine} are damaged and were not written: {', '.join(map(str, damaged))}",
        hint="their points are not affected; earlier exports may have them",
    )
    complain(error)
    return error.exit_code


@receipt.command(cls=Command)
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path(path_type=Path))
@click.option(
    "--key", type=click.Path(path_type=Path), required=True, metavar="PUB", help="The receiver's receipt.pub."
)
@click.option(
    "--image",
    "images",
    multiple=True,
    metavar="DISK=FILE",
    help="A raw image that must be that disk at the last of the receipts; may be given for each disk.",
)
@json_option
def verify(files: tuple[Path, ...], key: Path, images: tuple[str, ...], as_json: bool) -> None:
    """Check receipts, and restored images against them, with nothing but the receiver's public key.

    Checks form and signature of each FILE, and that they are one chain, in the
    order of their numbers; FILE.links beside a receipt leads over those that
    went with their points. Needs neither configuration nor store nor network.
    Exit code 0: everything is as it was signed. 11: something is not.

    \b
    Examples:
      replica receipt verify audit/*.receipt --key receipt.pub
      replica receipt verify audit/00000003-*.receipt --key receipt.pub --image os=out/os.raw
    """
    from itertools import pairwise

    from replica.durable import FileSystem
    from replica.receipt import MAX_RECEIPT_BYTES, check_chain, parse
    from replica.signing import decode_public
    from replica.signing import verify as check_signature

    fs = FileSystem()
    public = decode_public(_read(fs, key, 16 << 10), str(key))
    found = []
    for path in files:
        signed = parse(_read(fs, path, MAX_RECEIPT_BYTES), str(path))
        check_signature(signed, public)
        beside = path.with_name(path.name + LINKS)
        found.append((signed, fs.read_bytes(beside, MAX_LINKS_BYTES) if fs.exists(beside) else b""))
    found.sort(key=lambda pair: pair[0].receipt.serial)
    for (older, _), (newer, links) in pairwise(found):
        check_chain(older, newer, links)
    last = found[-1][0].receipt
    checked = [_check_image(text, last, as_json) for text in images]
    if as_json:
        print_json({"ok": True, "receipts": [fields(signed) for signed, _ in found], "images": checked})
        return
    for signed, _ in found:
        proven = "proven" if signed.receipt.proven else "signed"
        click.echo(f"point {signed.receipt.point} of {rfc3339(signed.receipt.frozen_at_ns)}: {proven}, genuine")
    if len(found) > 1:
        click.echo(f"{len(found)} receipts, one chain")
    for name in checked:
        click.echo(f"{name}: is disk {name} at point {last.point}, bit for bit")


def fields(signed: SignedReceipt) -> dict[str, object]:
    """A receipt as `--json` shows it."""
    receipt = signed.receipt
    return {
        "machine": receipt.machine,
        "replica_id": str(receipt.replica_id),
        "point": receipt.point,
        "delta_id": str(receipt.delta_id),
        "epoch": receipt.epoch.counter,
        "frozen_at": rfc3339(receipt.frozen_at_ns),
        "committed_at": rfc3339(receipt.committed_at_ns),
        "proven": receipt.proven,
        "disks": {
            d.name: {
                "bytes": d.size_bytes,
                "root": d.root,
                "read_point": d.read_point,
                "trusted": list(d.trusted),
            }
            for d in receipt.disks
        },
        "algorithm": receipt.algorithm,
        "key_id": receipt.key_id,
        "serial": receipt.serial,
        "previous": receipt.previous,
        "link": signed.link,
        "signature": signed.signature.hex(),
    }


def _print(signed: SignedReceipt) -> None:
    receipt = signed.receipt
    click.echo(f"point {receipt.point} of {receipt.machine} (replica {receipt.replica_id}, delta {receipt.delta_id})")
    click.echo(f"frozen at {rfc3339(receipt.frozen_at_ns)}, committed by {rfc3339(receipt.committed_at_ns)}")
    for disk in receipt.disks:
        click.echo(f"  {disk.name}: {size(disk.size_bytes)}, Merkle root {disk.root}")
        click.echo(f"    {_since(disk, receipt.point)}")
    click.echo("proven" if receipt.proven else "signed, not proven: not every block was read for this very point")
    click.echo(f"number {receipt.serial} of this replica; {receipt.algorithm}, key {receipt.key_id}")


def _since(disk: ReceiptDisk, point: int) -> str:
    if disk.read_point == point:
        return "every block was read at the source for this point"
    since = f"since point {disk.read_point}" if disk.read_point else "at an unknown time"
    trusted = f"; believed since: {', '.join(disk.trusted)}" if disk.trusted else ""
    return f"every block was last read at the source {since}{trusted}"


def _read(fs: FileSystem, path: Path, limit: int) -> bytes:
    """A file that the command line names: one that is not there is the caller's mistake."""
    try:
        return fs.read_bytes(path, limit)
    except StorageError as error:
        raise ConfigError(error.message, hint="name the files that the receiver exported") from error


def _check_image(text: str, receipt: Receipt, as_json: bool) -> str:
    """The disk's name, if the image is the disk. ConfigError, RootMismatchError."""
    from replica import images
    from replica.durable import FileSystem
    from replica.merkle import MemoryNodes, MerkleTree, root_of_content

    name, separator, path = text.partition("=")
    disk = next((d for d in receipt.disks if d.name == name), None)
    if not separator or disk is None:
        names = ", ".join(d.name for d in receipt.disks)
        raise ConfigError(f"--image {text!r} names no disk of point {receipt.point}", hint=f"DISK=FILE; it has {names}")
    with images.open(Path(path), "raw", fs=FileSystem()) as image, bars(as_json) as bar:
        if image.size_bytes != disk.size_bytes:
            raise RootMismatchError(
                f"{path} has {image.size_bytes} bytes, disk {name!r} had {disk.size_bytes} at point {receipt.point}",
                hint=_RAW,
            )
        ranges = image.allocated(0, image.size_bytes)
        update = MerkleTree(MemoryNodes(), disk.leaf_bytes).update(write=False)
        root = root_of_content(image.size_bytes, update, ranges, image.read_into, bar(f"read {name}"))
    if root.hex() != disk.root:
        raise RootMismatchError(
            f"{path} is not disk {name!r} at point {receipt.point}: its Merkle root is {root.hex()}, the receipt says "
            f"{disk.root}",
            hint=f"was it written after it was restored? restore it again; {_RAW}",
        )
    return name
