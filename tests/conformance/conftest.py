"""Every way to a replica site: a session inside the process, and HTTPS on a loopback port."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest

from replica.durable import FileSystem
from replica.receiver.site import Site
from replica.transport.api import PointSource, Receiver
from tests.receiver.loopback import Loopback, Pki, site_spec
from tests.store.small_primary import SmallPrimary


class Both(Receiver, PointSource, Protocol):
    """What a transport offers."""


@dataclass
class Way:
    """A site with real stores, and how an identity talks to it. `clock` is the site's, in seconds."""

    name: str
    connect: Callable[[str], Both]
    clock: list[float]
    storage: Path

    def primary(self, sizes: dict[str, int] | None = None, seed: int = 1) -> SmallPrimary:
        return SmallPrimary(sizes or {"os": 1_000_000, "data": 300_001}, seed)


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("conformance") / "pki")


@pytest.fixture(params=["session", "https"])
def way(request: pytest.FixtureRequest, pki: Pki, tmp_path: Path) -> Iterator[Way]:
    spec = site_spec(tmp_path / "storage", pki.files("dr-1", ("localhost",)), keep_last=5)
    clock = [1000.0]

    def open_site() -> Site:
        return Site(FileSystem(), spec, clock=lambda: clock[0])

    if request.param == "session":
        with open_site() as site:
            yield Way("session", site.session, clock, tmp_path / "storage")
        return
    opened: list[Both] = []

    def connect(identity: str) -> Both:
        opened.append(server.client(pki.files(identity)))
        return opened[-1]

    with Loopback(spec, open_site) as server:
        yield Way("https", connect, clock, tmp_path / "storage")
        for receiver in opened:
            receiver.close()
