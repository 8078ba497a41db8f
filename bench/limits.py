"""What this machine can do, stage by stage: the ceilings that a cycle is held against.

    python -m bench.limits [--json FILE] [--size-mib 512] [--runs 3] [--dir DIR]

Every figure is the best of `--runs`, since a ceiling is what is asked for, on
data far larger than the caches: memory read, `pread` of a file in the page
cache, XXH3, BLAKE3, zstd on the compressible and on the random part of the
benchmark's image, AES-256-GCM, TCP and TLS between two processes over
loopback, and write + fsync into the working directory. Rates are in bytes of
content, 10^6 a MB.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstandard
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from bench.measure import Group, isolate, say
from bench.tls import Certificates, listen
from bench.workload import MIB, content

PIECE = 256 << 10
SEALED = 32 << 10
"""Bytes per AES-GCM call: what one chunk of a segment has."""
THREADS = (1, 2)
ZSTD_LEVELS = (-5, -1, 1, 3)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.limits", description=__doc__.splitlines()[0])
    parser.add_argument("--size-mib", type=int, default=512, help="bytes that each stage works on (default 512)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each, the best counts (default 3)")
    parser.add_argument("--json", type=Path, help="write the figures there as JSON, too")
    parser.add_argument("--dir", type=Path, help="where to work (default: a temporary directory)")
    options = parser.parse_args()
    isolate()
    with tempfile.TemporaryDirectory(prefix="replica-bench-", dir=options.dir) as directory:
        figures = measure(Path(directory), options.size_mib * MIB, options.runs)
    report(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def measure(directory: Path, size: int, runs: int) -> dict[str, Any]:
    """Every ceiling, in bytes a second by name; `fsync_4k_seconds` is a time."""
    limits = Limits(directory, size, runs)
    rates: dict[str, float] = {}
    for stage in (limits.memory, limits.pread, limits.hashes, limits.zstd, limits.aes, limits.loopback, limits.write):
        say(f"limits: {stage.__name__}")
        rates.update(stage())
    ratios = {name: rates.pop(name) for name in list(rates) if name.endswith("ratio")}
    latency = rates.pop("fsync_4k_seconds")
    machine = {
        "cpus": os.cpu_count(), "architecture": platform.machine(), "python": platform.python_version(),
        "kernel": platform.release(), "openssl": _openssl_version(), "load": os.getloadavg()[0],
    }  # fmt: skip
    return {
        "machine": machine, "size_bytes": size, "bytes_per_second": rates, "ratios": ratios,
        "fsync_4k_seconds": latency,
    }  # fmt: skip


class Limits:
    """The stages, one method each: name -> bytes a second."""

    def __init__(self, directory: Path, size: int, runs: int) -> None:
        self._directory, self._size, self._runs = directory, size, runs
        generator = np.random.default_rng(7)
        self._random = np.frombuffer(generator.bytes(size), np.uint8)
        self._text = content("text", min(size, 64 * MIB), generator)

    def memory(self) -> dict[str, float]:
        return {f"memory_read_{n}": self._threads(self._random, n, np.max) for n in THREADS}

    def pread(self) -> dict[str, float]:
        path = self._directory / "pread"
        path.write_bytes(self._random)
        rates = {f"pread_{n}": self._size / self._best(lambda n=n: pread_all(path, n)) for n in THREADS}
        path.unlink()
        return rates

    def hashes(self) -> dict[str, float]:
        rates = {f"xxh3_{n}": self._threads(self._random, n, xxhash.xxh3_64_digest) for n in THREADS}
        for n in THREADS:
            rates[f"blake3_{n}"] = self._size / self._best(lambda n=n: blake3(self._random, max_threads=n).digest())
        return rates

    def zstd(self) -> dict[str, float]:
        """On pieces of 128 KiB, as a segment's chunks are."""
        rates: dict[str, float] = {}
        for kind, data in (("text", memoryview(self._text)), ("random", memoryview(self._random)[: len(self._text)])):
            pieces = [data[at : at + (128 << 10)] for at in range(0, len(data), 128 << 10)]
            for level in ZSTD_LEVELS:
                for n in THREADS:
                    rates[f"zstd{level:+d}_{kind}_{n}"] = len(data) / self._best(
                        lambda n=n, level=level, pieces=pieces: _compress(pieces, level, n)
                    )
                rates[f"zstd{level:+d}_{kind}_ratio"] = _compress(pieces, level, 1) / len(data)
        return rates

    def aes(self) -> dict[str, float]:
        """By the `cryptography` package in pieces of 32 KiB, and by OpenSSL itself."""
        data = self._random[: min(self._size, 256 * MIB)]

        def seal(part: np.ndarray[Any, Any]) -> None:
            cipher, view = AESGCM(bytes(32)), memoryview(part)
            for at in range(0, len(view), SEALED):
                cipher.encrypt(at.to_bytes(12, "big"), view[at : at + SEALED], None)

        rates = {f"aes256gcm_python_{n}": self._threads(data, n, seal) for n in THREADS}
        if shutil.which("openssl"):
            rates.update({f"aes256gcm_openssl_{n}": _openssl_speed(n) for n in THREADS})
        return rates

    def loopback(self) -> dict[str, float]:
        certificates = Certificates(self._directory / "pki")
        rates = {
            name: self._size / min(_socket_seconds(self._random, pki) for _ in range(self._runs))
            for name, pki in (("tcp", None), ("tls_python", certificates))
        }
        if shutil.which("openssl"):
            with _plain_file(self._directory, self._random) as path:
                rates["tls_openssl"] = self._size / min(openssl_seconds(certificates, path) for _ in range(self._runs))
        return rates

    def write(self) -> dict[str, float]:
        """Sequential, 1 MiB at a time, with one fsync at the end; and a 4 KiB write with its fsync (median)."""
        path, view = self._directory / "write", memoryview(self._random)

        def sequential() -> None:
            with path.open("wb", buffering=0) as file:
                for at in range(0, len(view), MIB):
                    file.write(view[at : at + MIB])
                os.fsync(file.fileno())

        rate = self._size / self._best(sequential)
        times = []
        with path.open("r+b", buffering=0) as file:
            for number in range(50):
                began = time.perf_counter()
                os.pwrite(file.fileno(), view[:4096], number * MIB)
                os.fsync(file.fileno())
                times.append(time.perf_counter() - began)
        path.unlink()
        return {"write_fsync": rate, "fsync_4k_seconds": sorted(times)[len(times) // 2]}

    def _threads(self, data: np.ndarray[Any, Any], count: int, work: Callable[[Any], object]) -> float:
        parts = np.split(data[: len(data) // count * count], count)
        with ThreadPoolExecutor(count) as pool:
            return data.nbytes / self._best(lambda: list(pool.map(work, parts)))

    def _best(self, work: Callable[[], object]) -> float:
        return min(_seconds(work) for _ in range(self._runs))


def pread_all(path: Path, threads: int) -> None:
    """Read the file once in 256 KiB pieces, every thread a share of it."""
    size = path.stat().st_size
    share = -(-size // threads // PIECE) * PIECE

    def read(start: int) -> None:
        buffer = memoryview(bytearray(PIECE))
        with path.open("rb", buffering=0) as file:
            for offset in range(start, min(start + share, size), PIECE):
                os.preadv(file.fileno(), [buffer], offset)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, range(0, size, share)))


def pread_allocated(path: Path, threads: int) -> None:
    """The same without the holes."""
    pieces: list[tuple[int, int]] = []
    with path.open("rb", buffering=0) as file:
        end = 0
        with contextlib.suppress(OSError):  # ENXIO: nothing but a hole from here on
            while True:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
                end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
                pieces += [(at, min(PIECE, end - at)) for at in range(start, end, PIECE)]

    def read(first: int) -> None:
        buffer = memoryview(bytearray(PIECE))
        with path.open("rb", buffering=0) as file:
            for offset, length in pieces[first : first + share]:
                os.preadv(file.fileno(), [buffer[:length]], offset)

    share = max(1, -(-len(pieces) // threads))
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, range(0, len(pieces), share)))


def openssl_seconds(certificates: Certificates, path: Path) -> float:
    """`openssl s_client < path | openssl s_server > /dev/null`, one process per end, from the first byte to the end."""
    with Group("openssl") as group:
        port, server = listen(group, certificates, subprocess.DEVNULL)
        with path.open("rb") as file:
            began = time.perf_counter()
            client = group.start(certificates.openssl_client(port), stdin=file, stderr=subprocess.DEVNULL)
            if client.wait() or server.wait():
                raise SystemExit("openssl s_client or s_server failed")
            return time.perf_counter() - began


@contextlib.contextmanager
def _plain_file(directory: Path, data: np.ndarray[Any, Any]) -> Iterator[Path]:
    path = directory / "stream"
    path.write_bytes(data)
    try:
        yield path
    finally:
        path.unlink()


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _compress(pieces: list[memoryview], level: int, threads: int) -> int:
    """Compress each piece into a frame of its own; the bytes that come out."""

    def some(first: int) -> int:
        compressor = zstandard.ZstdCompressor(level=level)
        return sum(len(compressor.compress(piece)) for piece in pieces[first::threads])

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(some, range(threads)))


def _socket_seconds(data: np.ndarray[Any, Any], certificates: Certificates | None) -> float:
    """Seconds for `data` to another process over loopback that says when it has it: TCP, or Python's ssl, blocking."""
    spawn = multiprocessing.get_context("spawn")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = int(server.getsockname()[1])
        directory = None if certificates is None else certificates.directory
        sink = spawn.Process(target=_sink, args=(port, directory, len(data)))
        sink.start()
        connection = server.accept()[0]
        if certificates is not None:
            connection = certificates.context(server=True).wrap_socket(connection, server_side=True)
        with connection:
            connection.recv(1)
            began = time.perf_counter()
            view = memoryview(data)
            for at in range(0, len(view), PIECE):
                connection.sendall(view[at : at + PIECE])
            connection.recv(1)
            seconds = time.perf_counter() - began
        sink.join()
    return seconds


def _sink(port: int, directory: Path | None, length: int) -> None:
    connection = socket.create_connection(("127.0.0.1", port))
    if directory is not None:
        context = Certificates(directory).context(server=False)
        connection = context.wrap_socket(connection, server_hostname="127.0.0.1")
    buffer = memoryview(bytearray(PIECE))
    with connection:
        connection.sendall(b"r")
        while length:
            length -= connection.recv_into(buffer)
        connection.sendall(b"d")


def _openssl_speed(processes: int) -> float:
    command = ["openssl", "speed", "-mr", "-seconds", "1", "-bytes", "16384", "-evp", "aes-256-gcm"]
    if processes > 1:
        command += ["-multi", str(processes)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^\+F:.*:AES-256-GCM:([\d.]+)", output, re.MULTILINE | re.IGNORECASE)
    if not found:
        raise SystemExit(f"openssl speed says {output!r}")
    return float(found[-1])


def _openssl_version() -> str:
    if not shutil.which("openssl"):
        return ""
    return subprocess.run(["openssl", "version"], capture_output=True, text=True, check=True).stdout.strip()


def report(figures: dict[str, Any]) -> None:
    machine, rates = figures["machine"], figures["bytes_per_second"]
    print(
        f"\nlimits on {machine['cpus']} CPUs, {machine['architecture']}, Linux {machine['kernel']}, "
        f"{machine['openssl']}, load {machine['load']:.1f}: best runs over {figures['size_bytes'] // MIB} MiB"
    )
    names = dict.fromkeys(re.sub(r"_[12]$", "", name) for name in rates)
    print(f"{'stage':28} {'1, MB/s':>10} {'2, MB/s':>10}  {'out : in':>8}")
    for name in names:
        one, two = rates.get(f"{name}_1", rates.get(name)), rates.get(f"{name}_2")
        ratio = figures["ratios"].get(f"{name}_ratio")
        print(
            f"{name:28} {one / 1e6:10.0f} {'' if two is None else format(two / 1e6, '.0f'):>10}  "
            f"{'' if ratio is None else format(ratio, '.3f'):>8}"
        )
    print(f"a 4 KiB write and its fsync: {figures['fsync_4k_seconds'] * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
