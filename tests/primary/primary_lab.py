"""A primary and a real replica site in one process, and a link between them that can be cut."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from replica.durable import FileSystem
from replica.model import State
from replica.primary.cycle import SyncResult, sync_machine
from replica.primary.spec import DiskSpec, MachineSpec, SenderSpec
from replica.receiver.site import AllowSpec, Site, SiteSpec, StorageSpec
from replica.store import Policy, ReplicaReader, replica_directories
from replica.transport.tls import TlsFiles

TLS = TlsFiles(Path("ca"), Path("cert"), Path("key"))
KiB, MiB = 1 << 10, 1 << 20


class Link:
    """`transport.api.Receiver`: the site's session, with a hook before and after every call, and a byte count."""

    def __init__(self, lab: Lab, identity: str) -> None:
        self.lab, self.identity = lab, identity
        self.calls: list[str] = []
        self.before: Callable[[str, tuple[Any, ...]], None] = lambda _name, _arguments: None
        self.after: Callable[[str, tuple[Any, ...]], None] = lambda _name, _arguments: None
        self.bytes_sent = 0

    def abort(self) -> None:
        """Nothing hangs in one process."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.calls.append(name)
            self.before(name, arguments)
            self.bytes_sent += 300 + sum(len(a) for a in arguments if isinstance(a, bytes))
            result = getattr(self.lab.site.session(self.identity), name)(*arguments, **options)
            self.after(name, arguments)
            return result

        return call


class Lab:
    """One machine with raw images, its sender, and a receiver."""

    def __init__(self, root: Path, sizes: dict[str, int]) -> None:
        self.root, self.fs = root, FileSystem()
        self.images = {name: root / f"{name}.raw" for name in sizes}
        self.data = {name: np.zeros(size, np.uint8) for name, size in sizes.items()}
        self.machine = MachineSpec(
            "web-1", "https://dr-1", tuple(DiskSpec(name, path) for name, path in self.images.items())
        )
        self.spec = SenderSpec("hv-1", root / "state", root / "keys", TLS, (self.machine,))
        self.rng = np.random.default_rng(7)
        for name, size in sizes.items():
            with self.images[name].open("wb") as file:
                file.truncate(size)
        self.storage = root / "replicas"
        self.site = self.open_site()

    def open_site(self) -> Site:
        storages = {"tier1": StorageSpec(name="tier1", path=self.storage, head="raw")}
        allow = [AllowSpec(primary="hv-*", storage="tier1", trust_group="prod")]
        return Site(self.fs, SiteSpec("127.0.0.1", 0, TLS, storages, allow, Policy(keep_last=1000)))

    def restart_site(self) -> None:
        self.site.close()
        self.site = self.open_site()

    def link(self, identity: str = "hv-1") -> Link:
        return Link(self, identity)

    # --- the guest ---

    def write(self, disk: str, offset: int, data: bytes | np.ndarray) -> None:
        array = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
        self.data[disk][offset : offset + len(array)] = array
        with self.images[disk].open("r+b") as file:
            file.seek(offset)
            file.write(array.tobytes())

    def scribble(self, disk: str, offset: int, length: int) -> None:
        self.write(disk, offset, self.rng.integers(1, 256, length, np.uint8))

    def discard(self, disk: str, offset: int, length: int) -> None:
        self.data[disk][offset : offset + length] = 0
        subprocess.run(
            ["fallocate", "--punch-hole", "-o", str(offset), "-l", str(length), str(self.images[disk])], check=True
        )

    # --- the engine ---

    def sync(self, link: Link | None = None, **options: Any) -> SyncResult:
        machine = options.pop("machine", self.machine)
        options.setdefault("retry_seconds", 5)
        return sync_machine(self.fs, self.spec, machine, link or self.link(), **options)

    def freezing(self, freeze: Any, thaw: Any, **options: Any) -> MachineSpec:
        return replace(self.machine, freeze=freeze, thaw=thaw, **options)

    def reader(self) -> ReplicaReader:
        (directory,) = replica_directories(self.fs, self.storage)
        return ReplicaReader(self.fs, directory)

    @property
    def head(self) -> State:
        return self.reader().head

    def content(self, point: int | None = None) -> dict[str, np.ndarray]:
        """Every disk as the replica would restore it."""
        with self.reader().open_point(point) as opened:
            found = {}
            for state in opened.state.disks:
                buffer = np.empty(state.disk.size_bytes, np.uint8)
                opened.read_into(state.disk.id, 0, buffer.data)
                found[state.disk.name] = buffer
            return found

    def assert_equal(self, point: int | None = None, data: dict[str, np.ndarray] | None = None) -> None:
        content = self.content(point)
        expected = self.data if data is None else data
        assert content.keys() == expected.keys()
        for name, array in expected.items():
            different = np.flatnonzero(content[name] != array)
            assert not len(different), f"disk {name!r} differs at {different[:5]}"

    def copy(self) -> dict[str, np.ndarray]:
        return {name: array.copy() for name, array in self.data.items()}
