"""`replica lock`: points that must stay until a date."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import click

from replica.cli.command import Command, config_option, json_option
from replica.cli.output import print_json, print_table


@click.command(cls=Command)
@click.argument("machine")
@click.option("--point", type=int, help="The point to lock.", metavar="N")
@click.option("--until", help="2027-01-31, or 2027-01-31T12:00:00Z; without a zone it is UTC.", metavar="DATE")
@click.option("--reason", default="", help="Why, for whoever reads the list.", metavar="TEXT")
@click.option("--begin-anew", is_flag=True, help="Where the locks are damaged or gone: have none from now on.")
@config_option("receiver.toml")
@json_option
def lock(
    machine: str, point: int | None, until: str | None, reason: str, begin_anew: bool, config: Path, as_json: bool
) -> None:
    """Keep a point of MACHINE until a date, whatever the policy says; without --point: list the locks.

    A lock can be extended and not be shortened, by nobody: it ends when the
    receiver's clock has reached the date, and a second time that no setting of
    that clock moves forward has reached it as well. Hours in which the host is
    off may come on top. Works whether `serve` runs or not.

    While the document with the locks is damaged or gone every point counts as
    locked. Put it back from a backup; if there is none, --begin-anew.

    \b
    Examples:
      replica lock web-1 --point 17 --until 2027-01-31 --reason "audit 2026" -c receiver.toml
      replica lock web-1 -c receiver.toml
    """
    from replica.cli.replicas import find_replica
    from replica.config import load_receiver
    from replica.durable import FileSystem
    from replica.model import rfc3339
    from replica.store.marks import Marks

    if (point is None) != (until is None):
        raise click.UsageError("give both --point and --until, or neither")
    if begin_anew and point is not None:
        raise click.UsageError("--begin-anew stands alone; lock points after it")
    if not reason.isprintable():
        raise click.UsageError("--reason holds what cannot be shown; write one line of text")
    fs = FileSystem()
    reader = find_replica(fs, load_receiver(config), machine)
    marks = Marks(fs, reader.layout)
    if begin_anew:
        marks.begin_anew()
    if point is not None and until is not None:
        until_ns = int(_moment(until).timestamp()) * 10**9
        with reader.open_point(point) as opened:  # pinned, so that it is there until it is locked
            marks.lock(opened.state.delta_id, point, until_ns, reason)
    now = marks.now()
    locks = sorted(marks.load().locks, key=lambda mark: (mark.point, mark.until_ns))
    if as_json:
        print_json(
            [
                {
                    "point": mark.point,
                    "delta_id": str(mark.delta_id),
                    "until": rfc3339(mark.until_ns),
                    "until_observed": rfc3339(mark.until_observed_ns),
                    "made_at": rfc3339(mark.made_at_ns),
                    "reason": mark.reason,
                    "holds": mark.holds(now),
                }
                for mark in locks
            ]
        )
        return
    if not locks:
        click.echo(f"no point of {machine} is locked")
        return
    print_table(
        ("point", "locked until", "since", "holds", "reason"),
        [
            (
                str(mark.point),
                rfc3339(mark.until_ns),
                rfc3339(mark.made_at_ns),
                "yes" if mark.holds(now) else "ended",
                mark.reason or "-",
            )
            for mark in locks
        ],
    )


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise click.UsageError(f"--until {text!r} is no date; write it like 2027-01-31") from error
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    if not 1970 < moment.year < 2200:
        raise click.UsageError(f"--until {text!r} is out of range; 1971 to 2199 are possible")
    return moment
