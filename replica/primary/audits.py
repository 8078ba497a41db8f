"""The audit of one cycle: whom to believe of which disk, what to check, and what the point says of it.

Built from the record before anything is read; asked for the candidates when the
machine is frozen; and then the states of the result, and the record that is
stored when they are committed, follow from what was believed. `tracking.audit`
is the arithmetic of it.

A part of a copy is no instant of the machine: of what it did not reach it holds
what was there before. A delta that was meant to be the point may become a part
after the tracker was given its id for the instant. So nobody is asked what
changed since a part, whatever name a tracker remembers, and nobody is believed:
the point after parts is read whole.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence

import msgspec

from replica.bitmap import DirtyBitmap
from replica.errors import AuditMissError
from replica.machine_files import FILES_DISK_NAME
from replica.model import EMPTY_DELTA_ID, MAX_NOTE_CHARACTERS, DeltaId, DiskId, DiskState, State
from replica.primary.record import MachineRecord
from replica.primary.spec import MachineSpec
from replica.tracking.audit import (
    ANYBODY,
    HASH,
    MAX_ALERTS,
    AuditAlert,
    AuditPlan,
    advanced,
    can_name,
    distrust,
    find,
    on_clock,
    plan_windows,
    read_state,
)
from replica.tracking.external import ask

_log = logging.getLogger(__name__)


class Audits:
    """One attempt at a point. `base` is the delta's base, `delta_id` and `point` name the result."""

    def __init__(
        self,
        machine: MachineSpec,
        record: MachineRecord,
        base: State,
        point: int,
        delta_id: DeltaId,
        *,
        part: bool = False,
    ) -> None:
        """`part`: a step of a long copy, read from the machine as it runs; nothing is asked and nothing is checked."""
        self._part = part
        self._tracker, self._base, self._point, self._delta_id = machine.tracker, base, point, delta_id
        self._disks = record.disks
        self._now_ns = time.time_ns()
        ahead, period = machine.every_seconds, machine.audit_period_seconds
        self._audits = [
            on_clock(find(record.audits, disk.id), disk, self._now_ns, ahead, period) for disk in record.disks
        ]
        name = machine.tracker.name if machine.tracker is not None else HASH
        self.plans = [
            AuditPlan()
            if part
            else AuditPlan(plan_windows(audit, disk, self._now_ns, ahead, period), machine.audit_sample, name)
            for audit, disk in zip(self._audits, self._disks, strict=True)
        ]
        self._believed: list[str | None] = [None] * len(record.disks)

    def ask(self, fresh: Sequence[bool], compared: Collection[DiskId] = ()) -> list[DirtyBitmap | None]:
        """The candidates of every disk, None for all its grains. To be called when the machine is frozen.

        `compared`: disks that were read whole in this very instant; nobody's word is needed for them.
        """
        if self._tracker is None or self._part:
            return [None] * len(self._disks)
        partial = self._base.partial
        since = EMPTY_DELTA_ID if partial else self._base.delta_id
        states = [None if partial else self._base.disk(disk.id) for disk in self._disks]
        before = [state.disk if state is not None else None for state in states]
        found = ask(self._tracker, since, self._delta_id, self._disks, before)
        for index, (audit, plan) in enumerate(zip(self._audits, self.plans, strict=True)):
            name = plan.tracker
            known = fresh[index] or self._disks[index].id in compared
            files = self._disks[index].name == FILES_DISK_NAME  # it is made here: nobody else can know of it
            distrusted = name in audit.distrusted or ANYBODY in audit.distrusted
            if known or files or distrusted or not can_name(states[index], name):
                found[index] = None
            self._believed[index] = name if found[index] is not None else None
        return found

    def partial_states(self, roots: Sequence[bytes]) -> tuple[DiskState, ...]:
        """The disks of a step of a long copy: it was no instant, so nothing is newly known of when they were read."""
        before = [self._base.disk(disk.id) for disk in self._disks]
        return tuple(
            DiskState(disk, root, state.read_point, state.trusted) if state is not None else DiskState(disk, root)
            for disk, root, state in zip(self._disks, roots, before, strict=True)
        )

    def states(self, roots: Sequence[bytes]) -> tuple[DiskState, ...]:
        """The result's disks, each with the point at which it was last read whole."""
        parts = zip(self._disks, roots, self._audits, self.plans, self._believed, strict=True)
        return tuple(
            read_state(disk, root, self._base.disk(disk.id), audit, plan.windows, self._point, believed)
            for disk, root, audit, plan, believed in parts
        )

    def advance(self, record: MachineRecord) -> MachineRecord:
        """The record to store once this is committed."""
        parts = zip(self._disks, self._audits, self.plans, self._believed, strict=True)
        audits = tuple(
            advanced(audit, disk, plan.windows, self._point, self._now_ns, full=believed is None)
            for disk, audit, plan, believed in parts
        )
        return msgspec.structs.replace(record, audits=audits)


def after_miss(record: MachineRecord, miss: AuditMissError, point: int) -> tuple[MachineRecord, str]:
    """The record with the alert, and with that tracker distrusted; and the note for the point that is made now."""
    _log.error("machine %r: audit: %s", record.machine, miss)
    disk = next(disk for disk in record.disks if disk.name == miss.disk)
    state = record.head.disk(disk.id) if record.head is not None else None
    since = state.read_point if state is not None else 0
    doubtful = f"points after {since} and before {point} may lack it"
    if miss.tracker == HASH or since + 1 >= point:
        doubtful = "whether older points are concerned is not known"
    note = f"audit: {miss.message}; {doubtful}; this point was read whole"[:MAX_NOTE_CHARACTERS]
    alert = AuditAlert(disk.name, miss.tracker, point, time.time_ns(), note)
    audits = distrust(record.audits, disk.id, miss.tracker)
    return msgspec.structs.replace(record, audits=audits, alerts=(*record.alerts, alert)[-MAX_ALERTS:]), note
