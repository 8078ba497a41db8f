"""One replica in a running site: its store, opened when it can be, and its one commit at a time.

A replica that cannot be opened (damaged, or locked by another process) is its
own trouble only: its slot answers with that error and tries again at the next
request, so that it comes back by itself when the cause is gone.

Opening recovers, which may rewrite a head or wait for storage that hangs. So
it runs in a thread of its own, and so does opening a *stopped* store anew; a
request waits for that no longer than `PATIENCE_SECONDS` and is told `busy`.

A commit is a *job* in a thread of its own, so that no request waits for it
longer than it said: manifest in, everything durable, head rewritten, old
points rotated out. While it runs nothing else is begun here. Asked for again
it is the same job. How it ended is kept until somebody has been told: a
failure whose waiter had given up is the answer to the next one who asks.

Locks: `_opening` guards which store is taken, `_jobs` the fields about the job and
the activity; neither is held while a store works. `_jobs` may be taken inside
`_opening`, never the other way round.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path

from replica.errors import BusyError, ReplicaError, StorageFullError
from replica.model import LEAF_BYTES, NIL, DamagedLeaves, DeltaId, DiskId, Epoch, ReplicaId, State, rfc3339
from replica.receiver.admission import (
    SMALL_PART_BYTES,
    SMALL_PARTS_PER_HOUR,
    Activity,
    Pace,
    check_adopt,
    check_delta,
)
from replica.receiver.spec import SiteSpec
from replica.receiver.stores import Store, Stores
from replica.receiver.upkeep import Upkeep
from replica.store import Identity
from replica.transport.wire import Adopt, Begin, Begun, Frame, ReplicaInfo, to_problem

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 1.0
"""How long a request waits for a store that is being opened."""


class Job:
    """A commit under way, or its outcome."""

    def __init__(self, delta_id: DeltaId) -> None:
        self.delta_id = delta_id
        self.done: Future[None] = Future()


class Slot:
    """A replica's place in the site. Thread-safe."""

    def __init__(
        self,
        stores: Stores,
        replica_id: ReplicaId,
        directory: Path,
        clock: Callable[[], float],
        turns: threading.Semaphore,
        store: Store | None = None,
        *,
        spec: SiteSpec,
        wake: Callable[[Slot], None] = lambda _slot: None,
    ) -> None:
        """`turns` bounds how many replicas of the site rewrite their heads at the same time.

        `wake` has this slot's `tidy` called behind.
        """
        self.replica_id = replica_id
        self.directory = directory
        self._stores = stores
        self._clock = clock
        self._turns = turns
        self._store = store
        self._identity = store.identity if store else None
        self._identity_job: Future[None] | None = None
        self._identity_late = False
        self._upkeep = Upkeep(stores, spec, directory, lambda: wake(self), clock)
        self._pace = Pace(float(spec.max_points_per_hour), clock())
        self._part_pace = Pace(float(SMALL_PARTS_PER_HOUR), clock())
        self._opening = threading.Lock()
        self._open_job: Future[Store] | None = None
        self._jobs = threading.Lock()
        self._job: Job | None = None
        self._active: Activity | None = None
        self._repaired_to: tuple[DiskId, int] | None = None
        """Where the last repair ended: disk, byte."""
        self._closed = False

    # --- what it is ---

    def store(self, patience_seconds: float | None = PATIENCE_SECONDS) -> Store:
        """The open store; opens it if it is not. Raises why it cannot be opened, or BusyError while that takes long."""
        with self._opening:
            self._refuse_when_closed()
            if self._store is not None:
                return self._store
            job = self._start_opening(None)
        return self._opened(job, patience_seconds)

    def _running_store(self) -> Store:
        """The store, opened anew if it was stopped. Raises what still stops it."""
        store = self.store()
        if store.stopped is None:
            return store
        with self._opening:
            self._refuse_when_closed()
            if self._store is store:
                self._store = None
                job = self._start_opening(store)
            elif self._store is not None:
                return self._store
            else:
                job = self._start_opening(None)
        store = self._opened(job, PATIENCE_SECONDS)
        if store.stopped is not None:
            raise store.stopped
        return store

    def _refuse_when_closed(self) -> None:
        if self._closed:
            raise BusyError("the receiver is shutting down", hint="try again when it runs again")

    def _start_opening(self, stopped: Store | None) -> Future[Store]:
        """Holding `_opening`: the job that opens the store, after giving the stopped one up."""
        if self._open_job is None:
            self._open_job = Future()
            arguments = (self._open_job, stopped)
            threading.Thread(target=self._open, args=arguments, name=f"open-{self.replica_id}", daemon=True).start()
        return self._open_job

    def _open(self, job: Future[Store], stopped: Store | None) -> None:
        try:
            if stopped is not None:
                stopped.close()
            store = self._stores.open(self.directory)
            with self._opening:
                self._open_job = None
                if self._closed:
                    store.close()
                    self._refuse_when_closed()
                self._store = store
                self._identity = store.identity
                if stopped is None:  # after a restart; what stopped while this process ran is its sender's to decide
                    self._take_up(store)
        except BaseException as error:  # noqa: BLE001  # handed to whoever waits
            with self._opening:
                self._open_job = None
            job.set_exception(error)
        else:
            job.set_result(store)

    def _opened(self, job: Future[Store], patience_seconds: float | None) -> Store:
        wait([job], timeout=patience_seconds)
        if not job.done():
            raise BusyError(f"replica {self.replica_id} is being recovered", hint="try again when that is done")
        return job.result()

    def identity(self, patience_seconds: float | None = None) -> Identity | None:
        """Who the replica is, also while its store cannot be opened; None if even that is unreadable.

        Storage that hangs under it is as unreadable. It is waited for so long (`PATIENCE_SECONDS`), and once only.
        """
        job = self.look_for_identity()
        if job is not None and not self._identity_late:
            wait([job], timeout=PATIENCE_SECONDS if patience_seconds is None else patience_seconds)
            self._identity_late = not job.done()
        return self._identity

    def look_for_identity(self) -> Future[None] | None:
        """Have the identity read behind, unless it is known (None)."""
        with self._jobs:
            if self._identity is not None:
                return None
            if self._identity_job is None:
                self._identity_job = Future()
                arguments = (self._identity_job,)
                threading.Thread(target=self._read_identity, args=arguments, name="identity", daemon=True).start()
            return self._identity_job

    def _read_identity(self, job: Future[None]) -> None:
        found = None
        try:
            found = self._stores.reader(self.directory).identity
        except ReplicaError:
            pass
        finally:
            with self._jobs:
                self._identity = self._identity or found
                self._identity_job, self._identity_late = None, False
            job.set_result(None)

    def info(self, *, receipt: bool = False) -> ReplicaInfo:
        """What is so now, with the head's receipt or without.

        A replica that is being opened, or that another process has locked, is shown as it lies there, as stopped.

        A sender takes a delta that is neither arriving, nor being committed, nor the head for one that will never be
        committed. A delta is one of them after the other, so they are looked at in that order: none is missed.
        """
        try:
            store = self.store()
        except BusyError as error:
            if self._closed:
                raise
            return self._info_beside(error)
        who, stopped = store.identity, store.stopped
        signed = store.receipt if receipt else None
        receiving = store.receiving
        applying = self._working_on() or store.applying
        return ReplicaInfo(
            replica_id=self.replica_id,
            machine=who.machine,
            owner=who.owner,
            epoch=store.epoch,
            head=store.head,
            applying=applying,
            receiving=receiving,
            stopped=to_problem(stopped) if stopped else None,
            damaged=store.damaged,
            receipt=signed.data if signed else None,
        )

    def _info_beside(self, error: BusyError) -> ReplicaInfo:
        """What is so of a replica whose store is somebody else's just now.

        Whoever has it finishes a commit that was cut, and one of a delta that had arrived whole: that is being applied.
        """
        reader = self._stores.reader(self.directory)
        who, receiving, received = reader.identity, reader.receiving, reader.received
        state = reader.state
        return ReplicaInfo(
            self.replica_id,
            who.machine,
            who.owner,
            state.epoch,
            state.head,
            applying=state.applying or received,
            receiving=receiving,
            stopped=to_problem(error),
        )

    def unreadable(self, who: Identity, error: ReplicaError) -> ReplicaInfo:
        """What can be said of a replica whose state cannot be read: whose it is, and why it is stopped."""
        nobody = Epoch(0, NIL)
        empty = State.empty(self.replica_id, nobody)
        return ReplicaInfo(self.replica_id, who.machine, who.owner, nobody, empty, stopped=to_problem(error))

    # --- taking a delta in ---

    def adopt(self, adopt: Adopt) -> None:
        store = self._running_store()
        with self._jobs:
            self._refuse_while_working("adopt")
            check_adopt(self._active, adopt.holder, self._clock())
        before = store.epoch
        after = store.adopt(adopt.expected, adopt.holder)
        if after != before:
            log.warning("replica %s: adopted by another sender, epoch %d", self.replica_id, after.counter)

    def begin(self, delta_id: DeltaId, begin: Begin) -> Begun:
        store = self._running_store()
        with self._jobs:
            self._refuse_while_working("begin a delta")
        self._pace.check(self._clock(), self._upkeep.max_points_per_hour)
        self._part_pace.check(self._clock(), SMALL_PARTS_PER_HOUR, "parts of a copy with next to nothing in them")
        self._make_room(store, delta_id)
        received = store.begin(delta_id, begin.base, begin.epoch, begin.header)
        with self._jobs:
            self._active = Activity(delta_id, begin.epoch, self._clock())
            self._job = None
        return Begun(received)

    def _make_room(self, store: Store, delta_id: DeltaId) -> None:
        """StorageFullError while the storage is short; what arrived of a delta that was given up goes first."""
        try:
            self._upkeep.check_room()
        except StorageFullError:
            given_up = store.receiving
            if given_up is None or given_up == delta_id:
                raise
            store.discard(given_up)
            self._upkeep.check_room()

    def receive(self, delta_id: DeltaId, frames: list[Frame]) -> None:
        """Store segments whose digests were checked."""
        store = self.store()
        with self._jobs:
            check_delta(self._active, delta_id, store.epoch)
            self._refuse_while_working("store a segment")
        self._upkeep.check_room()
        for frame in frames:
            store.receive(delta_id, frame.number, frame.offset, frame.digest, frame.blob)
        with self._jobs:
            if self._working_on() is None and store.receiving == delta_id:
                self._active = Activity(delta_id, store.epoch, self._clock())

    def repair(self, disk_id: DiskId, first: int, epoch: Epoch, content: memoryview) -> tuple[DamagedLeaves, ...]:
        """Repair leaves of the head; those of them that still are damaged."""
        store = self._running_store()
        with self._jobs:
            self._refuse_while_working("repair the head")
        left = store.repair(disk_id, first, epoch, content)
        self._tell_repair(store, disk_id, first, len(content), left)
        return left

    def _tell_repair(
        self, store: Store, disk_id: DiskId, first: int, count_bytes: int, left: tuple[DamagedLeaves, ...]
    ) -> None:
        """One warning where damage begins, and where some stays: a long range comes in many requests."""
        entry = store.head.disk(disk_id)
        name, leaf_bytes = (entry.disk.name, entry.disk.leaf_bytes) if entry else (str(disk_id), LEAF_BYTES)
        begin = first * leaf_bytes
        goes_on, self._repaired_to = self._repaired_to == (disk_id, begin), (disk_id, begin + count_bytes)
        log.log(
            logging.DEBUG if goes_on and not left else logging.WARNING,
            "replica %s (%s): damage on disk %s, bytes %d to %d: %s",
            self.replica_id,
            store.identity.machine,
            name,
            begin,
            begin + count_bytes - 1,
            f"{sum(d.stop - d.first for d in left)} leaves stay damaged, the source has changed them"
            if left
            else "repaired by the sender; what follows on it without a gap is not told again",
        )

    def discard(self, delta_id: DeltaId) -> None:
        store = self.store()
        with self._jobs:
            self._refuse_while_working("discard a delta")
        store.discard(delta_id)
        self._end(delta_id)

    # --- committing ---

    def start_commit(self, delta_id: DeltaId, tail: bytes, tail_offset: int) -> Job:
        """The job that commits `delta_id`: a new one, the running one, or one whose failure nobody was told."""
        store = self.store()
        with self._jobs:
            check_delta(self._active, delta_id, store.epoch)
            job = self._job
            if job is not None and job.delta_id == delta_id:
                return job
            self._refuse_while_working("commit a delta")
            job = self._job = Job(delta_id)
        self._start(store, job, tail, tail_offset)
        return job

    def _start(self, store: Store, job: Job, tail: bytes, tail_offset: int) -> None:
        arguments = (store, job, [tail], tail_offset)
        threading.Thread(target=self._run, args=arguments, name=f"commit-{self.replica_id}", daemon=True).start()

    def _take_up(self, store: Store) -> None:
        """Holding `_opening`: commit what had arrived whole before a restart; its sender is waiting for that."""
        received = store.received
        if received is None or store.stopped is not None:
            return
        log.info("replica %s: going on with the commit of delta %s", self.replica_id, received)
        with self._jobs:
            job = self._job = Job(received)
        self._start(store, job, b"", 0)

    def outcome(self, job: Job) -> ReplicaInfo:
        """The end of a job that is done: the new state, or its error. Whoever asks has been told."""
        with self._jobs:
            if self._job is job:
                self._job = None
        job.done.result()
        return self.info(receipt=True)

    def _run(self, store: Store, job: Job, tail: list[bytes], tail_offset: int) -> None:
        """In the job's thread. Its arguments live as long as that: the tail is let go when it is written."""
        error: BaseException | None = None
        try:
            before = store.head
            already = before.delta_id == job.delta_id and store.applying is None
            if not already:
                store.finish(job.delta_id, tail[0], tail_offset)
            tail.clear()
            state = self._commit(store, job.delta_id, tail_offset)
            if not already:
                log.info(
                    "replica %s (%s): committed %s %d of %s",
                    self.replica_id,
                    store.identity.machine,
                    "a part of a copy after point" if state.partial else "point",
                    state.point,
                    rfc3339(state.frozen_at_ns),
                )
                for what in before.lacking(entry.disk for entry in state.disks):
                    log.warning("replica %s (%s): %s", self.replica_id, store.identity.machine, what)
                if state.is_point:
                    self._pace = self._pace.take(self._clock(), self._upkeep.max_points_per_hour)
                elif tail_offset < SMALL_PART_BYTES:
                    self._part_pace = self._part_pace.take(self._clock(), SMALL_PARTS_PER_HOUR)
            self._upkeep.after_commit(store)
        except ReplicaError as failure:
            log.error("replica %s (%s): commit failed: %s", self.replica_id, store.identity.machine, failure)
            error = failure
        except BaseException as failure:
            log.exception("replica %s: commit failed", self.replica_id)
            error = failure
        self._end(job.delta_id)
        if error is None:
            job.done.set_result(None)
        else:
            job.done.set_exception(error)

    def _commit(self, store: Store, delta_id: DeltaId, size_bytes: int) -> State:
        """Commit a delta of that size; once more if there was no room, and points could be given up for it."""
        need_bytes = 0
        while True:
            try:
                with self._turns:
                    return store.commit(delta_id, reserve_bytes=self._upkeep.space().min_bytes)
            except StorageFullError as error:
                if not error.need_bytes or need_bytes:
                    self._upkeep.refused(need_bytes and need_bytes + size_bytes)  # it is to arrive once more
                    raise
                need_bytes = error.need_bytes
            self._upkeep.refused(need_bytes)
            self._upkeep.tidy(store)

    def tidy(self) -> None:
        """Do what rotation and space ask for, if the store is open. Raises nothing."""
        store = self._store
        if store is not None and not self._closed:
            try:
                self._upkeep.tidy(store)
            except Exception:
                log.exception("replica %s: cannot rotate points", self.replica_id)

    # --- the job and the activity ---

    def _working_on(self) -> DeltaId | None:
        job = self._job
        return job.delta_id if job is not None and not job.done.done() else None

    def _refuse_while_working(self, what: str) -> None:
        """Holding `_jobs`."""
        delta_id = self._working_on()
        if delta_id is not None:
            raise BusyError(
                f"cannot {what}: replica {self.replica_id} is committing delta {delta_id}",
                hint="try again when that is done",
            )

    def _end(self, delta_id: DeltaId) -> None:
        """The delta is committed, refused or given up: nobody is in the middle of it any more."""
        with self._jobs:
            if self._active is not None and self._active.delta_id == delta_id:
                self._active = None

    def refuse(self) -> None:
        """From now on every request is answered that the receiver is shutting down."""
        with self._opening:
            self._closed = True

    def close(self, limit_seconds: float) -> bool:
        """After `refuse`: wait for the job, then give the store up. False if something did not end in time."""
        opening = self._open_job
        if opening is not None:
            started = time.monotonic()
            wait([opening], timeout=limit_seconds)
            limit_seconds = max(0.0, limit_seconds - (time.monotonic() - started))
            if not opening.done():
                log.error("replica %s: its recovery takes too long; the next start finishes it", self.replica_id)
                return False
        job = self._job
        if job is not None:
            wait([job.done], timeout=limit_seconds)
            if not job.done.done():
                log.error("replica %s: its commit takes too long; the next start finishes it", self.replica_id)
                return False
        with self._opening:
            if self._store is not None:
                self._store.close()
                self._store = None
        return True
