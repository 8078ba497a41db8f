"""One replica's directory, and the one process that may write to it.

    store = ReplicaStore.open(fs, directory)            # takes the lock, recovers
    store.begin(delta_id, base, epoch, header)
    store.receive(delta_id, number, offset, digest, blob)
    store.finish(delta_id, tail, tail_offset)           # "received"
    store.commit(delta_id)                              # "committed"
    store.rotate(policy)                                # what goes from the old end, quick
    store.thin(policy)                                  # what goes in the middle, beside all the others

When a commit fails in the middle the replica *stops*: every point stays
readable, nothing is acknowledged, and each later call first tries to recover,
so that it goes on by itself once the cause (a full disk, say) is gone.

Thread-safe. Segments are received in parallel; one commit runs at a time, and a
call that would have to wait for it raises BusyError instead. Rotation and
thinning go on beside all that; only their short steps wait for a commit's end,
and a commit for theirs.
"""

from __future__ import annotations

import hmac
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import UUID

import msgspec

from replica.delta import DataKey, DeltaFileReader, Keyring, decode_header
from replica.durable import FileSystem, Lock
from replica.errors import (
    BaseMismatchError,
    BusyError,
    ConflictError,
    DamageError,
    FencedError,
    KeyMissingError,
    ProtocolError,
    ReplicaError,
    StorageError,
    StorageFullError,
)
from replica.model import DamagedLeaves, DeltaId, DiskId, Epoch, State
from replica.progress import Progress, silent
from replica.receipt import SignedReceipt
from replica.store import damage, incoming
from replica.store.commit import Committer
from replica.store.courtesy import going_first
from replica.store.head import FileHead, remove_leftovers
from replica.store.incoming import Incoming, discard_all, final_path, part_path
from replica.store.layout import (
    Identity,
    Layout,
    StoreState,
    heal_identity,
    load_state,
    read_identity,
    save_state,
    write_identity,
)
from replica.store.marks import Marks
from replica.store.points import PointIndex
from replica.store.receipt_key import ReceiptKey
from replica.store.receipts import ReceiptBook
from replica.store.repair import MAX_LEAVES, HeadRepair
from replica.store.retention import Policy
from replica.store.rotation import PAUSE_SECONDS, Rotated, Rotator
from replica.store.space import commit_bytes, full

YIELD_SECONDS = 0.25
"""So long a composition stands still before each slice while a commit is under way. No longer: it must get on, too."""


class ReplicaStore:
    """The writer of one replica. Made by `create` or `open`; `close` lets another process have it."""

    def __init__(
        self, fs: FileSystem, layout: Layout, lock: Lock, identity: Identity, receipt_key: ReceiptKey | None = None
    ) -> None:
        self._fs = fs
        self._layout = layout
        self._lock = lock
        self.identity = identity
        self._keyring = Keyring(fs, layout.keys)
        self._marks = Marks(fs, layout)
        self._index = index = PointIndex(fs, layout, self._keyring)
        self.receipts = ReceiptBook(
            fs,
            layout,
            receipt_key or ReceiptKey.of_storage(fs, layout.root.parent),
            identity.machine,
            lambda: index.chain().committed_points,
        )
        self._mutex = threading.RLock()
        self._working = threading.Lock()
        self._quiet = threading.Lock()
        self._dropping, self._thinning = threading.Lock(), threading.Lock()
        self._dropper, self._thinner = (
            Rotator(fs, layout, self._keyring, self._marks, self.receipts, self._settled, self._stopping) for _ in "12"
        )
        self._incoming: Incoming | None = None
        self.stopped: ReplicaError | None = None
        self._closed = False
        try:
            self._load()
        except StorageFullError as error:
            self.stopped = error

    @classmethod
    def create(
        cls,
        fs: FileSystem,
        storage: Path,
        identity: Identity,
        key: DataKey,
        epoch: Epoch,
        receipt_key: ReceiptKey | None = None,
    ) -> ReplicaStore:
        """Enrol: make the directory, its key and the empty state; `replica.toml` last, it makes it a replica.

        `receipt_key` signs receipts; the storage's own without it.
        """
        layout = Layout(storage / str(identity.replica_id))
        fs.make_directory(layout.root)
        fs.settle_names(layout.root, levels=1)
        lock = _take_lock(fs, layout)
        try:
            if fs.exists(layout.identity):
                raise ConflictError(f"replica {identity.replica_id} already exists in {storage}")
            for directory in (layout.root, layout.keys):  # what an enrolment that was cut has left
                fs.clear_temporaries(directory)
            for directory in (layout.head, layout.incoming, layout.points, layout.pins):
                fs.make_directory(directory)
            Keyring(fs, layout.keys).add(key)
            Marks(fs, layout).ensure()
            save_state(fs, layout, StoreState(State.empty(identity.replica_id, epoch), epoch, marks=True))
            write_identity(fs, layout, identity)
            store = cls(fs, layout, lock, identity, receipt_key)
            if store.stopped is not None:
                raise store.stopped
        except BaseException:
            lock.release()
            raise
        return store

    @classmethod
    def open(cls, fs: FileSystem, directory: Path, receipt_key: ReceiptKey | None = None) -> ReplicaStore:
        """Take the lock and recover. Raises BusyError, StorageError, FormatError (nothing was changed then).

        A recovery that fails does not raise: the store is `stopped`. So it is where there is no space to write `state`
        anew: what it says can be seen, and is acted on by nobody.
        """
        layout = Layout(directory)
        lock = _take_lock(fs, layout)
        try:
            identity = read_identity(fs, layout)
            store = cls(fs, layout, lock, identity, receipt_key)
            with suppress(StorageFullError):
                heal_identity(fs, layout, identity)
            store._attempt_recovery()
        except BaseException:
            lock.release()
            raise
        return store

    def _load(self) -> None:
        """Read `state` and write it anew: what is read may be in the page cache only, and after a sync that failed
        a further one says nothing about what was written before it."""
        state = load_state(self._fs, self._layout)
        if state.head.replica_id != self.identity.replica_id:
            raise ConflictError(
                f"{self._layout.root} holds state of replica {state.head.replica_id}, not {self.identity.replica_id}",
                hint="directories were mixed up; put each file back where it came from",
            )
        self._committer = Committer(
            self._fs,
            self._layout,
            self._keyring,
            self.identity.head_format,
            state,
            self.receipts,
            self._marks.now,
            self._named,
        )
        self._marks.ensure()
        if not state.marks:
            self._fs.settle_names(self._layout.marks, levels=1)
            state = msgspec.structs.replace(state, marks=True)
        save_state(self._fs, self._layout, state)
        self._committer.state = state

    def _named(self) -> Iterator[State]:
        """Every state that the head or an inverse names, but for what a commit that was taken back left behind."""
        chain = self._index.chain()
        yield chain.state.head
        for link in (*chain.links, *chain.spare, *chain.strays):
            if link.result != chain.state.head or link.path != self._layout.point(link.base.delta_id):
                yield link.base
            yield link.result

    def _attempt_recovery(self) -> None:
        try:
            self._load()
            self._committer.recover()
            if self.head.is_empty and not self._fs.list_names(self._layout.points):
                remove_leftovers(self._fs, self._layout)
        except ReplicaError as error:
            self.stopped = error
        else:
            self.stopped = None

    def close(self) -> None:
        """Let a running commit end, and release the lock. Nothing is lost by not calling it; idempotent.

        Every later call raises BusyError.
        """
        with self._working, self._mutex:
            self._closed = True
        with self._dropping, self._thinning, self._mutex:
            if self._incoming is not None:
                self._incoming.close()
                self._incoming = None
            self._lock.release()

    # --- what is so ---

    @property
    def directory(self) -> Path:
        return self._layout.root

    @property
    def head(self) -> State:
        return self._committer.state.head

    @property
    def epoch(self) -> Epoch:
        return self._committer.state.epoch

    @property
    def applying(self) -> DeltaId | None:
        return self._committer.state.applying

    @property
    def received(self) -> DeltaId | None:
        """A delta that arrived whole on top of the head and waits for its commit, after a restart say."""
        return incoming.received(self._fs, self._layout)

    @property
    def receiving(self) -> DeltaId | None:
        """The delta that is arriving or was received."""
        return incoming.receiving(self._fs, self._layout)

    @property
    def damaged(self) -> tuple[DamagedLeaves, ...]:
        """Leaves of the head that are marked as rotten and that the source is to be asked for, a bounded number.

        Not those of a disk whose tree contradicts itself: the next commit makes the tree anew and then knows which
        leaves are rotten. It is marked for that here; if the commit cannot, they are listed all the same.
        """
        marks = damage.load(self._fs, self._layout)
        if not marks.leaves or self._closed or not self._working.acquire(blocking=False):
            return damage.first_of(marks.leaves, MAX_LEAVES)
        try:
            if self.stopped is not None or self.applying is not None:
                return damage.first_of(marks.leaves, MAX_LEAVES)
            with FileHead.open(self._fs, self._layout, self.head, self.identity.head_format) as head:
                unfit = HeadRepair(self._fs, self._layout, head).contradicting(marks)
            damage.note(self._fs, self._layout, (), unfit)
        except ReplicaError:  # a file is gone, say: the next commit stops at it, and what opens the store anew mends it
            return damage.first_of(marks.leaves, MAX_LEAVES)
        finally:
            self._working.release()
        return damage.first_of([d for d in marks.leaves if d.disk_id not in unfit], MAX_LEAVES)

    def repair(self, disk_id: DiskId, first: int, epoch: Epoch, content: memoryview) -> tuple[DamagedLeaves, ...]:
        """Repair leaves of the head from what the source holds in them (`repair`); those that still are damaged.

        Idempotent. Raises FencedError, BusyError, ProtocolError, StorageError, DamageError.
        """
        with self._mutex:
            self._ensure_running()
            self._check_epoch(epoch)
            if not self._working.acquire(blocking=False):
                raise self._busy()
        try:
            with FileHead.open(self._fs, self._layout, self.head, self.identity.head_format) as head:
                return HeadRepair(self._fs, self._layout, head).put(disk_id, first, content)
        finally:
            self._working.release()

    @property
    def receipt(self) -> SignedReceipt | None:
        """The head's receipt; None while there is none (`receipts.trouble` says why)."""
        return self.receipts.newest(self.head) if self.applying is None else None

    def has_key(self, key: DataKey) -> bool:
        """Whether exactly this key is here."""
        try:
            present = self._keyring.get(key.id)
        except KeyMissingError:
            return False
        return hmac.compare_digest(present.secret, key.secret)

    # --- receiving ---

    def adopt(self, expected: Epoch, holder: UUID) -> Epoch:
        """Make `holder` the only writer: the epoch grows. Again by the same holder: no change."""
        with self._mutex:
            self._ensure_running()
            if self.epoch.holder == holder:
                return self.epoch
            if self.epoch != expected:
                raise ConflictError(
                    f"replica {self.identity.replica_id} is at epoch {self.epoch.counter}, not {expected.counter}"
                )
            if not self._working.acquire(blocking=False):
                raise self._busy()
            try:
                try:
                    self._committer.set_epoch(Epoch(expected.counter + 1, holder))
                except StorageError as error:
                    self.stopped = error  # which epoch the file names is in doubt until it was written again
                    raise
                self._drop_incoming()
                discard_all(self._fs, self._layout)
            finally:
                self._working.release()
            return self.epoch

    def begin(self, delta_id: DeltaId, base: DeltaId, epoch: Epoch, header: bytes) -> list[tuple[int, int]]:
        """Open a delta; answers which segments are here already, as half-open ranges of numbers.

        A new delta discards one that did not get its commit.
        Raises FencedError, BaseMismatchError, BusyError, ProtocolError, StorageError.
        """
        with self._mutex:
            self._ensure_running()
            self._check_epoch(epoch)
            if self._working.locked():
                raise self._busy()
            if base != self.head.delta_id:
                raise BaseMismatchError(
                    f"delta {delta_id} starts from state {base}, but the replica's head is {self.head.delta_id}",
                    head=self.head.delta_id,
                )
            self._check_header(delta_id, epoch, header)
            if self._fs.exists(final_path(self._layout, delta_id)):
                with DeltaFileReader(self._fs.open(final_path(self._layout, delta_id)), self._keyring) as reader:
                    count = len(reader.manifest.table)
                    return [(0, count)] if count else []
            if self._incoming is None or self._incoming.delta_id != delta_id:
                self._drop_incoming()
                discard_all(self._fs, self._layout, keep=delta_id)
                self._incoming = Incoming.start(self._fs, self._layout, header)
            elif self._incoming.header != header:
                raise ConflictError(f"delta {delta_id} was begun with another header")
            return self._incoming.received()

    def _check_header(self, delta_id: DeltaId, epoch: Epoch, data: bytes) -> None:
        header = decode_header(data)
        if header.delta_id != delta_id or header.replica_id != self.identity.replica_id or header.epoch != epoch:
            raise ProtocolError(f"the header of delta {delta_id} names another delta, replica or epoch")
        self._keyring.get(header.key_id)

    def receive(self, delta_id: DeltaId, number: int, offset: int, digest: bytes, blob: bytes | memoryview) -> None:
        """Store one segment of the open delta. Idempotent."""
        if self._fs.exists(final_path(self._layout, delta_id)):
            return
        try:
            self._open_incoming(delta_id).receive(number, offset, digest, blob)
        except StorageError:
            self._drop_incoming()
            raise

    def _open_incoming(self, delta_id: DeltaId) -> Incoming:
        """The open delta; after a restart of this process, the one on disk is taken up again."""
        with self._mutex:
            self._ensure_open()
            if self.stopped is not None:
                raise self.stopped
            if self._incoming is None or self._incoming.delta_id != delta_id:
                if not self._fs.exists(part_path(self._layout, delta_id)):
                    raise ProtocolError(f"delta {delta_id} is not open", hint="begin it first")
                self._drop_incoming()
                self._incoming = Incoming.resume(self._fs, self._layout, delta_id)
                self._check_header(delta_id, self.epoch, self._incoming.header)
            return self._incoming

    def finish(self, delta_id: DeltaId, tail: bytes, tail_offset: int) -> None:
        """Manifest and trailer: when this returns the whole delta is durable. Idempotent."""
        with self._mutex:
            self._ensure_running()
            if self.head.delta_id == delta_id or self._fs.exists(final_path(self._layout, delta_id)):
                return
            incoming = self._open_incoming(delta_id)
            try:
                with going_first(self._fs, self._layout):
                    incoming.finish(tail, tail_offset, self._keyring)
            except StorageError:
                # After a failed sync its pages may be gone: the sender sends it anew, nothing is read back and trusted.
                self._drop_incoming()
                discard_all(self._fs, self._layout)
                raise
            self._incoming = None

    def discard(self, delta_id: DeltaId) -> None:
        """Forget a delta that was not committed; BusyError while it is being applied.

        A stopped replica recovers first, or raises why it cannot: that nothing is being applied may not be durable, and
        a redo may need what is here.
        """
        with self._mutex:
            self._ensure_open()
            if self.receiving != delta_id:
                return
            self._ensure_running()
            if self._working.locked() or self.applying is not None:
                raise self._busy()
            self._drop_incoming()
            discard_all(self._fs, self._layout)

    def _drop_incoming(self) -> None:
        with self._mutex:
            if self._incoming is not None:
                self._incoming.close()
                self._incoming = None

    # --- committing ---

    def commit(self, delta_id: DeltaId, progress: Progress = silent, *, reserve_bytes: int = 0) -> State:
        """Apply a received delta. Idempotent: a committed one answers the state it made.

        A delta that is refused (base, roots, damage) is discarded, the head
        untouched. Where the space that it takes at most would not leave
        `reserve_bytes` free, it is kept, and StorageFullError says so. Any
        other failure may stop the replica until it recovers.
        """
        with self._mutex:
            self._ensure_open()
            if self.head.delta_id == delta_id and self.applying is None and self.stopped is None:
                return self.head
            self._ensure_running()
            if self.head.delta_id == delta_id:
                return self.head
            if not self._fs.exists(final_path(self._layout, delta_id)):
                raise ProtocolError(f"delta {delta_id} was not received", hint="begin it and send its segments")
            if not self._working.acquire(blocking=False):
                raise self._busy()
        try:
            if reserve_bytes:
                self._check_space(delta_id, reserve_bytes)
            with going_first(self._fs, self._layout), self._quiet:
                return self._commit(delta_id, progress)
        finally:
            self._working.release()

    def _check_space(self, delta_id: DeltaId, reserve_bytes: int) -> None:
        path = final_path(self._layout, delta_id)
        try:
            with DeltaFileReader(self._fs.open(path), self._keyring) as reader:
                need_bytes = commit_bytes(self._fs, self._layout, reader)
        except DamageError:
            return  # for the commit to refuse
        free_bytes = self._fs.free_bytes(self._layout.root)
        if free_bytes - need_bytes < reserve_bytes:
            raise full(self._layout.root, free_bytes, need_bytes, reserve_bytes)

    def _commit(self, delta_id: DeltaId, progress: Progress) -> State:
        try:
            return self._committer.commit(delta_id, progress)
        except BaseException as error:
            self._after_failure(error)
            raise

    def _after_failure(self, error: BaseException) -> None:
        """Stop if the head may be half written or the state file is in doubt; else a refused delta is discarded."""
        doubtful = self._committer.state.applying is not None
        if doubtful or not isinstance(error, ReplicaError):
            self.stopped = error if isinstance(error, ReplicaError) else ReplicaError(f"commit failed: {error!r}")
        elif isinstance(error, StorageError):
            self.stopped = error
        else:
            discard_all(self._fs, self._layout)

    # --- rotating ---

    def rotate(self, policy: Policy, *, at_once: bool = False, shed_bytes: int = 0, brief: bool = False) -> Rotated:
        """Drop the points that the policy no longer keeps from the old end, up to one that is being read.

        `shed_bytes`: space is short, give up points worth that much. `brief`: only so many as a commit can wait for;
        `more` says whether there are others. Raises BusyError, StorageError.
        """
        done = Rotated(more=True)
        while done.more:
            with self._dropping:
                self._ensure_open()
                self._keep_time()
                done += self._dropper.drop(policy, at_once=at_once, shed_bytes=shed_bytes - done.freed_bytes)
            if brief:
                break
            if done.more:
                time.sleep(PAUSE_SECONDS)
        return done

    def thin(self, policy: Policy, *, at_once: bool = False, shed_bytes: int = 0) -> Rotated:
        """Compose away the points that the policy no longer keeps between others: may take long, stops nothing.

        `at_once`: also where more will go of the same hour or day soon. Raises BusyError, StorageError.
        """
        with self._thinning:
            self._ensure_open()
            return self._thinner.thin(policy, at_once=at_once, shed_bytes=shed_bytes)

    @contextmanager
    def _settled(self) -> Iterator[bool]:
        """While no commit goes on. False if the replica has stopped: what `state` says may not be durable then, and
        what it makes look superfluous may be all that a recovery has."""
        with self._quiet:
            yield self.stopped is None and self.applying is None

    def _stopping(self) -> bool:
        """Whether work behind is to end. While a commit is under way it waits a little: commits go first."""
        if self._quiet.acquire(timeout=YIELD_SECONDS):
            self._quiet.release()
        return self._closed

    def _keep_time(self) -> None:
        # Said by whoever asks for the locks; until it is mended, or there is space, time stands still.
        with suppress(DamageError, StorageError):
            self._marks.keep_time()

    def _ensure_open(self) -> None:
        if self._closed:
            raise BusyError(f"replica {self.identity.replica_id} was closed here", hint="try again")

    def _ensure_running(self) -> None:
        self._ensure_open()
        if self.stopped is not None:
            # Never waiting for `_working` with `_mutex` held: `close` takes them the other way round.
            if not self._working.acquire(blocking=False):
                raise self._busy()
            try:
                with self._quiet:  # no rotation removes anything meanwhile
                    self._attempt_recovery()
            finally:
                self._working.release()
            if self.stopped is not None:
                raise self.stopped

    def _check_epoch(self, epoch: Epoch) -> None:
        if epoch != self.epoch:
            raise FencedError(
                f"replica {self.identity.replica_id} of machine {self.identity.machine!r} is at epoch "
                f"{self.epoch.counter} of another sender; this one has {epoch.counter}",
                hint="another sender with this identity took the replica over; stop one of the two, "
                "and remove the state directory of the one that is to take over",
            )

    def _busy(self) -> BusyError:
        return BusyError(
            f"replica {self.identity.replica_id} is just committing a point", hint="try again when it is done"
        )


def _take_lock(fs: FileSystem, layout: Layout) -> Lock:
    return fs.lock(
        layout.lock,
        busy=f"{layout.root} is in use by another process; is a receiver already running on this storage?",
    )
