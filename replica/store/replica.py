"""One replica's directory, and the one process that may write to it.

    store = ReplicaStore.open(fs, directory)            # takes the lock, recovers
    store.begin(delta_id, base, epoch, header)
    store.receive(delta_id, number, offset, digest, blob)
    store.finish(delta_id, tail, tail_offset)           # "received"
    store.commit(delta_id)                              # "committed"
    store.rotate(keep_last=24)

When a commit fails in the middle the replica *stops*: every point stays
readable, nothing is acknowledged, and each later call first tries to recover,
so that it goes on by itself once the cause (a full disk, say) is gone.

Thread-safe. Segments are received in parallel; one commit or rotation runs at
a time, and a call that would have to wait for it raises BusyError instead.
"""

from __future__ import annotations

import hmac
import threading
from pathlib import Path
from uuid import UUID

from replica import documents
from replica.delta import DataKey, DeltaFileReader, Keyring, decode_header
from replica.durable import FileSystem, Lock
from replica.errors import (
    BaseMismatchError,
    BusyError,
    ConflictError,
    FencedError,
    KeyMissingError,
    ProtocolError,
    ReplicaError,
    StorageError,
)
from replica.model import DeltaId, Epoch, State
from replica.progress import Progress, silent
from replica.store.commit import Committer
from replica.store.head import remove_leftovers
from replica.store.incoming import Incoming, discard_all, final_path, held, part_path
from replica.store.layout import Identity, Layout, StoreState, read_identity, write_identity
from replica.store.pins import try_unpin_all
from replica.store.points import PointIndex
from replica.store.retention import to_drop


class ReplicaStore:
    """The writer of one replica. Made by `create` or `open`; `close` lets another process have it."""

    def __init__(self, fs: FileSystem, layout: Layout, lock: Lock, identity: Identity) -> None:
        self._fs = fs
        self._layout = layout
        self._lock = lock
        self.identity = identity
        self._keyring = Keyring(fs, layout.keys)
        self._index = PointIndex(fs, layout, self._keyring)
        self._mutex = threading.RLock()
        self._working = threading.Lock()
        self._incoming: Incoming | None = None
        self.stopped: ReplicaError | None = None
        self._closed = False
        self._load()

    @classmethod
    def create(cls, fs: FileSystem, storage: Path, identity: Identity, key: DataKey, epoch: Epoch) -> ReplicaStore:
        """Enrol: make the directory, its key and the empty state; `replica.toml` last, it makes it a replica."""
        layout = Layout(storage / str(identity.replica_id))
        fs.make_directory(layout.root)
        lock = _take_lock(fs, layout)
        try:
            if fs.exists(layout.identity):
                raise ConflictError(f"replica {identity.replica_id} already exists in {storage}")
            for directory in (layout.head, layout.incoming, layout.points, layout.pins):
                fs.make_directory(directory)
            Keyring(fs, layout.keys).add(key)
            documents.save(fs, layout.state, StoreState(State.empty(identity.replica_id, epoch), epoch))
            write_identity(fs, layout, identity)
            return cls(fs, layout, lock, identity)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def open(cls, fs: FileSystem, directory: Path) -> ReplicaStore:
        """Take the lock and recover. Raises BusyError, StorageError, FormatError (nothing was changed then).

        A recovery that fails does not raise: the store is `stopped`.
        """
        layout = Layout(directory)
        lock = _take_lock(fs, layout)
        try:
            store = cls(fs, layout, lock, read_identity(fs, layout))
            store._attempt_recovery()
        except BaseException:
            lock.release()
            raise
        return store

    def _load(self) -> None:
        """Read `state` and write it anew: what is read may be in the page cache only, and after a sync that failed
        a further one says nothing about what was written before it."""
        state = documents.load(self._fs, self._layout.state, StoreState)
        documents.save(self._fs, self._layout.state, state)
        if state.head.replica_id != self.identity.replica_id:
            raise ConflictError(
                f"{self._layout.root} holds state of replica {state.head.replica_id}, not {self.identity.replica_id}",
                hint="directories were mixed up; put each file back where it came from",
            )
        self._committer = Committer(self._fs, self._layout, self._keyring, self.identity.head_format, state)

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
        whole = [delta_id for name, delta_id in held(self._fs, self._layout).items() if "." not in name]
        return whole[0] if whole else None

    @property
    def receiving(self) -> DeltaId | None:
        """The delta that is arriving or was received."""
        return next(iter(held(self._fs, self._layout).values()), None)

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
                incoming.finish(tail, tail_offset, self._keyring)
            except StorageError:
                # After a failed sync its pages may be gone: the sender sends it anew, nothing is read back and trusted.
                self._drop_incoming()
                discard_all(self._fs, self._layout)
                raise
            self._incoming = None

    def discard(self, delta_id: DeltaId) -> None:
        """Forget a delta that was not committed; BusyError while it is being applied."""
        with self._mutex:
            self._ensure_open()
            if self.receiving != delta_id:
                return
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

    def commit(self, delta_id: DeltaId, progress: Progress = silent) -> State:
        """Apply a received delta. Idempotent: a committed one answers the state it made.

        A delta that is refused (base, roots, damage) is discarded, the head
        untouched. Any other failure may stop the replica until it recovers.
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
            return self._committer.commit(delta_id, progress)
        except BaseException as error:
            self._after_failure(error)
            raise
        finally:
            self._working.release()

    def _after_failure(self, error: BaseException) -> None:
        """Stop if the head may be half written or the state file is in doubt; else a refused delta is discarded."""
        doubtful = self._committer.state.applying is not None
        if doubtful or not isinstance(error, ReplicaError):
            self.stopped = error if isinstance(error, ReplicaError) else ReplicaError(f"commit failed: {error!r}")
        elif isinstance(error, StorageError):
            self.stopped = error
        else:
            discard_all(self._fs, self._layout)

    def rotate(self, keep_last: int) -> list[int]:
        """Drop the points that the policy no longer keeps, oldest first, up to one that is being read."""
        if not self._working.acquire(blocking=False):
            raise self._busy()
        try:
            self._ensure_open()
            chain = self._index.chain()
            if chain.state.applying is not None:
                return []
            links = list(chain.links)
            if links and links[-1].result.is_empty:
                self._fs.unlink(links.pop().path)
            states = [link.result for link in reversed(links)]
            numbers = [state.point for state in states] + [chain.state.head.point]
            dropped = []
            for number in to_drop(numbers, keep_last):
                link = links.pop()
                lock = try_unpin_all(self._fs, self._layout, link.result.delta_id)
                if lock is None:
                    break
                with lock:
                    self._fs.unlink(link.path)
                    self._fs.unlink(self._layout.pin(link.result.delta_id))
                dropped.append(number)
            return dropped
        finally:
            self._working.release()

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
