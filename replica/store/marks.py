"""Marks: point locks and the observed time of one replica, in one small document that several processes write.

`marks/retention` is replaced atomically under the kernel lock `marks.lock`. Whoever removes points holds that lock from
reading the document to the last unlink, so that a lock is either seen by a removal or finds its point already gone;
setting one never waits for `serve`.

Nothing here can be shortened: a lock's date only ever moves ahead, a lock ends when wall clock and observed time both
reached its date (`clock`), and a document that is damaged or gone is no document without locks: then every point counts
as locked until an operator has put it back, or said that there are none (`begin_anew`). The directory is made with the
document in it, so that a missing one shows; and that there was a directory is noted in the replica's `state`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from replica import documents
from replica.durable import FileSystem
from replica.errors import ConfigError, DamageError, FormatError, StorageError
from replica.model import DeltaId, Frozen, Stamp, rfc3339
from replica.store.clock import Observed, Reading, advance, first, read_clocks, stamp
from replica.store.layout import Layout, load_state

MAX_LOCKS = 10_000
MAX_REASON_BYTES = 500
"""In UTF-8."""
MAX_MARKS_BYTES = documents.MAX_DOCUMENT_BYTES - 4096
"""No lock makes the document larger: times that are written into it later must find room."""
MAX_UNTIL_NS = 1 << 63
SAVE_EVERY_NS = 300 * 1_000_000_000
"""Observed time is written down that often, and with every lock; between, the boot-time clock knows it."""


class PointLock(Frozen, frozen=True):
    """A point that must stay. It ends when the wall clock passed `until_ns` and observed time `until_observed_ns`."""

    delta_id: DeltaId
    point: int
    until_ns: int
    until_observed_ns: int
    made_at_ns: int
    reason: str = ""

    def holds(self, now: Stamp) -> bool:
        return now.wall_ns < self.until_ns or now.observed_ns < self.until_observed_ns


class RetentionMarks(Frozen, frozen=True):
    """The document."""

    observed: Observed
    locks: tuple[PointLock, ...] = ()


class Marks:
    """One replica's marks. Thread-safe; every call looks anew."""

    def __init__(self, fs: FileSystem, layout: Layout, clocks: Callable[[], Reading] = read_clocks) -> None:
        self._fs = fs
        self._layout = layout
        self._clocks = clocks

    def ensure(self) -> None:
        """Make the directory with the document in it, if it is not there. Whoever writes into it calls this first.

        Where there was one, it gets no document: with what was in it, locks may be lost.
        Not while holding `held`: two processes that make it at once must not meet.
        """
        if self._fs.exists(self._layout.marks):
            return
        with self.held():
            if self._fs.exists(self._layout.marks):
                return
            if self._was_there():
                self._fs.make_directory(self._layout.marks)
                return
            fresh = self._layout.root / ".marks.new"
            if self._fs.exists(fresh):
                self._fs.remove_tree(fresh)
            self._fs.make_directory(fresh)
            documents.save(self._fs, fresh / self._layout.retention.name, RetentionMarks(first(self._clocks())))
            self._fs.publish(fresh, self._layout.marks)

    def _was_there(self) -> bool:
        """Whether the replica had the directory already. Raises StorageError, DamageError: nobody knows."""
        documents_of_state = (self._layout.state, self._layout.state_copy)
        return any(map(self._fs.exists, documents_of_state)) and load_state(self._fs, self._layout).marks

    def load(self) -> RetentionMarks:
        """The document. DamageError if it is damaged or gone: then nobody knows what is locked."""
        if not self._fs.exists(self._layout.marks) and not self._was_there():
            return RetentionMarks(first(self._clocks()))
        try:
            return documents.load(self._fs, self._layout.retention, RetentionMarks)
        except FormatError as error:
            raise self._damaged(str(error.message)) from error
        except StorageError as error:
            if self._fs.exists(self._layout.retention):
                raise
            raise self._damaged(f"{self._layout.retention} is gone") from error

    def _damaged(self, why: str) -> DamageError:
        return DamageError(
            f"{why}; which points are locked is not known, so every point is kept",
            hint=f"put {self._layout.retention} back from a backup; without one, `replica lock <machine> --begin-anew` "
            "makes one without locks: set those that you know of again",
        )

    @contextmanager
    def held(self) -> Iterator[None]:
        """While nobody sets a lock. For moments only."""
        with self._fs.lock(self._layout.marks_lock, wait=True):
            yield

    def now(self) -> Stamp:
        """The receiver's time; never fails. While the document cannot be read observed time is 0: it ends nothing.

        In the stamp of a commit that means *not known* (`rotation.kept_states`).
        """
        reading = self._clocks()
        try:
            return stamp(self.load().observed, reading)
        except (DamageError, StorageError):
            return Stamp(max(0, reading.wall_ns), 0)

    def keep_time(self) -> None:
        """Write the observed time down, if that is due."""
        with self.held():
            marks, reading = self.load(), self._clocks()
            since = reading.boot_ns - marks.observed.boot_ns
            if reading.boot_id == marks.observed.boot_id and 0 <= since < SAVE_EVERY_NS:
                return
            self._save(marks, reading, marks.locks)

    def _save(self, marks: RetentionMarks, reading: Reading, locks: tuple[PointLock, ...]) -> None:
        documents.save(self._fs, self._layout.retention, RetentionMarks(advance(marks.observed, reading), locks))

    def locked(self, now: Stamp) -> Mapping[DeltaId, str]:
        """The points that a lock holds now, and how to say so. DamageError: treat every point as locked."""
        return {mark.delta_id: describe(mark) for mark in self.load().locks if mark.holds(now)}

    def lock(self, delta_id: DeltaId, point: int, until_ns: int, reason: str = "") -> PointLock:
        """Lock a point, or move its lock's date ahead. The caller has a pin on it, so that it stays meanwhile.

        ConfigError: a date that is past, before the present one, or out of range.
        """
        self.ensure()
        with self.held():
            marks, reading = self.load(), self._clocks()
            now = stamp(marks.observed, reading)
            present = next((mark for mark in marks.locks if mark.delta_id == delta_id), None)
            if not now.wall_ns < until_ns < MAX_UNTIL_NS:
                raise ConfigError(
                    f"point {point} cannot be locked until {rfc3339(until_ns)}: that is not ahead of now",
                    hint="give a date to come, before the year 2262, and look whether this host's clock is right",
                )
            if present is not None and until_ns < present.until_ns:
                raise ConfigError(
                    f"point {point} is locked until {rfc3339(present.until_ns)}, and nobody can shorten that",
                    hint="give a later date",
                )
            # As far ahead by observed time as by the wall clock, and not before the date: whichever clock is wrong.
            observed_ns = max(until_ns, now.observed_ns + until_ns - now.wall_ns)
            if present is not None:
                observed_ns = max(observed_ns, present.until_observed_ns)
                reason = reason or present.reason
            reason = reason.encode(errors="replace")[:MAX_REASON_BYTES].decode(errors="ignore")
            mark = PointLock(delta_id, point, until_ns, observed_ns, now.wall_ns, reason)
            others = tuple(m for m in marks.locks if m.delta_id != delta_id)
            locks = (*others, mark)
            size_bytes = len(documents.encode(RetentionMarks(marks.observed, locks)))
            if len(locks) > MAX_LOCKS or size_bytes > MAX_MARKS_BYTES:
                raise ConfigError(
                    f"{len(others)} points of this machine are locked already, and there is no room for more",
                    hint="wait until locks end, give shorter reasons, or keep points by a policy (`daily`, `min_age`)",
                )
            self._save(marks, reading, locks)
            return mark

    def begin_anew(self) -> None:
        """Make a document without locks in place of one that is damaged or gone. An operator's decision, never ours.

        ConfigError if the present one can be read: nobody can take a lock away. A damaged one stays beside, as
        `retention.damaged`: what was locked may still be legible in it.
        """
        self.ensure()
        with self.held():
            try:
                self.load()
            except DamageError:
                if self._fs.exists(self._layout.retention):
                    self._fs.publish(self._layout.retention, self._layout.retention.with_suffix(".damaged"))
            else:
                raise ConfigError(
                    f"{self._layout.retention} is not damaged: its locks hold until their dates",
                    hint="this is for a document that is damaged or gone",
                )
            documents.save(self._fs, self._layout.retention, RetentionMarks(first(self._clocks())))

    def forget(self, gone: set[DeltaId]) -> None:
        """Holding `held`: remove the locks of points that are not there any more and that hold nothing."""
        marks, reading = self.load(), self._clocks()
        now = stamp(marks.observed, reading)
        left = tuple(mark for mark in marks.locks if mark.holds(now) or mark.delta_id not in gone)
        if left != marks.locks:
            self._save(marks, reading, left)


def describe(mark: PointLock) -> str:
    """`locked until 2027-01-01T00:00:00Z (audit)`."""
    return f"locked until {rfc3339(mark.until_ns)}" + (f" ({mark.reason})" if mark.reason else "")


__all__ = ["Marks", "PointLock", "RetentionMarks", "describe"]
