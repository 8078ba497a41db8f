"""One CA, and one receiver over stores in memory, for all tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from replica.durable import FileSystem
from replica.receiver.site import Site
from tests.receiver.loopback import Loopback, Pki, site_spec
from tests.receiver.memory_stores import MemoryStores


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("module") / "pki")


@pytest.fixture(scope="module")
def server(pki: Pki, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    spec = site_spec(tmp_path_factory.mktemp("storage"), pki.files("dr-1", ("localhost", "127.0.0.1")))
    with Loopback(spec, lambda: Site(FileSystem(), spec, stores=MemoryStores())) as running:
        yield running
