"""One verification of a replica: the head, and the points if asked for; resumable, throttled, reported.

    report = verify_replica(fs, layout, points=True, bytes_per_second=100 << 20)

Works beside the writer and without its lock. What is known is remembered every few
seconds and at the end, also at one that comes too early, so the next call goes
on there (`verdicts`); where that cannot be written, it is not remembered, and
verifies all the same. `known_damage` is what `points` says of it later.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace

import msgspec

from replica.delta import Keyring
from replica.durable import FileSystem
from replica.errors import BusyError, StorageError
from replica.model import DamagedLeaves, DeltaId, Disk
from replica.progress import Progress, silent
from replica.store import damage
from replica.store.courtesy import Courtesy
from replica.store.layout import Layout
from replica.store.pace import Pace
from replica.store.points import Chain, PointIndex, PointInfo
from replica.store.receipts import ReceiptFiles, ReceiptWord
from replica.store.verdicts import (
    DiskMark,
    FileMark,
    HeadRound,
    PointsRound,
    Ranges,
    Verdicts,
    head_round,
    points_round,
)
from replica.store.verify import DiskVerdict, verify_head
from replica.store.verify_points import PointDamage, PointsCheck, affected, damage_of_files

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Report:
    """What a verification found. `points` are the consequences of all of it; `files` is None if they were not read."""

    disks: list[DiskVerdict]
    files: list[FileMark] | None
    points: list[PointDamage]
    receipts: list[int]
    """Points whose receipt is damaged."""
    resumed: bool
    started_at_ns: int
    finished_at_ns: int

    @property
    def ok(self) -> bool:
        files = any(mark.found or mark.problem for mark in self.files or ())
        return not (files or self.receipts) and all(verdict.ok for verdict in self.disks)


def verify_replica(
    fs: FileSystem,
    layout: Layout,
    progress: Progress = silent,
    *,
    points: bool = False,
    restart: bool = False,
    bytes_per_second: float | None = None,
) -> Report:
    """Go on with the round that was cut, or begin a new one. BusyError: another verification is at it."""
    with ExitStack() as stack:
        memory: Verdicts | None = Verdicts(fs, layout)
        try:
            busy = f"another process verifies {layout.root}"
            stack.enter_context(fs.lock(layout.marks / "verify.lock", busy=busy))
        except BusyError:
            raise
        except StorageError as error:
            log.warning("it is not remembered how far this verification comes: %s", error)
            memory = None
        return _Round(fs, layout, memory, bytes_per_second, progress).run(points, restart)


class _Round:
    """One call of `verify_replica`."""

    def __init__(
        self, fs: FileSystem, layout: Layout, memory: Verdicts | None, rate: float | None, progress: Progress
    ) -> None:
        self._fs, self._layout, self._memory, self._progress = fs, layout, memory, progress
        self._keyring = Keyring(fs, layout.keys)
        self._courtesy = Courtesy(fs, layout)
        self._pace = Pace(rate, self._save, wait=self._courtesy.wait)
        self._head = HeadRound(0)
        self._points: PointsRound | None = None

    def run(self, points: bool, restart: bool) -> Report:
        last_head = self._memory.load(HeadRound) if self._memory else None
        last_points = self._memory.load(PointsRound) if self._memory else None
        self._head = head_round(last_head, restart)
        self._points = points_round(last_points, restart) if points else None
        resumed = self._head == last_head or (points and self._points == last_points)
        try:
            disks = self._verify_head()
            if points:
                self._verify_points()
        finally:
            self._save()
        return self._report(disks, resumed)

    def _save(self) -> None:
        if self._memory is None:
            return
        try:
            self._memory.save(self._head)
            if self._points is not None:
                self._memory.save(self._points)
        except StorageError as error:
            log.warning("it is not remembered how far this verification comes: %s", error)

    def _verify_head(self) -> list[DiskVerdict]:
        def keep(mark: DiskMark) -> None:
            others = tuple(other for other in self._head.disks if other.disk.id != mark.disk.id)
            if mark.done and mark.tree_unfit:
                self._mark_tree(mark.disk)
            self._head = msgspec.structs.replace(self._head, disks=(*others, mark))

        verdicts = verify_head(
            self._fs,
            self._layout,
            self._scaled(),
            pace=self._pace,
            marks=self._head.disks,
            note=keep,
            damaged=self._mark_leaves,
        )
        there = {verdict.disk for verdict in verdicts}
        disks = tuple(mark for mark in self._head.disks if mark.disk in there)
        self._head = msgspec.structs.replace(self._head, disks=disks, finished_at_ns=time.time_ns())
        return verdicts

    def _mark_leaves(self, disk: Disk, ranges: Ranges) -> None:
        """So that the next sync of the machine repairs them, also if this verification is cut."""
        self._mark([DiskVerdict(disk, 0, ranges)])

    def _mark_tree(self, disk: Disk) -> None:
        """The image was proven as a whole: what was marked on the way is not damaged."""
        self._mark([DiskVerdict(disk, 0, (), tree_unfit=True)])
        if disk.count_leaves:
            with suppress(StorageError):
                damage.clear(self._fs, self._layout, [DamagedLeaves(disk.id, 0, disk.count_leaves)])

    def _mark(self, verdicts: list[DiskVerdict]) -> None:
        try:
            damage.note_verdicts(self._fs, self._layout, verdicts)
        except StorageError as error:
            log.warning("damage of the head cannot be marked for repair: %s", error)

    def _scaled(self) -> Progress:
        """The head's progress as a part of the whole."""
        check = PointsCheck(self._fs, self._layout, self._keyring, self._pace)
        self._files_total = sum(check.size(name) for name in check.names()) if self._points is not None else 0
        self._head_total = 0

        def move(done: int, total: int) -> None:
            self._head_total = total
            self._progress(done, total + self._files_total)

        return move

    def _verify_points(self) -> None:
        """Every file that is there now; what commits add meanwhile was just read back, the next round has it."""
        assert self._points is not None
        check = PointsCheck(self._fs, self._layout, self._keyring, self._pace)
        marks = {mark.name: mark for mark in self._points.files}
        done = [self._head_total]
        total = self._head_total + self._files_total

        def keep(mark: FileMark) -> None:
            marks[mark.name] = mark
            self._set_files(marks)

        def move(count: int, _of: int) -> None:
            done[0] = min(done[0] + count, total)
            self._progress(done[0], total)

        names = check.names()
        for name in names:
            known = marks.get(name)
            if known is not None and known.done:
                move(known.stored_bytes, total)
                continue
            mark = check.run(name, known, keep, move)
            if mark is None:
                marks.pop(name, None)
            else:
                marks[name] = mark
            self._set_files(marks)
        for name in marks.keys() - set(names):
            del marks[name]
        self._set_files(marks)
        self._points = msgspec.structs.replace(self._points, finished_at_ns=time.time_ns())

    def _set_files(self, marks: dict[str, FileMark]) -> None:
        assert self._points is not None
        self._points = msgspec.structs.replace(self._points, files=tuple(marks.values()))

    def _report(self, disks: list[DiskVerdict], resumed: bool) -> Report:
        chain = PointIndex(self._fs, self._layout, self._keyring).chain()
        files = None if self._points is None else list(self._points.files)
        found = list(_consequences(self._fs, self._keyring, chain, self._head.disks, files or ()))
        receipts: list[int] = []
        if self._points is not None:
            there = ReceiptFiles(self._fs, self._layout)
            receipts = [s.point for s in chain.points if there.word(s) is ReceiptWord.DAMAGED]
        started = min(self._head.started_at_ns, self._points.started_at_ns if self._points else 1 << 63)
        return Report(disks, files, found, receipts, resumed, started, time.time_ns())


def _consequences(
    fs: FileSystem, keyring: Keyring, chain: Chain, disks: tuple[DiskMark, ...], files: list[FileMark] | tuple[()]
) -> Iterator[PointDamage]:
    for mark in disks:
        if mark.found:
            yield from affected(fs, keyring, chain, -1, mark.disk.id, mark.found, "head")
    yield from damage_of_files(fs, keyring, chain, files)


def known_damage(fs: FileSystem, layout: Layout, keyring: Keyring, chain: Chain) -> dict[DeltaId, str]:
    """Points that read through what the last verification found damaged in inverses, with the reason. Costs next to
    nothing where there is none. What is damaged in the head is marked elsewhere (`damage`)."""
    points = Verdicts(fs, layout).load(PointsRound)
    files = [mark for mark in points.files if mark.found] if points else []
    reasons: dict[DeltaId, str] = {}
    for found in damage_of_files(fs, keyring, chain, files) if files else ():
        last = found.offset + found.length - 1
        text = f"disk {found.disk!r}, bytes {found.offset} to {last}, damaged in points/{found.source}"
        reasons.setdefault(found.state.delta_id, text)
    return reasons


def with_damage(infos: list[PointInfo], reasons: dict[DeltaId, str]) -> list[PointInfo]:
    """The list, with points that are known to be damaged as not restorable."""
    return [
        replace(info, restorable=False, reason=reasons[info.state.delta_id]) if info.state.delta_id in reasons else info
        for info in infos
    ]
