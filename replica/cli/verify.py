"""`replica verify`: the head against its Merkle tree, and every chunk of every point."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from replica.cli.bars import bars
from replica.cli.command import Command, config_option, json_option
from replica.cli.output import complain, print_json, size
from replica.errors import DamageError
from replica.model import rfc3339

if TYPE_CHECKING:
    from replica.store.points import PointInfo
    from replica.store.verify_round import Report


@click.command(cls=Command)
@click.argument("machine")
@click.option("--points", is_flag=True, help="Read and check every chunk of every older point, too.")
@click.option("--rate", metavar="RATE", help="Read no faster than that, such as 100MiB/s; as fast as it goes without.")
@click.option("--restart", is_flag=True, help="Begin anew, where the last one was cut.")
@config_option("receiver.toml")
@json_option
def verify(machine: str, points: bool, rate: str | None, restart: bool, config: Path, as_json: bool) -> int:
    """Check MACHINE's head: every byte of it against its Merkle tree.

    Holes are not read, they must be zero in the tree, too. A mismatch is
    damage on the storage; it is noted, and the next sync of the machine sends
    those ranges again. With --points, the inverses that hold the older points
    are read and opened as well, chunk by chunk. Damage is named with the points
    that it costs, as is every point that cannot be restored for whatever
    reason, and the exit code is 11.

    One that is cut, by Ctrl-C or a kill, goes on where it was when it is
    called again. Works whether `serve` runs or not.

    \b
    Examples:
      replica verify web-1 -c receiver.toml
      replica verify web-1 --points --rate 100MiB/s -c receiver.toml
    """
    from replica.cli.replicas import find_replica
    from replica.config import load_receiver, parse_rate
    from replica.durable import FileSystem
    from replica.store.pace import be_idle
    from replica.store.verify_round import verify_replica

    try:
        bytes_per_second = parse_rate(rate) if rate else None
    except ValueError as error:
        raise click.UsageError(f"--rate: {error}") from error
    fs = FileSystem()
    reader = find_replica(fs, load_receiver(config), machine)
    be_idle()
    with bars(as_json) as bar:
        report = verify_replica(
            fs,
            reader.layout,
            bar(f"verify {machine}"),
            points=points,
            restart=restart,
            bytes_per_second=bytes_per_second,
        )
    named = {p.state.point for p in report.points}
    lost = [i for i in reader.points() if not i.restorable and i.state.point not in named] if points else []
    ok = report.ok and not lost
    if as_json:
        numbers = [info.state.point for info in lost]
        print_json({"point": reader.head.point, **_fields(report), "ok": ok, "not_restorable": numbers})
    else:
        if not reader.head.point:
            click.echo(f"{machine} has no point yet{'' if report.disks else ': there is nothing to verify'}")
        _print(report)
        for info in lost:
            click.echo(f"point {info.state.point}: not restorable: {info.why}")
    if ok:
        return 0
    damage = DamageError(_what(machine, report, lost), hint=_hint(report))
    complain(damage)
    return damage.exit_code


def _fields(report: Report) -> dict[str, object]:
    fields: dict[str, object] = {
        "ok": report.ok,
        "resumed": report.resumed,
        "started_at": rfc3339(report.started_at_ns),
        "finished_at": rfc3339(report.finished_at_ns),
        "disks": {
            v.disk.name: {
                "bytes": v.disk.size_bytes,
                "bytes_read": v.checked_bytes,
                "mismatches": [{"offset": offset, "length": length} for offset, length in v.mismatches],
                "tree_unfit": v.tree_unfit,
            }
            for v in report.disks
        },
        "points": [
            {"point": p.state.point, "disk": p.disk, "offset": p.offset, "length": p.length, "source": p.source}
            for p in report.points
        ],
    }
    if report.files is not None:
        fields["files"] = [
            {
                "file": mark.name,
                "bytes": mark.stored_bytes,
                "problem": mark.problem or None,
                "damage": [
                    {"segment": d.segment, "disk": d.disk, "offset": d.offset, "length": d.length, "error": d.error}
                    for d in mark.found
                ],
            }
            for mark in report.files
        ]
        fields["receipts_damaged"] = report.receipts
    return fields


def _print(report: Report) -> None:
    if report.resumed:
        click.echo(f"went on with the verification that began at {rfc3339(report.started_at_ns)}")
    for v in report.disks:
        bad = sum(length for _, length in v.mismatches)
        text = f"{len(v.mismatches)} ranges with {size(bad)} differ" if bad else "as it should be"
        text = "as it should be, but its Merkle tree is damaged" if v.tree_unfit else text
        click.echo(f"{v.disk.name}: {size(v.disk.size_bytes)}, {size(v.checked_bytes)} read: {text}")
        for offset, length in v.mismatches:
            click.echo(f"  bytes {offset} to {offset + length - 1}")
    if report.files is not None:
        total, bad_files = sum(m.stored_bytes for m in report.files), [m for m in report.files if m.found or m.problem]
        text = f"{len(bad_files)} of them damaged" if bad_files else "as they should be"
        click.echo(f"points: {len(report.files)} inverses, {size(total)} read: {text}")
        for mark in bad_files:
            if mark.problem:
                click.echo(f"  {mark.name}: {mark.problem}")
            for d in mark.found:
                click.echo(f"  {mark.name}, segment {d.segment}: disk {d.disk}, {_range(d.offset, d.length)}")
    for p in report.points:
        click.echo(
            f"point {p.state.point}: disk {p.disk}, {_range(p.offset, p.length)} cannot be restored ({p.source})"
        )
    for point in report.receipts:
        click.echo(f"point {point}: its receipt is damaged; its content is not affected")


def _range(offset: int, length: int) -> str:
    return f"bytes {offset} to {offset + length - 1}"


def _what(machine: str, report: Report, lost: list[PointInfo]) -> str:
    parts = []
    if lost:
        parts.append(f"points of {machine} cannot be restored: {', '.join(str(info.state.point) for info in lost)}")
    disks = ", ".join(v.disk.name for v in report.disks if v.mismatches)
    if disks:
        parts.append(f"the head of {machine} is damaged on disk {disks}")
    trees = ", ".join(v.disk.name for v in report.disks if v.tree_unfit)
    if trees:
        parts.append(f"the Merkle tree of {machine} is damaged on disk {trees}, its content is not")
    numbers = sorted({p.state.point for p in report.points})
    if numbers:
        parts.append(f"points that read through damage: {', '.join(map(str, numbers))}")
    closed = sum(1 for mark in report.files or () if mark.problem)
    if closed:
        parts.append(f"{closed} files of points of {machine} cannot be opened")
    if report.receipts:
        parts.append(f"receipts of {machine} are damaged: {', '.join(map(str, report.receipts))}")
    return "; ".join(parts) or f"files of points of {machine} are damaged that no point needs"


def _hint(report: Report) -> str:
    if any(v.mismatches for v in report.disks):
        return "the next sync of the machine sends it again; check the storage below it"
    if any(v.tree_unfit for v in report.disks):
        return "the next sync of the machine makes the tree anew; check the storage below it"
    return "check the storage below it; every other point can be restored"
