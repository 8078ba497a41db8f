"""A machine that never stops writing, and knows what each of its points must hold.

    with Writer(directory, {"os": 24 << 20, "data": 8 << 20}, seed=1) as writer:
        lab.machine("web-1", writer.images, freeze=writer.freeze, thaw=writer.thaw)
        …
        writer.expected(frozen_at_ns)          # disk -> SHA-256 at that instant

The writer is a thread. Each of its writes goes to an image and to a copy in
memory. `freeze` and `thaw` are commands that reach it over a loopback port:
frozen, it stands still and notes the digests of its *memory*, not of the files
that the engine reads. A point names its freeze time, and the last freeze before
that is what it must restore to: exactly, all disks of one instant.

A freeze whose sender is killed is ended by the sender's watchdog; until then the
writer waits, and `frozen_seconds` would show if nobody ever came.
"""

from __future__ import annotations

import hashlib
import os
import random
import socket
import threading
import time
from bisect import bisect_right
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

GRAIN = 4096
_HOOK = 'exec 3<>/dev/tcp/127.0.0.1/{port} && echo {word} >&3 && read -r answer <&3 && [ "$answer" = done ]'


class Writer:
    """Disks under write load, with hooks. `pause_seconds` is between two bursts of writes."""

    def __init__(self, directory: Path, disks: dict[str, int], seed: int, pause_seconds: float = 0.01) -> None:
        self._random = random.Random(seed)
        self._pause_seconds = pause_seconds
        self.images = {name: directory / f"{name}.raw" for name in disks}
        self._memory = {
            name: bytearray(self._random.randbytes(size // 2) + bytes(size // 2)) for name, size in disks.items()
        }
        for name, path in self.images.items():
            path.write_bytes(self._memory[name])
        self._files = {name: os.open(path, os.O_RDWR | os.O_CLOEXEC) for name, path in self.images.items()}
        self._writing = threading.Condition()
        self._frozen = False
        self._ended = threading.Event()
        self._times: list[int] = []
        self._digests: list[dict[str, str]] = []
        self.count_writes = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.freeze, self.thaw = (["bash", "-c", _HOOK.format(port=port, word=word)] for word in ("freeze", "thaw"))
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._write, self._answer)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with self._writing:
            self._ended.set()
            self._frozen = False
            self._writing.notify_all()
        self._threads[0].join()
        self._listener.close()
        for fd in self._files.values():
            os.close(fd)

    def expected(self, frozen_at_ns: int) -> dict[str, str]:
        """What every disk of the point of that freeze time must be."""
        with self._writing:
            place = bisect_right(self._times, frozen_at_ns)
            assert place, "a point is older than the first freeze"
            return self._digests[place - 1]

    def name_of(self, digests: dict[str, str]) -> str:
        """Which instant that was instead, for whoever looks into a difference."""
        with self._writing:
            for number, known in enumerate(self._digests):
                if known == digests:
                    return f"it is freeze {number} of {len(self._digests)}"
        return "the machine never was that"

    def burst(self) -> None:
        """Some writes to all disks, as one step: what a freeze can see is all of it or nothing."""
        with self._writing:
            self._writing.wait_for(lambda: not self._frozen)
            for name, memory in self._memory.items():
                for _ in range(self._random.randrange(1, 5)):
                    self._write_somewhere(name, memory)
            self.count_writes += 1

    def _write_somewhere(self, name: str, memory: bytearray) -> None:
        length = self._random.choice((512, GRAIN, GRAIN, 3 * GRAIN, 64 * GRAIN))
        start = self._random.randrange(0, (len(memory) - length) // 512) * 512
        data = bytes(length) if self._random.random() < 0.2 else self._random.randbytes(length)
        os.pwrite(self._files[name], data, start)
        memory[start : start + length] = data

    def _write(self) -> None:
        while not self._ended.wait(self._pause_seconds):
            self.burst()

    # --- the hooks ---

    def _answer(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, suppress(OSError):
                connection.settimeout(10)
                word = connection.recv(64).decode().strip()
                if word in ("freeze", "thaw"):
                    self._set_frozen(word == "freeze")
                    connection.sendall(b"done\n")

    def _set_frozen(self, frozen: bool) -> None:
        with self._writing:
            self._frozen = frozen
            if frozen:
                digests = {name: hashlib.sha256(memory).hexdigest() for name, memory in self._memory.items()}
                self._times.append(time.time_ns())
                self._digests.append(digests)
            self._writing.notify_all()
