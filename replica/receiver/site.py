"""A replica site without its network: replicas in storages, and sessions that act for an identity.

    with Site(fs, spec) as site:
        receiver = site.session("hv-1")         # `transport.api.Receiver`, here in this process
        receiver.enrol(replica_id, Enrol("web-1", key_id, key, epoch))

The HTTPS server makes one session per request from the client's certificate;
a program that links both sides makes one from a name it trusts. Either way
every call goes through the same three questions: does an `[[allow]]` entry let
this identity in, is there such a replica, is it this identity's own
(`admission`). What then happens to the replica is its slot's affair (`slot`).

At start every replica in every storage is opened and thereby recovered, several
at once, if one likes (`wait=False`) while requests are already answered; one
that cannot be opened, or takes for ever, stops nobody else. Thread-safe.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Self
from uuid import UUID

from replica.delta import DataKey
from replica.durable import FileSystem
from replica.errors import BusyError, KeyMissingError, ProtocolError, ReplicaError
from replica.model import DiskId, ReplicaId
from replica.receiver.admission import authorise, check_again, check_new, check_owner, unknown
from replica.receiver.session import Session, find_disk
from replica.receiver.slot import PATIENCE_SECONDS, Slot
from replica.receiver.spec import AllowSpec, SiteSpec, StorageSpec
from replica.receiver.stores import FileStores, Reader, Store, Stores
from replica.receiver.upkeep import Housekeeper
from replica.store import Identity
from replica.store.receipt_key import ReceiptKey
from replica.store.retention import FLOODABLE
from replica.store.space import Space
from replica.transport.wire import MAX_GRAIN_BYTES, MAX_TREE_NODES, Enrol, GrainQuery, ReplicaInfo, TreeQuery

__all__ = ["AllowSpec", "Session", "Site", "SiteSpec", "StorageSpec"]

log = logging.getLogger(__name__)

MAX_COMMITS = 4
"""Heads rewritten at the same time: what one more costs in memory and in seeks gains no time."""
CLOSE_SECONDS = 60.0
FIND_SECONDS = 30.0
"""How long the start waits for storages to be listed."""
ENROL_SECONDS = 20.0


class Site:
    """All replicas of one receiver."""

    def __init__(
        self,
        fs: FileSystem,
        spec: SiteSpec,
        *,
        stores: Stores | None = None,
        clock: Callable[[], float] = time.monotonic,
        wait: bool = True,
    ) -> None:
        """Finds every replica, and opens and recovers them: by the time this returns, or behind (`wait=False`).

        Ones that cannot be opened are logged and left for later. Raises StorageError if a storage cannot be listed.
        """
        self.spec = spec
        self._stores = stores or FileStores(fs, _receipt_key(fs, spec))
        self._clock = clock
        self._turns = threading.Semaphore(MAX_COMMITS)
        self._enrolling: dict[str, threading.Lock] = {}
        self._slots: dict[ReplicaId, Slot] = {}
        self._housekeeper = Housekeeper(lambda: list(self._slots.values()), self._spaces)
        self.failed = self.recovering = 0
        self._counting = threading.Lock()
        self._hanging: set[str] = set()
        self._find_all()
        self._warn_of_policies()
        self._recover(list(self._slots.values()), wait)
        self._housekeeper.start()

    def _spaces(self) -> list[tuple[str, Space]]:
        return [(s.name, self._stores.space(s.path, s.limits)) for s in self.spec.storages.values()]

    def _warn_of_policies(self) -> None:
        for name, policy in [("*", self.spec.retention), *((m.machine, m.policy) for m in self.spec.machines)]:
            if policy.is_floodable:
                log.warning("retention of machine %r: %s", name, FLOODABLE)

    def _find_all(self) -> None:
        """List every storage. One that hangs is not waited for: its replicas come when it answers."""
        listings = {storage.name: self._list(storage) for storage in self.spec.storages.values()}
        wait_for(listings.values(), timeout=FIND_SECONDS)
        with self._counting:
            self._hanging = {name for name, listing in listings.items() if not listing.done()}
        for name, listing in listings.items():
            if name in self._hanging:
                log.error("storage %s does not answer: its replicas are found when it does", name)
                listing.add_done_callback(partial(self._found_late, name))
            else:
                for directory in listing.result():
                    self._find(directory)

    def _list(self, storage: StorageSpec) -> Future[list[Path]]:
        listing: Future[list[Path]] = Future()

        def work() -> None:
            try:
                found = self._stores.directories(storage.path)
            except BaseException as error:  # noqa: BLE001  # handed to whoever waits
                listing.set_exception(error)
            else:
                listing.set_result(found)

        threading.Thread(target=work, name=f"find-{storage.name}", daemon=True).start()
        return listing

    def _found_late(self, name: str, listing: Future[list[Path]]) -> None:
        try:
            found = listing.result()
        except ReplicaError as error:
            log.error("storage %s cannot be listed: %s; restart when it can be", name, error)
            return
        with self._counting:
            before = set(self._slots)
            for directory in found:
                self._find(directory)
            self._hanging.discard(name)
        log.info("storage %s answers: %d replicas", name, len(found))
        self._recover([slot for slot_id, slot in self._slots.items() if slot_id not in before], wait=False)

    def _recover(self, found: list[Slot], wait: bool) -> None:
        """Open slots, `MAX_COMMITS` at a time. In daemon threads: one that hangs must not hold up the end."""
        slots: SimpleQueue[Slot] = SimpleQueue()
        for slot in found:
            slots.put(slot)
        counting = self._counting
        with counting:
            self.recovering += len(found)

        def work() -> None:
            with suppress(Empty):
                while True:
                    failed = _fails_to_open(slots.get_nowait())
                    with counting:
                        self.failed += failed
                        self.recovering -= 1
                        if not self.recovering and not wait:
                            log.info("recovered: %d replicas, %d stopped", len(self), self.failed)

        threads = [threading.Thread(target=work, name=f"recover-{n}", daemon=True) for n in range(MAX_COMMITS)]
        for thread in threads:
            thread.start()
        if wait:
            for thread in threads:
                thread.join()

    def _find(self, directory: Path) -> None:
        try:
            replica_id = ReplicaId(UUID(directory.name))
        except ValueError:
            log.warning("%s is no replica: a replica's directory has its id as its name", directory)
            return
        if replica_id in self._slots:
            log.error("%s is left out: that replica is also in %s", directory, self._slots[replica_id].directory)
            return
        self._slots = {**self._slots, replica_id: self._slot(replica_id, directory)}

    def _slot(self, replica_id: ReplicaId, directory: Path, store: Store | None = None) -> Slot:
        stores, wake = self._stores, self._housekeeper.wake
        return Slot(stores, replica_id, directory, self._clock, self._turns, store, spec=self.spec, wake=wake)

    def __len__(self) -> int:
        return len(self._slots)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self, limit_seconds: float = CLOSE_SECONDS) -> bool:
        """Let running commits end, at most that long altogether, and close the stores; False if one did not end."""
        deadline = time.monotonic() + limit_seconds
        slots = list(self._slots.values())
        self._housekeeper.stop()
        for slot in slots:
            slot.refuse()
        ended = [slot.close(max(0.0, deadline - time.monotonic())) for slot in slots]
        return all(ended)

    def session(self, identity: str) -> Session:
        """Act for `identity`. Raises nothing: every call asks anew whether it may."""
        return Session(self, identity)

    # --- what sessions do ---

    def check_allowed(self, identity: str) -> None:
        """ForbiddenError if no `[[allow]]` entry matches."""
        authorise(self.spec.allow, identity)

    def slot(self, identity: str, replica_id: ReplicaId) -> Slot:
        """The slot of `identity`'s own replica. ForbiddenError, UnknownMachineError, or why it is unreadable."""
        authorise(self.spec.allow, identity)
        slot = self._slots.get(replica_id)
        if slot is None:
            self._refuse_while_hanging()
            raise unknown(replica_id)
        check_owner(self._identity_of(slot).owner, identity, replica_id)
        return slot

    def _refuse_while_hanging(self) -> None:
        """A replica that is not known may be in a storage that has not answered yet."""
        if self._hanging:
            raise BusyError(
                "a storage of the receiver does not answer yet: it is not known which replicas there are",
                hint="it is tried again by itself; if that stays, look at the receiver's log",
            )

    def _identities(self) -> list[tuple[Slot, Identity | None]]:
        """Every slot and whose it is, as far as that can be read; waits for all together no longer than for one."""
        slots = list(self._slots.values())
        for slot in slots:
            slot.look_for_identity()
        deadline = time.monotonic() + PATIENCE_SECONDS
        return [(slot, slot.identity(max(0.0, deadline - time.monotonic()))) for slot in slots]

    def _identity_of(self, slot: Slot) -> Identity:
        """Whose replica this is. As long as that is unreadable nobody is told more than that."""
        found = slot.identity()
        if found is not None:
            return found
        try:
            return slot.store().identity
        except BusyError:
            raise
        except ReplicaError as error:
            log.error("replica %s cannot be opened: %s", slot.replica_id, error)
            raise type(error)(
                f"replica {slot.replica_id} cannot be opened at the receiver", hint="the receiver's log says why"
            ) from error

    def owned(self, identity: str, machine: str) -> list[ReplicaInfo]:
        """Every replica known to be `identity`'s, of one machine's name or of all; unreadable ones as stopped."""
        authorise(self.spec.allow, identity)
        if machine:
            self._refuse_while_hanging()  # who finds none makes another
        found = []
        for slot, who in self._identities():
            if who is None or who.owner != identity or machine not in ("", who.machine):
                continue
            try:
                found.append(slot.info())
            except ReplicaError as error:
                log.warning("replica %s cannot be read: %s", slot.replica_id, error)
                found.append(slot.unreadable(who, error))
        return sorted(found, key=lambda info: (info.machine, info.replica_id))

    def enrol(self, identity: str, replica_id: ReplicaId, enrol: Enrol) -> ReplicaInfo:
        entry = authorise(self.spec.allow, identity)
        key = DataKey(enrol.key_id, enrol.key)
        with self._enrolling_by(identity):
            slot = self._slots.get(replica_id)
            if slot is None:
                self._refuse_while_hanging()
                known = self._identities()
                check_new([who for _, who in known if who is not None], identity, enrol.machine, entry.max_replicas)
                for other_id in (other.replica_id for other, who in known if who is None):
                    log.warning(
                        "machine %s of %s is enrolled as %s; replica %s cannot be read and may be of the same machine",
                        enrol.machine,
                        identity,
                        replica_id,
                        other_id,
                    )
                slot = self._create(identity, replica_id, enrol, entry, key)
            else:
                present_identity = self._identity_of(slot)
                check_owner(present_identity.owner, identity, replica_id)
                check_again(present_identity, identity, enrol.machine, same_key=_has_key(slot, key))
        return slot.info()

    @contextmanager
    def _enrolling_by(self, identity: str) -> Iterator[None]:
        """One enrolment of an identity at a time; one that hangs keeps no other identity waiting."""
        with self._counting:
            turn = self._enrolling.setdefault(identity, threading.Lock())
        if not turn.acquire(timeout=ENROL_SECONDS):
            raise BusyError(
                f"another enrolment by {identity!r} does not end",
                hint="it is tried again by itself; if that stays, look at the receiver's storage",
            )
        try:
            yield
        finally:
            turn.release()

    def _create(self, identity: str, replica_id: ReplicaId, enrol: Enrol, entry: AllowSpec, key: DataKey) -> Slot:
        storage = self.spec.storages[entry.storage]
        who = Identity(
            replica_id=replica_id,
            machine=enrol.machine,
            owner=identity,
            trust_group=entry.trust_group,
            head_format=storage.head,
            created_at_ns=time.time_ns(),
        )
        store = self._stores.create(storage.path, who, key, enrol.epoch)
        slot = self._slot(replica_id, storage.path / str(replica_id), store)
        with self._counting:
            self._slots = {**self._slots, replica_id: slot}
        log.info(
            "replica %s: enrolled machine %s of %s in storage %s", replica_id, enrol.machine, identity, storage.name
        )
        return slot

    def reader(self, identity: str, replica_id: ReplicaId) -> Reader:
        return self._stores.reader(self.slot(identity, replica_id).directory)

    def tree(self, identity: str, replica_id: ReplicaId, disk_id: DiskId, level: int, first: int, count: int) -> bytes:
        slot = self.slot(identity, replica_id)
        if not 1 <= count <= MAX_TREE_NODES:
            raise ProtocolError(f"{count} nodes of a tree were asked for; 1 to {MAX_TREE_NODES} can be")
        disk = find_disk(self._stores.reader(slot.directory).head, str(disk_id))
        return self._stores.tree(slot.directory, disk, level, first, count)

    def nodes(self, identity: str, replica_id: ReplicaId, disk_id: DiskId, query: TreeQuery) -> bytes:
        slot = self.slot(identity, replica_id)
        return self._stores.nodes(slot.directory, query.base, disk_id, query.level, query.ranges)

    def grains(self, identity: str, replica_id: ReplicaId, disk_id: DiskId, query: GrainQuery) -> bytes:
        slot = self.slot(identity, replica_id)
        return self._stores.grains(slot.directory, query.base, disk_id, query.secret, query.ranges, MAX_GRAIN_BYTES)


def _receipt_key(fs: FileSystem, spec: SiteSpec) -> ReceiptKey | None:
    storages = tuple(storage.path for storage in spec.storages.values())
    return ReceiptKey(fs, spec.receipt_key, storages) if spec.receipt_key else None


def _has_key(slot: Slot, key: DataKey) -> bool:
    try:
        return slot.store().has_key(key)
    except KeyMissingError:
        return False


def _fails_to_open(slot: Slot) -> bool:
    try:
        store = slot.store(patience_seconds=None)
    except BusyError as error:
        log.error("replica %s: %s", slot.replica_id, error)
        return True
    except ReplicaError as error:
        log.error("replica %s cannot be opened: %s", slot.replica_id, error)
        return True
    if store.stopped is not None:
        log.error("replica %s (%s) is stopped: %s", slot.replica_id, store.identity.machine, store.stopped)
    return store.stopped is not None
