"""Two sites on one machine: real processes, real certificates, loopback TCP.

    with Lab(tmp_path) as lab:
        lab.machine("web-1", {"os": image})
        lab.serve()
        entry = lab.sync("web-1")
        lab.restore("web-1", out)

A lab owns its directory and its port and nothing else, so labs run in parallel.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

READY_SECONDS = 30
COMMAND_SECONDS = 240
REPLICA = [sys.executable, "-m", "replica"]


def free_port() -> int:
    """A port nobody listens on now; the kernel does not hand it out again soon."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class CommandFailed(AssertionError):
    """A command ended with another exit code than the test expects."""


class Lab:
    """A receiver and a sender with their configurations under one directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.port = free_port()
        self.connect_port = self.port
        self.head = "raw"
        self.keep_last = 24
        self.part = "4GiB"
        self.storage = root / "replicas"
        self.machines: dict[str, dict[str, object]] = {}
        self.server: subprocess.Popen[bytes] | None = None
        self.log = root / "serve.log"
        self.state = "state/"
        self.keys = "keys/"
        self.run("pki", "init", root / "pki")
        self.run("pki", "issue", root / "pki", "dr-1", "--host", "localhost", "--host", "127.0.0.1")
        self.run("pki", "issue", root / "pki", "hv-1")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()
        log = self.log.read_text() if self.log.exists() else ""
        if kind is None:
            assert "Traceback" not in log, log
        elif log:
            sys.stderr.write(f"--- log of serve ---\n{log}\n")

    # Configuration

    def machine(self, name: str, disks: dict[str, Path], **keys: object) -> None:
        """Declare (or declare anew) a machine of the sender; `keys` are further keys of its table."""
        self.machines[name] = {"disks": disks, **keys}

    @property
    def sender(self) -> Path:
        return self.write_sender("sender.toml", "hv-1")

    def write_sender(self, file: str, identity: str, *, state: str = "", keys: str = "", pki: str = "pki") -> Path:
        lines = [
            f'name = "{identity}"',
            f'state = "{state or self.state}"',
            f'keys = "{keys or self.keys}"',
            f'part = "{self.part}"',
            f'[tls]\nca = "{pki}/ca.crt"\ncert = "{pki}/{identity}.crt"\nkey = "{pki}/{identity}.key"',
        ]
        for name, table in self.machines.items():
            further = {"every": "1s", "to": f"https://127.0.0.1:{self.connect_port}"} | table
            disks = further.pop("disks")
            assert isinstance(disks, dict)
            lines.append(f'[[machine]]\nname = "{name}"')
            lines += [f"{key} = {json.dumps(value)}" for key, value in further.items()]
            lines += [f'[[machine.disk]]\nname = "{d}"\nimage = "{path}"' for d, path in disks.items()]
        path = self.root / file
        path.write_text("\n".join(lines) + "\n")
        return path

    @property
    def receiver(self) -> Path:
        path = self.root / "receiver.toml"
        path.write_text(
            f'listen = "127.0.0.1:{self.port}"\n'
            '[tls]\nca = "pki/ca.crt"\ncert = "pki/dr-1.crt"\nkey = "pki/dr-1.key"\n'
            f'[[storage]]\nname = "tier1"\npath = "{self.storage}"\nhead = "{self.head}"\n'
            '[[allow]]\nprimary = "hv-*"\nstorage = "tier1"\ntrust_group = "prod"\n'
            f"[retention]\nkeep_last = {self.keep_last}\nhourly = 0\n"
        )
        return path

    # Commands

    def run(self, *args: object, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run `replica …`; the exit code must be `code` (None: any). No command may ever show a traceback."""
        done = subprocess.run(
            [*REPLICA, *map(str, args)], capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
        )
        if "Traceback" in done.stderr or (code is not None and done.returncode != code):
            command = " ".join(map(str, args))
            raise CommandFailed(f"`replica {command}` ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done

    def json(self, *args: object, code: int | None = 0) -> Any:
        """Run with --json; standard output must hold one document and nothing else."""
        return json.loads(self.run(*args, "--json", code=code).stdout)

    def popen(self, *args: object) -> subprocess.Popen[str]:
        return subprocess.Popen([*REPLICA, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def sync(self, machine: str = "web-1") -> dict[str, Any]:
        """One cycle that must succeed; its JSON entry."""
        (entry,) = self.json("sync", machine, "-c", self.sender)
        assert entry["machine"] == machine
        return dict(entry)

    def points(self, machine: str = "web-1") -> list[dict[str, Any]]:
        return list(self.json("points", machine, "-c", self.receiver))

    def restore(self, target: Path, machine: str = "web-1", point: int | None = None, *more: str) -> dict[str, Path]:
        """Restore a point that must be restorable; disk -> file."""
        which = [] if point is None else ["--point", point]
        done = self.json("restore", machine, *which, "--to", target, *more, "-c", self.receiver)
        assert point in (None, done["point"])
        return {disk: Path(path) for disk, path in done["files"].items()}

    # The receiver's process

    def serve(self) -> None:
        """Start the receiver and wait until it answers."""
        assert self.server is None
        with self.log.open("ab") as log:
            self.server = subprocess.Popen([*REPLICA, "serve", "-c", str(self.receiver)], stdout=log, stderr=log)
        deadline = time.monotonic() + READY_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                if self.server.poll() is not None or time.monotonic() > deadline:
                    raise CommandFailed(f"serve did not start:\n{self.log.read_text()}") from None
                time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL: what a power cut looks like to the process."""
        if self.server is not None:
            self.server.send_signal(signal.SIGKILL)
            self.server.wait()
            self.server = None

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        assert self.server is not None
        self.server.send_signal(signal.SIGTERM)
        code = self.server.wait(READY_SECONDS)
        self.server = None
        return code

    def replica_directories(self) -> list[Path]:
        return sorted(path for path in self.storage.iterdir() if path.is_dir())


def peak_bytes(pid: int) -> int:
    """The peak resident set of a living process (VmHWM), 0 once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), "VmHWM: 0 kB")
    return int(line.split()[1]) * 1024
