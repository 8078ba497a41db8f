"""The receiver as a process, over real stores: signals, restart, and what another process holds."""

from __future__ import annotations

import logging
import re
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from replica.durable import FileSystem
from replica.receiver.site import Site
from replica.transport.client import HttpReceiver
from replica.transport.wire import Begin, Enrol
from tests.receiver.loopback import Loopback, Pki, site_spec
from tests.store.small_primary import SmallPrimary

PROGRAM = """
import logging, sys
from pathlib import Path
from replica.receiver.server import serve
from tests.receiver.loopback import Pki, site_spec
from replica.transport.tls import TlsFiles
logging.basicConfig(level=logging.INFO)
pki = Path(sys.argv[1])
serve(site_spec(Path(sys.argv[2]), TlsFiles(pki / "ca.crt", pki / "dr-1.crt", pki / "dr-1.key")))
"""


class Process:
    """`serve` in a process of its own; `url` once it is ready."""

    def __init__(self, pki: Pki, storage: Path) -> None:
        pki.files("dr-1", ("localhost", "127.0.0.1"))
        command = [sys.executable, "-c", PROGRAM, str(pki.directory), str(storage)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.lines = []
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"ready: listening on (https://127.0.0.1:\d+)", line):
                self.url = found[1]
                break

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        _, rest = self.process.communicate(timeout=30)
        self.lines.append(rest)
        return self.process.returncode


def sync(url: str, pki: Pki, primary: SmallPrimary) -> None:
    with closing(HttpReceiver(url, pki.files("hv-1"))) as receiver:
        receiver.enrol(primary.replica_id, Enrol("web-1", primary.key.id, primary.key.secret, primary.epoch))
        primary.scribble()
        made = primary.make()
        receiver.begin(primary.replica_id, made.delta_id, Begin(made.base.delta_id, primary.epoch, made.header))
        for segment in made.segments:
            receiver.put_segment(primary.replica_id, made.delta_id, *segment)
        done = receiver.commit(primary.replica_id, made.delta_id, made.tail, made.tail_offset, 30)
        assert done is not None
        assert done.head == made.result
        primary.acknowledge(made)
        for point, copy in primary.copies.items():
            for name, disk_id in primary.ids.items():
                assert b"".join(receiver.read(primary.replica_id, point, disk_id)) == copy[name]


def test_signals_end_it_in_order_and_the_next_start_has_everything(pki: Pki, tmp_path: Path) -> None:
    primary = SmallPrimary({"os": 500_000})
    for number, code in ((signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGKILL, -signal.SIGKILL)):
        process = Process(pki, tmp_path)
        sync(process.url, pki, primary)
        assert process.end(number) == code
        log = "".join(process.lines)
        assert ("ended" in log) is (code == 0)
        assert "Traceback" not in log
        assert f"replica {primary.replica_id} (web-1): committed point {len(primary.copies)}" in log
    assert len(primary.copies) == 3


def test_a_second_receiver_on_the_same_storage_harms_nothing(
    pki: Pki, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    primary = SmallPrimary({"os": 500_000})
    process = Process(pki, tmp_path)
    sync(process.url, pki, primary)
    spec = site_spec(tmp_path, pki.files("dr-1"))
    with caplog.at_level(logging.ERROR), Loopback(spec, lambda: Site(FileSystem(), spec)) as second:
        assert "is in use by another process" in caplog.text
        with closing(second.client(pki.files("hv-1"))) as receiver:
            info = receiver.replica(primary.replica_id)
            assert info.stopped is not None
            assert info.head == primary.state
        sync(process.url, pki, primary)
        process.end(signal.SIGTERM)
        sync(second.url, pki, primary)
