"""Which replica an operator means."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest

from replica.cli.replicas import all_replicas, find_replica, full_name
from replica.delta import DataKey
from replica.durable import FileSystem
from replica.errors import FormatError, UnknownMachineError
from replica.model import Epoch, ReplicaId, random_id
from replica.receiver.spec import SiteSpec, StorageSpec
from replica.store import Identity, ReplicaStore
from replica.transport.tls import TlsFiles

FS = FileSystem()


@pytest.fixture
def spec(tmp_path: Path) -> SiteSpec:
    nowhere = TlsFiles(tmp_path / "no", tmp_path / "no", tmp_path / "no")
    storages = {name: StorageSpec(name, tmp_path / name) for name in ("fast", "slow")}
    return SiteSpec("", 0, nowhere, storages, [])


def enrol(spec: SiteSpec, storage: str, owner: str, machine: str) -> ReplicaId:
    replica_id = ReplicaId(random_id())
    identity = Identity(
        replica_id=replica_id, machine=machine, owner=owner, trust_group="", head_format="raw", created_at_ns=1
    )
    path = spec.storages[storage].path
    ReplicaStore.create(FS, path, identity, DataKey.generate(), Epoch(1, uuid4())).close()
    return replica_id


def found(spec: SiteSpec, name: str) -> ReplicaId:
    return find_replica(FS, spec, name).identity.replica_id


def test_by_name_by_owner_and_by_id(spec: SiteSpec) -> None:
    web = enrol(spec, "fast", "hv-1", "web-1")
    database = enrol(spec, "slow", "hv-1", "db-1")
    assert found(spec, "web-1") == web
    assert found(spec, "hv-1/db-1") == database
    assert found(spec, str(database)) == database


def test_an_ambiguous_name_lists_the_candidates(spec: SiteSpec) -> None:
    first, second = enrol(spec, "fast", "hv-1", "web-1"), enrol(spec, "slow", "hv-2", "web-1")
    with pytest.raises(UnknownMachineError) as caught:
        find_replica(FS, spec, "web-1")
    assert caught.value.exit_code == 3
    assert "2 replicas" in caught.value.message
    assert "hv-1/web-1, hv-2/web-1" in caught.value.hint
    assert found(spec, "hv-1/web-1") == first
    assert found(spec, "hv-2/web-1") == second


def test_where_the_owner_does_not_help_the_ids_do(spec: SiteSpec) -> None:
    first, second = enrol(spec, "fast", "hv-1", "web-1"), enrol(spec, "slow", "hv-1", "web-1")
    with pytest.raises(UnknownMachineError) as caught:
        find_replica(FS, spec, "hv-1/web-1")
    assert str(first) in caught.value.hint
    assert str(second) in caught.value.hint
    assert found(spec, str(first)) == first


def test_an_unknown_name_lists_what_there_is(spec: SiteSpec) -> None:
    with pytest.raises(UnknownMachineError, match="there is no replica yet"):
        find_replica(FS, spec, "web-1")
    enrol(spec, "fast", "hv-1", "web-1")
    with pytest.raises(UnknownMachineError, match=r"no replica of a machine 'web-2'; there is hv-1/web-1$"):
        find_replica(FS, spec, "web-2")


def test_an_unreadable_replica_hides_no_other(spec: SiteSpec) -> None:
    web, broken = enrol(spec, "fast", "hv-1", "web-1"), enrol(spec, "fast", "hv-1", "db-1")
    for name in ("replica.toml", "identity.copy"):
        (spec.storages["fast"].path / str(broken) / name).write_text("machine = ")
    readers, unreadable = all_replicas(FS, spec)
    assert [full_name(reader) for reader in readers] == ["hv-1/web-1"]
    assert [path.name for path, _ in unreadable] == [str(broken)]
    assert found(spec, "web-1") == web
    with pytest.raises(FormatError):
        find_replica(FS, spec, str(broken))
    with pytest.raises(UnknownMachineError, match="1 that cannot be read"):
        find_replica(FS, spec, "db-1")
