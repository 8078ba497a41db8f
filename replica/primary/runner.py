"""Cycles of many machines: on schedule until stopped (`run`), or once, now (`sync_machines`).

At most `spec.parallel` machines are at work at once; each cycle has a
connection for itself, which a later one may go on with (`connections`). What
goes wrong on one machine is logged, noted in its status and tried again later;
it never stops another one, also if it is a fault in this program. One line is
logged per cycle. Machines that are marked as frozen are thawed first (`thawing`).

A receiver that still applies a delta holds its machine's place among these no
longer than `every` or a minute: the cycle ends, the next one asks again.

Stopping waits for the cycles at work, which notice it between two windows, two
segments, or two waits, and are cut off from a receiver that hangs; what they had not committed costs nothing but being
read again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from replica.durable import FileSystem
from replica.errors import ReplicaError, StorageError
from replica.model import rfc3339
from replica.primary.connections import Connect, Connections
from replica.primary.cycle import RETRY_SECONDS, WAIT_LIMIT_SECONDS, SyncResult, sync_machine
from replica.primary.retry import Stopped
from replica.primary.schedule import Schedule
from replica.primary.spec import MachineSpec, SenderSpec
from replica.primary.status import note_due
from replica.primary.thawing import Thawing
from replica.progress import Progress, silent

SHORTEST_WAIT_SECONDS = 60.0
_TICK_SECONDS = 0.2
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How one machine's cycle ended: a result or an error, never both; neither if it was stopped."""

    machine: str
    result: SyncResult | None = None
    error: ReplicaError | None = None


def sync_machines(
    fs: FileSystem,
    spec: SenderSpec,
    machines: tuple[MachineSpec, ...] | None = None,
    *,
    connect: Connect | None = None,
    progress: Callable[[str], Progress] = lambda _machine: silent,
    stop: threading.Event | None = None,
    rebuild: bool = False,
) -> list[Outcome]:
    """One cycle of each machine (default: all), in the given order; errors are in the outcomes, not raised.

    `rebuild`: compare with the replica first, also where nothing is wrong.
    """
    chosen = spec.machines if machines is None else machines
    with (
        Connections(spec.tls, connect) as connections,
        Thawing(fs, spec, chosen, stop) as thawing,
        ThreadPoolExecutor(max(1, min(spec.parallel, len(chosen))), "sync") as pool,
    ):

        def cycle(machine: MachineSpec) -> Outcome:
            thawing.wait(machine.name)
            return one_cycle(fs, spec, machine, connections, progress(machine.name), stop, rebuild=rebuild)

        in_order = sorted(range(len(chosen)), key=lambda n: thawing.is_at(chosen[n].name))  # those that wait come last
        cycles = {n: pool.submit(cycle, chosen[n]) for n in in_order}
        return [cycles[n].result() for n in range(len(chosen))]


def one_cycle(
    fs: FileSystem,
    spec: SenderSpec,
    machine: MachineSpec,
    connections: Connections,
    progress: Progress = silent,
    stop: threading.Event | None = None,
    retry_seconds: float = RETRY_SECONDS,
    wait_limit_seconds: float = WAIT_LIMIT_SECONDS,
    *,
    rebuild: bool = False,
) -> Outcome:
    """`sync_machine` on a connection for itself, with what it raises as a value."""
    if stop is not None and stop.is_set():
        return Outcome(machine.name)
    try:
        with connections.lend(machine) as receiver:
            result = sync_machine(
                fs,
                spec,
                machine,
                receiver,
                progress,
                rebuild=rebuild,
                retry_seconds=retry_seconds,
                wait_limit_seconds=wait_limit_seconds,
                stop=stop,
            )
        return Outcome(machine.name, result=result)
    except Stopped:
        return Outcome(machine.name)
    except ReplicaError as error:
        return Outcome(machine.name, error=error)
    except Exception as error:  # noqa: BLE001 - the last door: one machine's fault must not end the others
        _log.exception("machine %r: a fault in the engine", machine.name)
        return Outcome(machine.name, error=ReplicaError(f"a fault in the engine: {error!r}", hint="the log has more"))


@dataclass
class _Job:
    """One machine under `run`."""

    machine: MachineSpec
    schedule: Schedule
    running: Future[Outcome] | None = field(default=None)


def run(
    spec: SenderSpec,
    stop: threading.Event,
    *,
    fs: FileSystem | None = None,
    connect: Connect | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Cycles of every machine on schedule, until `stop` is set. Returns when all that was at work has ended."""
    fs = fs or FileSystem()
    jobs = [_Job(machine, Schedule.starting(machine.every_seconds, clock())) for machine in spec.machines]
    ended: SimpleQueue[_Job] = SimpleQueue()
    with (
        Connections(spec.tls, connect) as connections,
        Thawing(fs, spec, spec.machines, stop) as thawing,
        ThreadPoolExecutor(max(1, min(spec.parallel, len(jobs))), "cycle") as pool,
    ):
        while jobs and not stop.is_set():
            for job in jobs:
                if job.running is None and job.schedule.due <= clock() and not thawing.is_at(job.machine.name):
                    job.running = pool.submit(_scheduled, fs, spec, job.machine, connections, stop)
                    job.running.add_done_callback(lambda _running, job=job: ended.put(job))  # type: ignore[misc]
            for job in _wait([job for job in jobs if not thawing.is_at(job.machine.name)], ended, stop, clock):
                assert job.running is not None
                _end(fs, spec, job, job.running.result(), clock)
            connections.close_idle()
        for job in jobs:
            if job.running is not None and job.running.cancel():  # it had not begun
                job.running = None
    for job in jobs:
        if job.running is not None:
            _report(job.machine, job.running.result())
        _note_due(fs, spec, job, None)


def _scheduled(
    fs: FileSystem, spec: SenderSpec, machine: MachineSpec, connections: Connections, stop: threading.Event
) -> Outcome:
    """One cycle, which gives its place up in good time."""
    retry_seconds = min(RETRY_SECONDS, machine.every_seconds)
    wait_limit_seconds = max(SHORTEST_WAIT_SECONDS, machine.every_seconds)
    return one_cycle(fs, spec, machine, connections, silent, stop, retry_seconds, wait_limit_seconds)


def _wait(jobs: list[_Job], ended: SimpleQueue[_Job], stop: threading.Event, clock: Callable[[], float]) -> list[_Job]:
    """Until something ended, is due, or a tick has passed (so that a stop is never waited for long): what ended."""
    due = min((job.schedule.due for job in jobs if job.running is None), default=clock() + _TICK_SECONDS)
    seconds = min(max(0.0, due - clock()), _TICK_SECONDS)
    done: list[_Job] = []
    try:
        if any(job.running is not None for job in jobs):
            done.append(ended.get(timeout=seconds))
        else:
            stop.wait(seconds)
        while True:
            done.append(ended.get_nowait())
    except Empty:
        return done


def _end(fs: FileSystem, spec: SenderSpec, job: _Job, outcome: Outcome, clock: Callable[[], float]) -> None:
    job.running = None
    job.schedule = job.schedule.succeeded(clock()) if outcome.result else job.schedule.failed(clock())
    _report(job.machine, outcome)
    _note_due(fs, spec, job, time.time_ns() + int((job.schedule.due - clock()) * 1e9))


def _note_due(fs: FileSystem, spec: SenderSpec, job: _Job, due_ns: int | None) -> None:
    try:
        note_due(fs, spec.machine_directory(job.machine.name), due_ns)
    except StorageError as error:
        _log.warning("machine %r: its status cannot be noted: %s", job.machine.name, error)


def _report(machine: MachineSpec, outcome: Outcome) -> None:
    """The one line of a cycle."""
    result, error = outcome.result, outcome.error
    if result is not None:
        _log.info(
            "machine %r: point %d of %s, %d bytes changed, %d sent, %.3f s",
            machine.name,
            result.point,
            rfc3339(result.frozen_at_ns),
            result.bytes_changed,
            result.bytes_wire,
            result.seconds,
        )
        for notice in result.notices:
            _log.warning("machine %r: point %d: %s", machine.name, result.point, notice)
    elif error is not None:
        _log.error("machine %r: %s", machine.name, error)
    else:
        _log.info("machine %r: stopped in the middle of a cycle; nothing is lost", machine.name)
