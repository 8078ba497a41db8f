"""Machines that an earlier process may have left frozen are thawed at once, whenever their cycle's turn comes.

    with Thawing(fs, spec, machines, stop) as thawing:
        thawing.is_at(name)              # its cycle would find it locked
        thawing.wait(name)               # until it is not, or stopped

What counts is the mark in the state directory: a machine that is not in the
configuration any more is thawed by the command in its mark. One that cannot be
thawed is logged; its cycle tries again and fails with the same error. One that
is not of `machines` may be at work in another process, which is no error.

All are thawed side by side, and no cycle but the machine's own waits for it: a
thaw that hangs takes minutes until it counts as failed, and hours would pass
before the last of many machines had a new point. Leaving the block waits for
the thaws that have begun; once `stop` is set no other one begins, and its mark
stays for the next process.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from types import TracebackType
from typing import Self

from replica.durable import FileSystem
from replica.errors import BusyError, ConfigError, ReplicaError, StorageError
from replica.primary.record import MachineDirectory
from replica.primary.spec import MachineSpec, SenderSpec
from replica.tracking.instant import FreezeSpec, marked, thaw_marked

AT_ONCE = 16
_TICK_SECONDS = 0.1
_log = logging.getLogger(__name__)


class Thawing:
    """See the module. Made in one thread, asked from any."""

    def __init__(
        self,
        fs: FileSystem,
        spec: SenderSpec,
        machines: tuple[MachineSpec, ...],
        stop: threading.Event | None = None,
    ) -> None:
        self._fs, self._spec = fs, spec
        self._stop = stop or threading.Event()
        self._chosen = {machine.name for machine in machines}
        self._configured = {machine.name: machine for machine in spec.machines + machines}
        self._running: dict[str, Future[None]] = {}
        names = [name for name in self._names() if self._is_marked(name)]
        if names:
            pool = ThreadPoolExecutor(min(AT_ONCE, len(names)), "thaw")
            self._running = {name: pool.submit(self._thaw, name) for name in names}
            pool.shutdown(wait=False)

    def is_at(self, machine: str) -> bool:
        """Whether it is about to be thawed or being thawed."""
        future = self._running.get(machine)
        return future is not None and not future.done()

    def wait(self, machine: str) -> None:
        """Until it is thawed, that has failed, or `stop` is set."""
        while self.is_at(machine) and not self._stop.is_set():
            wait([self._running[machine]], _TICK_SECONDS)

    def _names(self) -> list[str]:
        """What there is in the state directory. Where that cannot be read, the cycles say so, each of its machine."""
        try:
            return self._fs.list_names(self._spec.state)
        except StorageError as error:
            _log.error("machines that are frozen and not in the configuration cannot be looked for: %s", error)
            return [machine.name for machine in self._spec.machines]

    def _is_marked(self, name: str) -> bool:
        try:
            return marked(self._fs, self._spec.state / name)
        except StorageError as error:
            _log.error("machine %r: %s", name, error)
            return False

    def _thaw(self, name: str) -> None:
        if self._stop.is_set():
            return
        directory = MachineDirectory(self._fs, self._spec.state / name)
        machine = self._configured.get(name)
        try:
            with directory.locked(name):
                thaw_marked(self._fs, directory.path, _freezing(machine), {} if machine is None else machine.images)
        except BusyError as error:
            _log.log(logging.ERROR if name in self._chosen else logging.DEBUG, "machine %r: %s", name, error)
        except ReplicaError as error:
            _log.error("machine %r: %s", name, error)
        except Exception:  # noqa: BLE001 - the last door: one machine's fault must not end the others
            _log.exception("machine %r: a fault in the engine", name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for future in self._running.values():
            if error is not None or self._stop.is_set():
                future.cancel()
            with suppress(CancelledError):
                future.result()


def _freezing(machine: MachineSpec | None) -> FreezeSpec:
    """How to thaw it; without the configuration, or with one that is wrong, the mark says how."""
    try:
        return FreezeSpec() if machine is None else machine.freezing
    except ConfigError:
        return FreezeSpec()
