"""The spool: sealed segments between the reader and the link.

The reader must be done soon, because the machine may be frozen while it reads;
the link takes as long as it takes. So what is sealed waits here: in memory up to
16 MiB, beyond that in a scratch file without a name (gone with the process,
whatever happens), and only at 4 GiB the reader has to wait as well.

A segment is held until the receiver has acknowledged it. What is gone from here
is never made again under its number: read again, it could be other bytes under
the same nonce.

    reader   put(sealed), …, end()
    sender   for held in spool: send; spool.drop(held.number)
             after a cut: spool.acknowledge(what is there), and what is not comes again

One reader thread and one sender thread. `fail` from either wakes the other with the error.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from replica.delta import SealedSegment
from replica.durable import File, FileSystem

MEMORY_BYTES = 16 << 20
LIMIT_BYTES = 4 << 30


@dataclass(eq=False)
class Held:
    """A segment that waits; its blob is in memory, or at `place` in the scratch file."""

    number: int
    offset: int
    length: int
    digest: bytes
    blob: bytes | None
    place: int = 0


class Spool:
    """See the module. `directory` is where the scratch file would lie."""

    def __init__(
        self, fs: FileSystem, directory: Path, *, memory_bytes: int = MEMORY_BYTES, limit_bytes: int = LIMIT_BYTES
    ) -> None:
        self._fs, self._directory = fs, directory
        self._memory_limit, self._limit = memory_bytes, limit_bytes
        self._changed = threading.Condition()
        self._held: dict[int, Held] = {}
        self._next = 0
        self._put_numbers = 0
        self._ended = False
        self._error: BaseException | None = None
        self._in_memory = self._in_file = self._file_end = 0
        self._file: File | None = None

    # --- the reader's side ---

    def put(self, sealed: SealedSegment, offset: int) -> None:
        """Add the next segment; waits while the spool is full. Raises what `fail` was given."""
        length = len(sealed.blob)
        held = Held(sealed.number, offset, length, sealed.digest, sealed.blob)
        with self._changed:
            assert sealed.number == self._put_numbers, "segments come in number order"
            self._changed.wait_for(lambda: self._error or self._has_room(length))
            self._raise()
            if self._in_memory + length > self._memory_limit and self._held:
                self._to_file(held)
            else:
                self._in_memory += length
            self._held[held.number] = held
            self._put_numbers += 1
            self._changed.notify_all()

    def _has_room(self, length: int) -> bool:
        return not self._held or self._in_memory + self._in_file + length <= self._limit

    def _to_file(self, held: Held) -> None:
        assert held.blob is not None
        if self._file is None:
            self._file = self._fs.create_anonymous(self._directory)
        if not self._in_file:
            self._file_end = 0
        held.place, self._file_end = self._file_end, self._file_end + held.length
        self._file.write(held.place, held.blob)
        self._in_file += held.length
        held.blob = None

    def end(self) -> None:
        """No more segments come."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    # --- the sender's side ---

    def __iter__(self) -> Iterator[Held]:
        """Held segments in number order, each once; waits for more until `end`. Raises what `fail` was given."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._error or self._ended or self._next < self._put_numbers)
                self._raise()
                if self._next >= self._put_numbers:
                    return
                held = self._held.get(self._next)
                self._next += 1
            if held is not None:
                yield held

    def blob(self, held: Held) -> bytes:
        """The sealed bytes, wherever they wait."""
        if held.blob is not None:
            return held.blob
        assert self._file is not None
        return self._file.read(held.place, held.length)

    def drop(self, number: int) -> None:
        """The receiver has it. Frees its place (that in the file: when the file has become empty, or as a hole)."""
        with self._changed:
            held = self._held.pop(number, None)
            if held is None:
                return
            if held.blob is not None:
                self._in_memory -= held.length
            else:
                self._in_file -= held.length
                assert self._file is not None
                self._file.zero(held.place, held.length)
            self._changed.notify_all()

    def acknowledge(self, received: list[tuple[int, int]]) -> int:
        """After a new `begin`: drop what the receiver has, and let the rest come again from the smallest number on.

        Returns how many segments it does not have that are no longer held.
        """
        with self._changed:
            ranges = [(first, min(stop, self._put_numbers)) for first, stop in received]
        there = {number for first, stop in ranges for number in range(first, stop)}
        for number in there:
            self.drop(number)
        with self._changed:
            self._next = min(self._held, default=self._put_numbers)
            return self._put_numbers - len(there | self._held.keys())

    # --- both ---

    @property
    def waiting_bytes(self) -> int:
        """Sealed bytes that the receiver has not acknowledged."""
        return self._in_memory + self._in_file

    def check(self) -> None:
        """Raise what `fail` was given, if it was."""
        with self._changed:
            self._raise()

    def fail(self, error: BaseException) -> None:
        """End both sides with `error`; the first one counts."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Forget everything."""
        with self._changed:
            self._held.clear()
            file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                file.close()
