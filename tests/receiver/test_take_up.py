"""A delta that had arrived whole when the receiver was killed is committed by its next start, over the real store."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from replica.durable import FileSystem
from replica.receiver import slot
from replica.receiver.site import AllowSpec, Site, SiteSpec, StorageSpec
from replica.receiver.stores import FileStores, Store
from replica.store import ReplicaReader, ReplicaStore
from replica.transport.tls import TlsFiles
from tests.store.small_primary import SmallPrimary


def spec_of(storage: Path) -> SiteSpec:
    return SiteSpec(
        "127.0.0.1", 0, TlsFiles(storage, storage, storage), {"s": StorageSpec("s", storage, "raw")},
        (AllowSpec("hv-*", "s", "prod"),),
    )  # fmt: skip


def test_a_received_delta_is_committed_without_being_asked_for_again(fs: FileSystem, tmp_path: Path) -> None:
    primary = SmallPrimary({"os": 300_001})
    store = primary.enrol(fs, tmp_path)
    primary.scribble()
    made = primary.make()
    primary.send(store, made)
    store.close()

    with Site(fs, spec_of(tmp_path)) as site:
        session = site.session("hv-1")
        deadline = time.monotonic() + 30
        while (info := session.replica(primary.replica_id)).applying is not None:
            assert info.applying == made.delta_id and time.monotonic() < deadline
            time.sleep(0.01)
        assert info.head == made.result
        assert info.receiving is None


def test_while_it_is_opened_a_delta_that_arrived_whole_is_being_applied(
    fs: FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening commits it in a moment: a sender that took it for lost would start from a head that is none any more."""
    primary = SmallPrimary({"os": 300_001})
    store = primary.enrol(fs, tmp_path)
    primary.scribble()
    made = primary.make()
    primary.send(store, made)
    before = store.head
    store.close()
    monkeypatch.setattr(slot, "PATIENCE_SECONDS", 0.05)
    go_on = threading.Event()
    open_store = FileStores.open

    def slow(stores: FileStores, directory: Path) -> Store:
        assert go_on.wait(30)
        return open_store(stores, directory)

    monkeypatch.setattr(FileStores, "open", slow)
    with Site(fs, spec_of(tmp_path), wait=False) as site:
        session = site.session("hv-1")
        try:
            info = session.replica(primary.replica_id)
        finally:
            go_on.set()
        assert info.stopped is not None and "is being recovered" in info.stopped.detail
        assert (info.applying, info.receiving, info.head) == (made.delta_id, made.delta_id, before)
        deadline = time.monotonic() + 30
        while session.replica(primary.replica_id).head != made.result:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_delta_that_is_arriving_is_seen_beside_its_writer(fs: FileSystem, tmp_path: Path) -> None:
    primary = SmallPrimary({"os": 300_001})
    store = primary.enrol(fs, tmp_path)
    primary.scribble()
    made = primary.make()
    store.begin(made.delta_id, made.base.delta_id, primary.epoch, made.header)
    reader = ReplicaReader(fs, store.directory)
    assert (reader.receiving, reader.received) == (made.delta_id, None)
    store.close()


@pytest.mark.parametrize("state", [False, True])
def test_a_commit_that_ends_meanwhile_is_never_taken_for_a_delta_that_is_lost(
    fs: FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: bool
) -> None:
    """Whichever of the two looks at head and delta the commit's end falls between."""
    primary = SmallPrimary({"os": 300_001})
    primary.enrol(fs, tmp_path).close()
    with Site(fs, spec_of(tmp_path)) as site:
        place = site.slot("hv-1", primary.replica_id)
        store = place.store()
        assert isinstance(store, ReplicaStore)
        primary.scribble()
        made = primary.make()
        primary.send(store, made)
        look = ReplicaStore.head.fget if state else ReplicaStore.applying.fget  # type: ignore[attr-defined]

        def commits_after(one: ReplicaStore) -> object:
            found = look(one)
            monkeypatch.undo()
            one.commit(made.delta_id)
            return found

        monkeypatch.setattr(ReplicaStore, "head" if state else "applying", property(commits_after))
        info = place.info()
        assert made.delta_id in (info.applying, info.receiving, info.head.delta_id)
