"""A replica site and a sender for a benchmark: the real processes, over loopback, and their peak memory."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPLICA = [sys.executable, "-m", "replica"]


class Lab:
    """PKI, configuration, a running receiver; `sync` runs one sender process."""

    def __init__(self, directory: Path, image: Path) -> None:
        self.directory = directory
        self.sender_peak_bytes = 0
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        pki = directory / "pki"
        self._run("pki", "init", str(pki))
        self._run("pki", "issue", str(pki), "dr-1", "--host", "127.0.0.1", "--host", "localhost")
        self._run("pki", "issue", str(pki), "hv-1")
        (directory / "receiver.toml").write_text(
            f'listen = "127.0.0.1:{port}"\n[tls]\nca = "pki/ca.crt"\ncert = "pki/dr-1.crt"\nkey = "pki/dr-1.key"\n'
            '[[storage]]\nname = "bench"\npath = "replicas/"\n[[allow]]\nprimary = "hv-*"\nstorage = "bench"\n'
            'trust_group = "bench"\n'
        )
        (directory / "sender.toml").write_text(
            'name = "hv-1"\nstate = "state/"\n[tls]\nca = "pki/ca.crt"\ncert = "pki/hv-1.crt"\nkey = "pki/hv-1.key"\n'
            f'[[machine]]\nname = "web-1"\nto = "https://127.0.0.1:{port}"\nevery = "1h"\n'
            f'[[machine.disk]]\nname = "os"\nimage = "{image}"\nformat = "raw"\n'
        )
        self._log = (directory / "receiver.log").open("wb")
        self._receiver = subprocess.Popen([*REPLICA, "serve", "-c", str(directory / "receiver.toml")], stderr=self._log)
        self._wait_for(port)

    def _wait_for(self, port: int) -> None:
        for _ in range(200):
            if self._receiver.poll() is not None:
                raise SystemExit(f"the receiver ended: {(self.directory / 'receiver.log').read_text()}")
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
            except OSError:
                time.sleep(0.05)
            else:
                return
        raise SystemExit("the receiver does not listen")

    def _run(self, *arguments: str) -> str:
        done = subprocess.run([*REPLICA, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"replica {' '.join(arguments)} failed: {done.stderr}")
        return done.stdout

    def sync(self) -> tuple[dict[str, Any], float]:
        """One `replica sync --json` as a fresh process: its result and the wall time of the whole process."""
        began = time.perf_counter()
        process = subprocess.Popen(
            [*REPLICA, "sync", "web-1", "-c", str(self.directory / "sender.toml"), "--json"], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
        if status:
            raise SystemExit("sync failed")
        self.sender_peak_bytes = max(self.sender_peak_bytes, usage.ru_maxrss * 1024)
        result: dict[str, Any] = json.loads(output)[0]
        return result, time.perf_counter() - began

    def receiver_peak_bytes(self) -> int:
        for line in Path(f"/proc/{self._receiver.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return 0

    def close(self) -> None:
        self._receiver.terminate()
        self._receiver.wait(60)
        self._log.close()
