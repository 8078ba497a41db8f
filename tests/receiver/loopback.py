"""A real receiver in a thread of this process, on a loopback port, with a private CA of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from replica.receiver.server import serve_until
from replica.receiver.site import AllowSpec, Site, SiteSpec, StorageSpec
from replica.store import Policy
from replica.transport import pki
from replica.transport.client import HttpReceiver
from replica.transport.tls import TlsFiles


class Pki:
    """A CA directory; certificates are issued when they are first asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        pki.init(directory)

    def files(self, name: str, hosts: tuple[str, ...] = ()) -> TlsFiles:
        if not (self.directory / f"{name}.crt").exists():
            pki.issue(self.directory, name, hosts)
        return TlsFiles(self.directory / "ca.crt", self.directory / f"{name}.crt", self.directory / f"{name}.key")


def site_spec(storage: Path, tls: TlsFiles, *, keep_last: int = 24) -> SiteSpec:
    return SiteSpec(
        listen_host="127.0.0.1",
        listen_port=0,
        tls=tls,
        storages={"tier1": StorageSpec("tier1", storage)},
        allow=[AllowSpec("hv-*", "tier1", "prod")],
        retention=Policy(keep_last=keep_last, hourly=0),
    )


class Loopback:
    """`with Loopback(spec, lambda: site) as server:` serves until the block ends."""

    def __init__(self, spec: SiteSpec, open_site: Callable[[], Site]) -> None:
        self.spec = spec
        self.port = 0
        self.error: BaseException | None = None
        self._open_site = open_site
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="loopback", daemon=True)

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    def client(self, files: TlsFiles) -> HttpReceiver:
        return HttpReceiver(self.url, files)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(30)
        if self.error is not None:
            raise self.error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Ask it to end, and wait for that."""
        self.ask_to_stop()
        self._thread.join(90)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error

    def ask_to_stop(self) -> None:
        if self._loop is not None and self._stop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # noqa: BLE001  # handed to the test's thread
            self.error = error
            self._ready.set()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()

        def ready(_host: str, port: int) -> None:
            self.port = port
            self._ready.set()

        await serve_until(self.spec, self._open_site, self._stop, ready)
