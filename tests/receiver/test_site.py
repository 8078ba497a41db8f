"""Replicas side by side in one site: whose they are, and that one's trouble is not another's."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec
import pytest

from replica.delta import DataKey
from replica.durable import FileSystem
from replica.errors import (
    BusyError,
    ConflictError,
    DamageError,
    FencedError,
    ForbiddenError,
    ProtocolError,
    ReplicaError,
    StorageError,
    StorageFullError,
    UnknownMachineError,
)
from replica.model import DeltaId, Epoch, ReplicaId, random_id
from replica.receiver import site, slot
from replica.receiver.session import Session
from replica.receiver.site import Site
from replica.receiver.stores import FileStores
from replica.store import Identity
from replica.transport.wire import Adopt, Begin, digest_of
from tests.receiver.conftest import Primary, World
from tests.receiver.memory_stores import DISK, MemoryStore, content, new_key, tail_of


def calls(primary: Primary, session: Session) -> list[Callable[[], object]]:
    """Every call about one replica, made by `session`."""
    rid, delta = primary.id, DeltaId(random_id())
    return [
        lambda: session.replica(rid),
        lambda: session.adopt(rid, Adopt(primary.epoch, random_id())),
        lambda: session.begin(rid, delta, Begin(delta, primary.epoch, b"h")),
        lambda: session.put_segment(rid, delta, 0, 160, digest_of(b"x"), b"x"),
        lambda: session.commit(rid, delta, b"t", 160, 0),
        lambda: session.discard(rid, delta),
        lambda: session.points(rid),
        lambda: list(session.read(rid, 1, DISK.id)),
        lambda: session.tree(rid, DISK.id, 0, 0, 1),
    ]


def test_an_enrolment_gets_the_first_matching_entry_s_storage(world: World) -> None:
    for identity, storage, group in (("hv-1", "raw", "prod"), ("lab-1", "vhd", "lab")):
        primary = world.primary(identity)
        info = primary.enrol()
        assert (info.owner, info.machine, info.head.is_empty) == (identity, "web-1", True)
        who = primary.store.identity
        assert (who.head_format, who.trust_group, who.owner) == (storage, group, identity)


def test_who_matches_no_entry_may_do_nothing(world: World, primary: Primary) -> None:
    stranger = world.site.session("nas-1")
    enrol = partial(stranger.enrol, ReplicaId(random_id()), primary.enrolment)
    for call in [*calls(primary, stranger), stranger.replicas, enrol]:
        with pytest.raises(ForbiddenError, match=r"no \[\[allow\]\] entry matches 'nas-1'"):
            call()


def test_another_primary_s_replica_is_not_seen_or_touched(world: World, primary: Primary) -> None:
    done = primary.cycle()
    other = world.site.session("hv-2")
    assert other.replicas() == []
    for call in [*calls(primary, other), lambda: other.enrol(primary.id, primary.enrolment)]:
        with pytest.raises(ForbiddenError, match="belongs to another primary") as caught:
            call()
        assert "hv-1" not in str(caught.value)
    assert primary.session.replica(primary.id) == done


def test_a_replica_that_is_not_there_is_unknown(world: World, primary: Primary) -> None:
    ghost = Primary(world, primary.session, "web-9")
    for call in calls(ghost, primary.session):
        with pytest.raises(UnknownMachineError):
            call()


def test_an_entry_taken_away_shuts_its_primaries_out(world: World, primary: Primary) -> None:
    world.site.close()
    world.spec = replace(world.spec, allow=[])
    world.open()
    with pytest.raises(ForbiddenError):
        world.site.session("hv-1").replica(primary.id)


def test_enrolling_again_is_answered_the_same_and_changes_nothing(world: World, primary: Primary) -> None:
    done = primary.cycle()
    assert primary.enrol() == done
    primary.epoch = Epoch(9, random_id())
    assert primary.enrol().epoch == done.epoch


def test_enrolling_again_never_replaces_a_key_or_a_name(world: World, primary: Primary) -> None:
    key = primary.key
    for other in (new_key(), msgspec.structs.replace(key, secret=bytes(32))):
        primary.key = other
        with pytest.raises(ConflictError, match="another data key"):
            primary.enrol()
    primary.key, primary.machine = key, "web-2"
    with pytest.raises(ConflictError, match="is of machine 'web-1'"):
        primary.enrol()
    assert primary.store.key == key


def test_a_second_replica_of_a_machine_is_refused_also_beside_an_empty_one(world: World, primary: Primary) -> None:
    again = world.primary("hv-1", "web-1")
    with pytest.raises(ConflictError, match=f"already has a replica of machine 'web-1': {primary.id}; adopt it"):
        again.enrol()
    assert len(world.stores.all) == 1
    world.primary("hv-2", "web-1").enrol()
    world.primary("hv-1", "web-2").enrol()


def test_a_list_holds_one_s_own_by_name(world: World, primary: Primary) -> None:
    world.primary("hv-2", "web-1").enrol()
    second = world.primary("hv-1", "web-2")
    second.enrol()
    session = primary.session
    assert [i.replica_id for i in session.replicas()] == [primary.id, second.id]
    assert [i.replica_id for i in session.replicas("web-2")] == [second.id]
    assert session.replicas("web-3") == []


# --- adopting ---


def test_adopting_fences_the_other_sender(world: World, primary: Primary) -> None:
    state = primary.begin()
    world.now += 61
    second = Epoch(0, random_id())
    info = primary.session.adopt(primary.id, Adopt(primary.epoch, second.holder))
    assert info.epoch == Epoch(1, second.holder)
    for call in (lambda: primary.send(state), lambda: primary.commit(state), lambda: primary.begin()):
        with pytest.raises(FencedError, match="; .*stop one"):
            call()
    primary.epoch = info.epoch
    assert primary.cycle().head.point == 1


def test_adopting_waits_for_an_active_sender(world: World, primary: Primary) -> None:
    state = primary.begin()
    world.now += 59
    primary.send(state)
    world.now += 59
    adopt = Adopt(primary.epoch, random_id())
    with pytest.raises(BusyError, match="59 s ago"):
        primary.session.adopt(primary.id, adopt)
    assert primary.commit(state) is not None
    assert primary.session.adopt(primary.id, adopt).epoch.counter == 1


def test_a_delta_given_up_holds_nobody_up(world: World, primary: Primary) -> None:
    state = primary.begin()
    primary.session.discard(primary.id, state.delta_id)
    primary.session.adopt(primary.id, Adopt(primary.epoch, random_id()))


def test_a_sender_that_lost_only_its_connection_need_not_wait(world: World, primary: Primary) -> None:
    primary.begin()
    info = primary.session.adopt(primary.id, Adopt(primary.epoch, primary.epoch.holder))
    assert info.epoch == primary.epoch


def test_adopting_an_epoch_that_is_gone_is_a_conflict(world: World, primary: Primary) -> None:
    primary.session.adopt(primary.id, Adopt(primary.epoch, random_id()))
    with pytest.raises(ConflictError):
        primary.session.adopt(primary.id, Adopt(primary.epoch, random_id()))


# --- one's trouble is not another's ---


def test_a_damaged_replica_stops_nobody_else_and_comes_back(world: World, primary: Primary) -> None:
    good = world.primary("hv-1", "web-2")
    good.enrol()
    world.site.close()
    world.stores.broken[primary.id] = DamageError("state is damaged in /secret/place")
    world.open()
    session, other = world.site.session("hv-1"), world.site.session("hv-2")
    good.session = session
    assert good.cycle().head.point == 1
    assert [i.machine for i in session.replicas()] == ["web-2"]
    for anyone in (session, other):
        with pytest.raises(DamageError, match="cannot be opened at the receiver") as caught:
            anyone.replica(primary.id)
        assert "/secret/place" not in str(caught.value)
    del world.stores.broken[primary.id]
    primary.session = session
    assert primary.cycle().head.point == 1


def test_a_locked_replica_is_listed_as_stopped_and_comes_back(world: World, primary: Primary) -> None:
    world.site.close()
    world.stores.locked[primary.id] = BusyError("in use by another process")
    world.open()
    primary.session = world.site.session("hv-1")
    [info] = primary.session.replicas("web-1")
    assert info.stopped is not None
    assert info.stopped.detail == "in use by another process"
    with pytest.raises(BusyError, match="in use by another process"):
        primary.begin()
    with pytest.raises(ForbiddenError):
        world.site.session("hv-2").replica(primary.id)
    with pytest.raises(ConflictError):
        world.primary("hv-1", "web-1").enrol()
    world.stores.locked.clear()
    assert primary.cycle().head.point == 1


def test_a_stopped_store_shows_why(world: World, primary: Primary) -> None:
    primary.store.stopped = ReplicaError("half written", hint="free some space")
    info = primary.session.replica(primary.id)
    assert info.stopped is not None
    assert (info.stopped.detail, info.stopped.hint) == ("half written", "free some space")


def test_directories_that_are_no_replicas_are_left_alone(
    world: World, primary: Primary, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.site.close()
    real = world.stores.directories
    monkeypatch.setattr(world.stores, "directories", lambda storage: [*real(storage), Path("/t1/lost+found")])
    assert len(world.open()) == 1


# --- reading ---


def test_points_and_their_bytes(world: World, primary: Primary) -> None:
    for _ in range(4):
        primary.cycle()
    session = primary.session
    assert [p.state.point for p in session.points(primary.id)] == [2, 3, 4]
    for offset, length in ((0, None), (5, 1 << 20), (DISK.size_bytes - 3, 100)):
        expected = content(3, offset, min(DISK.size_bytes - offset, length or DISK.size_bytes))
        assert b"".join(session.read(primary.id, 3, DISK.id, offset, length)) == expected
    assert world.stores.open_points == 0


def test_a_tree_is_read_in_bounded_parts(primary: Primary) -> None:
    primary.cycle()
    assert len(primary.session.tree(primary.id, DISK.id, 1, 3, 5)) == 5 * 32
    for count in (0, 65537):
        with pytest.raises(ReplicaError, match="65536"):
            primary.session.tree(primary.id, DISK.id, 0, 0, count)


def test_a_replica_that_opens_slowly_is_busy_and_stops_no_other(
    world: World, primary: Primary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found at the start and opened behind: requests to it end soon, others work, and it comes when it is there."""
    monkeypatch.setattr(slot, "PATIENCE_SECONDS", 0.05)
    other = world.primary("hv-2")
    other.enrol()
    world.site.close()
    go_on = threading.Event()
    open_store = world.stores.open

    def slow(directory: Path) -> MemoryStore:
        if directory.name == str(primary.id):
            assert go_on.wait(30)
        return open_store(directory)

    monkeypatch.setattr(world.stores, "open", slow)
    world.site = Site(FileSystem(), world.spec, stores=world.stores, clock=lambda: world.now, wait=False)
    mine, others = world.site.session("hv-1"), world.site.session("hv-2")
    with pytest.raises(BusyError, match="is being recovered"):
        mine.adopt(primary.id, Adopt(primary.epoch, random_id()))
    assert mine.replica(primary.id).stopped is not None
    other.session = others
    assert other.cycle().head.point == 1
    go_on.set()
    primary.session = mine
    wait_until(lambda: mine.replica(primary.id).stopped is None)
    assert primary.cycle().head.point == 1
    wait_until(lambda: world.site.recovering == 0)


def test_a_stopped_replica_is_opened_anew(world: World, primary: Primary) -> None:
    primary.store.stopped = StorageFullError("no space")
    with pytest.raises(StorageFullError):
        primary.begin()
    assert primary.store.closed
    primary.store.stopped = None
    assert primary.cycle().head.point == 1


def test_a_replica_whose_state_is_unreadable_is_listed_as_stopped(world: World, primary: Primary) -> None:
    world.site.slot("hv-1", primary.id)
    world.stores.locked[primary.id] = DamageError("its state is damaged")
    world.site.close()
    world.open()
    (info,) = world.site.session("hv-1").replicas("web-1")
    assert (info.replica_id, info.machine, info.owner) == (primary.id, "web-1", "hv-1")
    assert info.stopped is not None
    assert info.stopped.detail == "its state is damaged"
    assert world.site.session("hv-2").replicas() == []


def test_an_enrolment_beside_an_unreadable_replica_is_logged(
    world: World, primary: Primary, caplog: pytest.LogCaptureFixture
) -> None:
    world.site.close()
    world.stores.broken[primary.id] = DamageError("damaged")
    world.open()
    world.primary("hv-1").enrol()
    assert f"replica {primary.id} cannot be read and may be of the same machine" in caplog.text


def test_a_commit_taken_up_at_the_start_rotates_as_well(
    world: World, primary: Primary, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(world.spec.retention.keep_last):
        primary.cycle()
    state = primary.begin()
    monkeypatch.setattr(MemoryStore, "finish", lambda *_: None)
    primary.store.tail, primary.store.received = tail_of(state), state.delta_id
    assert [s.point for s in primary.store.states] == [1, 2, 3]
    world.site.close()
    world.open()
    wait_until(lambda: [s.point for s in primary.store.states] == [2, 3, 4])


def test_a_storage_is_made_only_beside_what_is_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stores = FileStores(FileSystem())
    with pytest.raises(StorageError, match="nor is .*mnt"):
        stores.directories(tmp_path / "mnt" / "replicas")
    assert not (tmp_path / "mnt").exists()
    assert stores.directories(tmp_path / "replicas") == []
    assert "was not there and is made now" in caplog.text
    assert (tmp_path / "replicas").is_dir()


def test_too_many_nodes_of_a_tree_are_a_protocol_error(world: World, primary: Primary) -> None:
    for count in (0, 65537):
        with pytest.raises(ProtocolError, match="1 to 65536"):
            primary.session.tree(primary.id, DISK.id, 0, 0, count)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_replica_whose_identity_hangs_holds_up_nobody(
    world: World, primary: Primary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a list nor an enrolment of another waits for it: not for long the first time, and then not at all."""
    monkeypatch.setattr(site, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(slot, "PATIENCE_SECONDS", 0.2)
    other = world.primary("hv-2")
    other.enrol()
    world.site.close()
    go_on = threading.Event()
    open_store, reader = world.stores.open, world.stores.reader

    def hang(directory: Path) -> None:
        if directory.name == str(primary.id):
            assert go_on.wait(30)

    monkeypatch.setattr(world.stores, "open", lambda directory: (hang(directory), open_store(directory))[1])
    monkeypatch.setattr(world.stores, "reader", lambda directory: (hang(directory), reader(directory))[1])
    world.site = Site(FileSystem(), world.spec, stores=world.stores, clock=lambda: world.now, wait=False)
    try:
        others = world.site.session("hv-2")
        assert [info.machine for info in others.replicas()] == ["web-1"]
        started = time.monotonic()
        for _ in range(20):
            assert len(others.replicas()) == 1
        world.primary("hv-2", "web-2").enrol()
        assert time.monotonic() - started < 2
        with pytest.raises(BusyError):
            world.site.session("hv-1").replica(primary.id)
    finally:
        go_on.set()
    wait_until(lambda: [info.machine for info in world.site.session("hv-1").replicas()] == ["web-1"])


def test_a_storage_that_hangs_holds_up_neither_the_start_nor_the_other(
    world: World, primary: Primary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it answers nobody is told that a replica is not there: it may be just there."""
    monkeypatch.setattr(site, "FIND_SECONDS", 0.2)
    lab = world.primary("lab-1")
    lab.enrol()
    world.site.close()
    go_on = threading.Event()

    def directories(storage: Path) -> list[Path]:
        found = primary if storage == Path("/t1") else lab
        assert storage != Path("/t1") or go_on.wait(30)
        return [storage / str(found.id)]

    monkeypatch.setattr(world.stores, "directories", directories)
    world.open()
    try:
        lab.session, mine = world.site.session("lab-1"), world.site.session("hv-1")
        assert lab.cycle().head.point == 1
        for call in (
            lambda: mine.replica(primary.id),
            lambda: mine.replicas("web-1"),
            lambda: world.primary().enrol(),
        ):
            with pytest.raises(BusyError, match="does not answer yet"):
                call()
    finally:
        go_on.set()
    wait_until(lambda: len(world.site) == 2)
    wait_until(lambda: [info.replica_id for info in mine.replicas("web-1")] == [primary.id])
    primary.session = mine
    assert primary.cycle().head.point == 1


def test_an_enrolment_that_hangs_holds_up_no_other_identity_s(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "ENROL_SECONDS", 0.1)
    go_on, hangs = threading.Event(), threading.Event()
    create = world.stores.create

    def slow(storage: Path, who: Identity, key: DataKey, epoch: Epoch) -> MemoryStore:
        if who.owner == "hv-1":
            hangs.set()
            assert go_on.wait(30)
        return create(storage, who, key, epoch)

    monkeypatch.setattr(world.stores, "create", slow)
    first = threading.Thread(target=world.primary().enrol)
    first.start()
    try:
        assert hangs.wait(10)
        world.primary("hv-2").enrol()
        with pytest.raises(BusyError, match="another enrolment"):
            world.primary("hv-1", "web-2").enrol()
    finally:
        go_on.set()
        first.join()
    assert len(world.site) == 2


def test_an_identity_enrols_as_many_machines_as_its_entry_says(world: World, primary: Primary) -> None:
    world.spec = replace(world.spec, allow=[replace(entry, max_replicas=2) for entry in world.spec.allow])
    world.site.close()
    world.open()
    world.primary("hv-1", "web-2").enrol()
    with pytest.raises(ConflictError, match="has 2 replicas already"):
        world.primary("hv-1", "web-3").enrol()
    world.primary("hv-2", "web-1").enrol()
    primary.session = world.site.session("hv-1")
    primary.enrol()
