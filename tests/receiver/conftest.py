"""A site over stores in memory with a clock that is moved by hand, and a primary to play with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from replica.durable import FileSystem
from replica.model import DeltaId, Epoch, ReplicaId, State, random_id
from replica.receiver.session import Session
from replica.receiver.site import AllowSpec, Site, SiteSpec, StorageSpec
from replica.store import Policy
from replica.transport.tls import TlsFiles
from replica.transport.wire import Begin, Enrol, ReplicaInfo, digest_of
from tests.receiver.loopback import Pki
from tests.receiver.memory_stores import MemoryStore, MemoryStores, new_key, next_state, tail_of

NO_TLS = TlsFiles(Path("ca"), Path("cert"), Path("key"))


@dataclass
class World:
    """A site, its stores and its clock."""

    stores: MemoryStores = field(default_factory=MemoryStores)
    now: float = 1000.0
    spec: SiteSpec = field(
        default_factory=lambda: SiteSpec(
            "127.0.0.1",
            0,
            NO_TLS,
            {"tier1": StorageSpec("tier1", Path("/t1")), "tier2": StorageSpec("tier2", Path("/t2"), "vhd")},
            [AllowSpec("hv-*", "tier1", "prod"), AllowSpec("lab-*", "tier2", "lab")],
            retention=Policy(keep_last=3, hourly=0),
        )
    )

    def open(self) -> Site:
        self.site = Site(FileSystem(), self.spec, stores=self.stores, clock=lambda: self.now)
        return self.site

    def primary(self, identity: str = "hv-1", machine: str = "web-1") -> Primary:
        return Primary(self, self.site.session(identity), machine)


class Primary:
    """One machine's sender, reduced to what the site sees of it."""

    def __init__(self, world: World, session: Session, machine: str) -> None:
        self.world = world
        self.session = session
        self.id = ReplicaId(random_id())
        self.epoch = Epoch(0, random_id())
        self.key = new_key()
        self.machine = machine

    @property
    def store(self) -> MemoryStore:
        return self.world.stores.all[self.id]

    @property
    def enrolment(self) -> Enrol:
        return Enrol(self.machine, self.key.id, self.key.secret, self.epoch)

    def enrol(self) -> ReplicaInfo:
        return self.session.enrol(self.id, self.enrolment)

    def begin(self, delta_id: DeltaId | None = None) -> State:
        """Open a delta; the state it will lead to."""
        head = self.session.replica(self.id).head
        state = next_state(head, self.epoch, delta_id)
        self.session.begin(self.id, state.delta_id, Begin(head.delta_id, self.epoch, bytes(160)))
        return state

    def send(self, state: State, number: int = 0, blob: bytes = b"segment") -> None:
        self.session.put_segment(self.id, state.delta_id, number, 160, digest_of(blob), blob)

    def commit(self, state: State, wait_seconds: float = 10.0) -> ReplicaInfo | None:
        return self.session.commit(self.id, state.delta_id, tail_of(state), 167, wait_seconds)

    def cycle(self, *, partial: bool = False) -> ReplicaInfo:
        """`partial`: a part of a long copy, which makes no point."""
        state = self.begin()
        if partial:
            state = msgspec.structs.replace(state, point=state.point - 1, partial=True)
        self.send(state)
        done = self.commit(state)
        assert done is not None
        return done


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    made.open()
    yield made
    for store in made.stores:
        store.gate.set()
    made.site.close()


@pytest.fixture
def primary(world: World) -> Primary:
    made = world.primary()
    made.enrol()
    return made


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("module") / "pki")
