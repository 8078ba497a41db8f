"""`replica sync`, one cycle now, and `replica run`, cycles on schedule."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from replica.cli.bars import bars
from replica.cli.command import Command, config_option, json_option
from replica.cli.output import complain, duration, error_fields, print_json, size, warn_of_open_keys
from replica.errors import BusyError, UnknownMachineError
from replica.model import rfc3339

if TYPE_CHECKING:
    from replica.primary.cycle import SyncResult
    from replica.primary.runner import Outcome
    from replica.primary.spec import MachineSpec, SenderSpec


class Stop(threading.Event):
    """Set by the first SIGINT or SIGTERM; `number` says which one it was."""

    number = 0


@contextmanager
def stopping() -> Iterator[Stop]:
    """Let the first signal end the work in order, and the second one end the process."""
    stop = Stop()

    def signalled(number: int, _frame: object) -> None:
        stop.number = number
        stop.set()
        for other in before:
            signal.signal(other, signal.SIG_DFL)

    before = {number: signal.signal(number, signalled) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@click.command(cls=Command)
@click.argument("machine", required=False)
@config_option("sender.toml")
@json_option
def sync(machine: str | None, config: Path, as_json: bool) -> int:
    """Run one replication cycle of MACHINE, or of every machine, now.

    Every cycle commits a recovery point, also when nothing changed. An error
    on one machine stops no other; the exit code is then the first one's.

    \b
    Examples:
      replica sync web-1 -c sender.toml
      replica sync --json -c sender.toml
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
        outcomes = sync_machines(FileSystem(), spec, machines, progress=bar, stop=stop)
    if as_json:
        print_json([entry_of(outcome) for outcome in outcomes])
    for outcome in outcomes:
        if outcome.error is not None:
            complain(outcome.error, outcome.machine)
        elif outcome.result is not None and not as_json:
            click.echo(_line(outcome.result))
        if outcome.result is not None:
            warn(outcome.result)
    if stop.number:
        click.echo("replica: interrupted; nothing is lost, run it again to go on", err=True)
        return 128 + stop.number
    return next((outcome.error.exit_code for outcome in outcomes if outcome.error is not None), 0)


def chosen(spec: SenderSpec, name: str | None) -> tuple[MachineSpec, ...]:
    """The machines to sync, in the configuration's order."""
    machines = tuple(m for m in spec.machines if name in (None, m.name, f"{spec.name}/{m.name}"))
    if not machines:
        names = ", ".join(m.name for m in spec.machines)
        raise UnknownMachineError(f"no machine {name!r} in the configuration", hint=f"there is {names}")
    return machines


def keys_of(spec: SenderSpec) -> list[Path]:
    """The files with private keys that a sender uses."""
    return [spec.tls.key, *sorted(spec.keys.glob("*/*.key"))]


def warn(result: SyncResult) -> None:
    """What somebody should know of the point, on standard error."""
    for notice in result.notices:
        click.echo(f"replica: WARNING: {result.machine}: point {result.point}: {notice}", err=True)


def _line(result: SyncResult) -> str:
    repaired = f"; {size(result.bytes_repaired)} of the replica's head repaired" if result.bytes_repaired else ""
    return (
        f"{result.machine}: point {result.point} frozen at {rfc3339(result.frozen_at_ns)}; "
        f"{size(result.bytes_changed)} changed, {size(result.bytes_wire)} sent, {duration(result.seconds)}{repaired}"
    )


def entry_of(outcome: Outcome) -> dict[str, object]:
    """A machine's outcome as `--json` shows it."""
    if outcome.error is not None:
        return {"machine": outcome.machine, "error": error_fields(outcome.error)}
    result = outcome.result
    if result is None:
        stopped = BusyError("the cycle was stopped by a signal", hint="run it again to go on")
        return {"machine": outcome.machine, "error": error_fields(stopped)}
    return {
        "machine": result.machine,
        "point": result.point,
        "frozen_at": rfc3339(result.frozen_at_ns),
        "bytes_scanned": result.bytes_scanned,
        "bytes_changed": result.bytes_changed,
        "bytes_wire": result.bytes_wire,
        "seconds": round(result.seconds, 6),
        "roots": result.roots,
        "mode": str(result.mode),
        "parts": result.parts,
        "bytes_differing": result.bytes_differing,
        "bytes_repaired": result.bytes_repaired,
        "notices": list(result.notices),
    }


@click.command(cls=Command)
@config_option("sender.toml")
def run(config: Path) -> None:
    """Run the cycles of every machine on schedule, until stopped.

    A cycle that fails is retried with a growing pause and costs nothing but
    the blocks that changed meanwhile. SIGTERM or Ctrl-C ends it in order.

    \b
    Example:
      replica run -c sender.toml
    """
    from replica.cli.log import log_to_stderr
    from replica.config import load_sender
    from replica.primary.runner import run as run_schedule
    from replica.transport.tls import client_context

    spec = load_sender(config)
    client_context(spec.tls)
    warn_of_open_keys(keys_of(spec))
    log_to_stderr()
    with stopping() as stop:
        run_schedule(spec, stop)
