"""`replica sync`, one cycle now, and `replica run`, cycles on schedule."""

from __future__ import annotations

import os
import signal
import sys
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

import click

from replica.cli.bars import Bar, bars
from replica.cli.command import Command, config_option, json_option
from replica.cli.output import complain, duration, error_fields, print_json, size
from replica.errors import ReplicaError, UnknownMachineError
from replica.model import rfc3339

if TYPE_CHECKING:
    from replica.primary.cycle import SyncResult
    from replica.primary.spec import MachineSpec, SenderSpec


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
    from replica.transport.tls import client_context

    spec = load_sender(config)
    machines = _chosen(spec, machine)
    client_context(spec.tls)
    with bars(as_json) as bar:
        outcomes = _sync_all(spec, machines, bar)
    if as_json:
        print_json([_entry(m, outcome) for m, outcome in zip(machines, outcomes, strict=True)])
    code = 0
    for m, outcome in zip(machines, outcomes, strict=True):
        if isinstance(outcome, ReplicaError):
            complain(outcome, m.name)
            code = code or outcome.exit_code
        elif not as_json:
            click.echo(
                f"{m.name}: point {outcome.point} frozen at {rfc3339(outcome.frozen_at_ns)}; "
                f"{size(outcome.bytes_changed)} changed, {size(outcome.bytes_wire)} sent, {duration(outcome.seconds)}"
            )
    return code


def _chosen(spec: SenderSpec, name: str | None) -> list[MachineSpec]:
    """The machines to sync, in the configuration's order."""
    machines = [m for m in spec.machines if name in (None, m.name, f"{spec.name}/{m.name}")]
    if not machines:
        names = ", ".join(m.name for m in spec.machines)
        raise UnknownMachineError(f"no machine {name!r} in the configuration", hint=f"there is {names}")
    return machines


def _sync_all(spec: SenderSpec, machines: list[MachineSpec], bar: Bar) -> list[SyncResult | ReplicaError]:
    """Several at once, each with its own connection. A single one runs in this thread, so that Ctrl-C unwinds it."""
    if len(machines) == 1:
        return [_sync_one(spec, machines[0], bar)]
    pool = ThreadPoolExecutor(min(spec.parallel, len(machines)), "sync")
    futures: list[Future[SyncResult | ReplicaError]] = [pool.submit(_sync_one, spec, m, bar) for m in machines]
    try:
        wait(futures, return_when=FIRST_EXCEPTION)
        return [future.result() for future in futures]
    except (KeyboardInterrupt, SystemExit):
        # The cycles cannot be interrupted one by one; ending the process is what they are built to survive,
        # and the watchdog of a frozen machine thaws it.
        click.echo("replica: interrupted; nothing is lost, run it again to go on", err=True)
        sys.stderr.flush()
        os._exit(128 + signal.SIGINT)


def _sync_one(spec: SenderSpec, machine: MachineSpec, bar: Bar) -> SyncResult | ReplicaError:
    from replica.durable import FileSystem
    from replica.primary.cycle import sync_machine
    from replica.transport.client import HttpReceiver

    try:
        receiver = HttpReceiver(machine.to, spec.tls)
        try:
            return sync_machine(FileSystem(), spec, machine, receiver, bar(machine.name))
        finally:
            receiver.close()
    except ReplicaError as error:
        return error


def _entry(machine: MachineSpec, outcome: SyncResult | ReplicaError) -> dict[str, object]:
    if isinstance(outcome, ReplicaError):
        return {"machine": machine.name, "error": error_fields(outcome)}
    return {
        "machine": outcome.machine,
        "point": outcome.point,
        "frozen_at": rfc3339(outcome.frozen_at_ns),
        "bytes_scanned": outcome.bytes_scanned,
        "bytes_changed": outcome.bytes_changed,
        "bytes_wire": outcome.bytes_wire,
        "seconds": round(outcome.seconds, 6),
        "roots": dict(outcome.roots),
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
    import threading

    from replica.cli.log import log_to_stderr
    from replica.config import load_sender
    from replica.primary.runner import run as run_schedule
    from replica.transport.tls import client_context

    spec = load_sender(config)
    client_context(spec.tls)
    log_to_stderr()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    run_schedule(spec, stop)
