"""How fast sealed segments move from a sender's process to a receiver's, over TLS: no scan, no sealing, no commit.

    segments_seconds(directory, size_bytes)

The sender is this module run as a program, one process like the receiver: it seals a segment of noise ahead of time,
and ships it again and again under new numbers through the same `Shipment` that a cycle uses. The receiver stores
into memory (/dev/shm) where there is room, so that TLS and HTTP are measured and not its disk.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from bench.site import Lab
from bench.tls import Certificates
from replica.delta import DataKey, DeltaSealer, Segment
from replica.delta.extents import rows_of_grains
from replica.durable import FileSystem
from replica.model import DeltaId, Epoch, ReplicaId, random_id
from replica.primary.retry import Patience
from replica.primary.shipment import Shipment
from replica.transport.client import HttpReceiver
from replica.transport.tls import TlsFiles
from replica.transport.wire import Enrol

AHEAD_BYTES = 12 << 20
"""How much waits in the spool: below what it keeps in memory."""


def segments_seconds(directory: Path, size: int) -> float:
    """Seconds for `size` bytes of segments, until the receiver has acknowledged the last one."""
    with tempfile.TemporaryDirectory(prefix="replica-bench-", dir=_memory(size) or directory) as storage:
        with Lab(directory / "wire", directory / "none.raw", storage=Path(storage)) as lab:
            command = [sys.executable, "-m", "bench.wire", str(lab.port), str(lab.certificates.directory), str(size)]
            process = lab.senders.start(command, stdout=subprocess.PIPE)
            output, _ = process.communicate()
            if process.returncode:
                raise SystemExit(f"{' '.join(command)} failed")
        shutil.rmtree(directory / "wire")
    return float(output)


def _memory(size: int) -> Path | None:
    shared = Path("/dev/shm")
    enough = shared.is_dir() and shutil.disk_usage(shared).free > 2 * size + (512 << 20)
    return shared if enough else None


def _send(port: int, certificates: Certificates, size: int) -> float:
    key, replica, epoch, delta = DataKey.generate(), ReplicaId(random_id()), Epoch(1, random_id()), DeltaId(random_id())
    tls = TlsFiles(certificates.ca, certificates.client, certificates.client_key)
    receiver = HttpReceiver(f"https://127.0.0.1:{port}", tls)
    info = receiver.enrol(replica, Enrol("web-1", key.id, key.secret, epoch))
    sealer = DeltaSealer(key, replica, delta, epoch)
    grains = 1024
    rows = rows_of_grains(np.arange(grains, dtype=np.uint64), np.ones(grains, np.bool_))
    first = sealer.seal(Segment(0, rows, os.urandom(grains << 12)))
    with Shipment(
        FileSystem(), Path(tempfile.gettempdir()), receiver, sealer, delta, info.head, epoch, Patience(10.0)
    ) as shipment:
        began = time.perf_counter()
        shipment.begin()
        for number in range(-(-size // len(first.blob))):
            shipment.put(replace(first, number=number, first=number * grains, last=(number + 1) * grains - 1))
            while shipment.waiting_bytes > AHEAD_BYTES:
                time.sleep(0.0005)
        shipment.wait_sent()
        seconds = time.perf_counter() - began
    receiver.close()
    return seconds


if __name__ == "__main__":
    print(_send(int(sys.argv[1]), Certificates(Path(sys.argv[2])), int(sys.argv[3])))
