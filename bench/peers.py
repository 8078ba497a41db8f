"""Others doing the same: each driven through its own commands, over TLS, until the target is durable.

    with Btrfs(directory, image, certificates) as peer:
        peer.first_copy()                 # into an empty target
        change(peer.image, "grains", 7)
        peer.ship()                       # what has changed since

| peer | what runs | durable by |
| --- | --- | --- |
| `btrfs` | `btrfs send [-p]` \\| `zstd -1` \\| `openssl s_client` → `openssl s_server` \\| `zstd -d` \\| `btrfs receive`, between two loop-mounted file systems; from the snapshot on | `btrfs filesystem sync` of the target |
| `nbdcopy` | `nbdcopy` → `nbdkit file`, TLS with certificates on both sides | `--flush` (fdatasync of the target) |
| `rsync` | `rsync --inplace --no-whole-file` over `openssl s_client` → `stunnel` → `rsync --daemon` | `--fsync` |
| `borg`, `restic` | a backup into a repository on the same disk, encrypted: **no network at all**, which is in their favour | their own fsyncs |

rsync's wire bytes are those of its own `--stats`, before TLS: it puts its connection program behind a TCP connection
over loopback, so that the interface counts most bytes three times. The others' are the interface's.

Each target is compared with its source at the end. Servers are started before the clock is; snapshots that are not
needed any more go when it has stopped. Loop devices need root.
"""  # noqa: E501

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from bench.measure import Cost, Group, free_port, pipeline, wait_all, wait_listening
from bench.tls import Certificates, listen


class Peer:
    """What all have in common. `commands`: what ran last, as a shell would have it; `image`: whose changes it ships."""

    name = ""
    needs: tuple[str, ...] = ()
    ships_changes = True
    """Whether it knows or finds what changed; otherwise `ship` copies everything."""
    versions: tuple[tuple[str, ...], ...] = ()

    def __init__(self, directory: Path, image: Path, certificates: Certificates) -> None:
        self.directory, self.image, self.certificates = directory, image, certificates
        self.commands: list[str] = []
        self._stack = ExitStack()
        directory.mkdir()
        try:
            self._prepare()
        except BaseException:
            self._stack.close()
            raise

    @classmethod
    def missing(cls) -> str:
        """Why it cannot be measured here; empty if it can."""
        absent = [command for command in cls.needs if not shutil.which(command)]
        return f"not installed: {', '.join(absent)}" if absent else ""

    def version(self) -> str:
        return "; ".join(_first_line(command) for command in self.versions)

    def first_copy(self) -> Cost:
        raise NotImplementedError

    def ship(self) -> Cost:
        raise NotImplementedError

    def target(self) -> Path | None:
        """A file that must equal `image` after each transfer."""
        return None

    def check(self) -> None:
        """SystemExit unless the target is the image."""
        target = self.target()
        if target is not None and subprocess.run(["cmp", "-s", self.image, target], check=False).returncode:
            raise SystemExit(f"{self.name}: {target} is not {self.image}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def _prepare(self) -> None:
        """Whatever comes before the first transfer."""

    def _note(self, *commands: Sequence[object]) -> None:
        self.commands = [self._short(shlex.join(map(str, command))) for command in commands]

    def _short(self, command: str) -> str:
        return command.replace(f"{self.directory}/", "").replace(f"{self.certificates.directory}/", "pki/")


class Btrfs(Peer):
    name = "btrfs"
    needs = ("btrfs", "mkfs.btrfs", "zstd", "openssl", "mount")
    versions = (("btrfs", "--version"), ("zstd", "--version"), ("openssl", "version"))

    @classmethod
    def missing(cls) -> str:
        if os.geteuid():
            return "loop mounts need root"
        if "btrfs" not in Path("/proc/filesystems").read_text():
            return "this kernel has no btrfs"
        return super().missing()

    def _prepare(self) -> None:
        size = self.image.stat().st_size
        self._source, self._target = self.directory / "source", self.directory / "target"
        for mount in (self._source, self._target):
            self._mount(mount, 4 * size + (2 << 30))
        _run("btrfs", "subvolume", "create", self._source / "vm")
        (self._source / "points").mkdir()
        copy = self._source / "vm" / "disk.raw"
        _run("cp", self.image, copy)
        _run("sync", "-f", self._source)
        self.image, self._point = copy, 0

    def _mount(self, mount: Path, size: int) -> None:
        device = mount.with_suffix(".img")
        with device.open("wb") as file:
            os.truncate(file.fileno(), size)
        _run("mkfs.btrfs", "-q", device)
        mount.mkdir()
        _run("mount", "-o", "loop,noatime", device, mount)
        self._stack.callback(_run, "umount", mount)

    def first_copy(self) -> Cost:
        self._forget(self._point)
        return self._send(None)

    def ship(self) -> Cost:
        before = self._point
        cost = self._send(before)
        self._forget(before)
        return cost

    def target(self) -> Path:
        return self._target / str(self._point) / "disk.raw"

    def _send(self, parent: int | None) -> Cost:
        self._point += 1
        snapshot = self._source / "points" / str(self._point)
        freeze = ["btrfs", "-q", "subvolume", "snapshot", "-r", self._source / "vm", snapshot]
        since = [] if parent is None else ["-p", self._source / "points" / str(parent)]
        send = ["btrfs", "-q", "send", *since, snapshot]
        with Group(self.name) as group:
            port, server = listen(group, self.certificates, subprocess.PIPE)
            receive = [["zstd", "-d", "-q", "-c"], ["btrfs", "-q", "receive", self._target]]
            receiver = pipeline(group, receive, stdin=server.stdout)
            assert server.stdout is not None
            server.stdout.close()
            sender = [send, ["zstd", "-1", "-q", "-c"], self.certificates.openssl_client(port)]
            sync = ["btrfs", "filesystem", "sync", self._target]
            with group.measured() as cost:
                group.run(freeze)
                wait_all(pipeline(group, sender, stderr=subprocess.DEVNULL))
                wait_all([server, *receiver])
                group.run(sync, stdout=subprocess.DEVNULL)
        self._note(freeze, *sender, self.certificates.openssl_server(port), *receive, sync)
        return cost

    def _forget(self, point: int) -> None:
        for snapshot in (self._source / "points" / str(point), self._target / str(point)):
            if snapshot.exists():
                _run("btrfs", "subvolume", "delete", "-c", snapshot)
        for mount in (self._source, self._target):
            _run("btrfs", "subvolume", "sync", mount)


class Nbdcopy(Peer):
    name = "nbdcopy"
    needs = ("nbdcopy", "nbdkit")
    ships_changes = False
    versions = (("nbdcopy", "--version"), ("nbdkit", "--version"))

    def _prepare(self) -> None:
        self._keys = self.directory / "tls"
        self._keys.mkdir()
        mine = self.certificates
        for name, path in (
            ("ca-cert.pem", mine.ca), ("server-cert.pem", mine.server), ("server-key.pem", mine.server_key),
            ("client-cert.pem", mine.client), ("client-key.pem", mine.client_key),
        ):  # fmt: skip
            (self._keys / name).symlink_to(path.absolute())
        self._path = self.directory / "disk.raw"

    def first_copy(self) -> Cost:
        self._path.unlink(missing_ok=True)
        with self._path.open("wb") as file:
            os.truncate(file.fileno(), self.image.stat().st_size)
        return self._copy("--destination-is-zero")

    def ship(self) -> Cost:
        return self._copy()

    def target(self) -> Path:
        return self._path

    def _copy(self, *options: str) -> Cost:
        port = free_port()
        serve = [
            "nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), "--tls=require", f"--tls-certificates={self._keys}",
            "--tls-verify-peer", "file", self._path,
        ]  # fmt: skip
        uri = f"nbds://127.0.0.1:{port}/?tls-certificates={self._keys}"
        copy = ["nbdcopy", "--flush", *options, self.image, uri]
        with Group(self.name) as group:
            wait_listening(port, group.start(serve))
            with group.measured() as cost:
                group.run(copy)
        self._note(serve, copy)
        return cost


class Rsync(Peer):
    name = "rsync"
    needs = ("rsync", "stunnel", "openssl")
    versions = (("rsync", "--version"), ("openssl", "version"))

    def _prepare(self) -> None:
        self._path = self.directory / "to" / self.image.name
        self._path.parent.mkdir()
        self._port, mine = free_port(), self.certificates
        daemon = self.directory / "rsyncd.conf"
        daemon.write_text(
            f"uid = root\ngid = root\nuse chroot = no\n[to]\npath = {self._path.parent}\nread only = no\n"
        )
        stunnel = self.directory / "stunnel.conf"
        stunnel.write_text(
            f"foreground = yes\npid =\ndebug = 3\n[rsync]\naccept = 127.0.0.1:{self._port}\nsslVersionMin = TLSv1.3\n"
            f"cert = {mine.server}\nkey = {mine.server_key}\nCAfile = {mine.ca}\nverifyChain = yes\nrequireCert = yes\n"
            f"exec = {shutil.which('rsync')}\nexecArgs = rsync --daemon --config={daemon}\n"
        )
        self._serve = ["stunnel", stunnel]
        self._run = [
            "rsync", "--inplace", "--no-whole-file", "--sparse", "--times", "--fsync", "--stats", self.image, "rsync://127.0.0.1/to/"
        ]  # fmt: skip

    def first_copy(self) -> Cost:
        self._path.unlink(missing_ok=True)
        return self.ship()

    def ship(self) -> Cost:
        tunnel = shlex.join(self.certificates.openssl_client(self._port))
        with Group(self.name) as group:
            wait_listening(self._port, group.start(self._serve))
            with group.measured() as cost:
                process = group.start(
                    self._run,
                    env={**os.environ, "RSYNC_CONNECT_PROG": tunnel},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
                said, errors = process.communicate()
        if process.returncode:
            raise SystemExit(f"rsync failed: {errors.decode(errors='replace').strip()}")
        totals = re.findall(r"^Total bytes (?:sent|received): ([\d,]+)$", said.decode(), re.MULTILINE)
        cost.wire_bytes = sum(int(total.replace(",", "")) for total in totals)
        self._note(self._serve, [f"RSYNC_CONNECT_PROG={tunnel}"], self._run)
        return cost

    def target(self) -> Path:
        return self._path


class _Repository(Peer):
    """A backup program with a repository on the same disk."""

    def first_copy(self) -> Cost:
        shutil.rmtree(self.directory / "repository", ignore_errors=True)
        subprocess.run(
            self._init(), check=True, env=self._environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        return self.ship()

    def ship(self) -> Cost:
        backup = self._backup()
        with Group(self.name) as group, group.measured() as cost:
            group.run(backup, env=self._environment(), stdout=subprocess.DEVNULL)
        self._note(self._init(), backup)
        return cost

    def _environment(self) -> dict[str, str]:
        own = {"BORG_BASE_DIR": str(self.directory / "base"), "RESTIC_CACHE_DIR": str(self.directory / "cache")}
        return {**os.environ, **own, "BORG_PASSPHRASE": "bench", "RESTIC_PASSWORD": "bench"}

    def _init(self) -> list[str]:
        raise NotImplementedError

    def _backup(self) -> list[str]:
        raise NotImplementedError


class Borg(_Repository):
    name = "borg"
    needs = ("borg",)
    versions = (("borg", "--version"),)

    def _init(self) -> list[str]:
        return ["borg", "init", "--encryption=repokey-blake2", str(self.directory / "repository")]

    def _backup(self) -> list[str]:
        archive = f"{self.directory / 'repository'}::{{now:%Y%m%dT%H%M%S.%f}}"
        return ["borg", "create", "--compression=zstd,1", "--sparse", archive, str(self.image)]


class Restic(_Repository):
    name = "restic"
    needs = ("restic",)
    versions = (("restic", "version"),)

    def _init(self) -> list[str]:
        return ["restic", "--repo", str(self.directory / "repository"), "init"]

    def _backup(self) -> list[str]:
        return ["restic", "--repo", str(self.directory / "repository"), "backup", str(self.image)]


PEERS: dict[str, type[Peer]] = {peer.name: peer for peer in (Btrfs, Nbdcopy, Rsync, Borg, Restic)}


def _run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{shlex.join(map(str, command))} failed: {done.stderr.strip()}")


def _first_line(command: tuple[str, ...]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout or done.stderr).strip().split("\n", 1)[0]
