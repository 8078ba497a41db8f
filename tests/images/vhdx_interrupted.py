"""A writer of VHDX structures that can be interrupted anywhere, written to [MS-VHDX] §2.3 and not to the reader.

It changes the recipe of a `vhdx_maker.Vhdx` step by step. Of each step, payload
is written in place first; what changes in structures goes into one log entry;
only `lag` entries later it is written to its place, and the tail moves on. So the
file between two steps is what a crash at that moment leaves.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from uuid import UUID

from vhdx_maker import BAT_AT, BLOCKS_AT, LOG_AT, MIB, Vhdx, checksummed, header

SECTOR = 4096
LOG_ID = UUID(int=0x106)
Update = tuple[int, bytes | int]
"""A byte of the file, and the 4 KiB that belong there, or how many zeros."""


def entry(
    sequence: int,
    tail: int,
    updates: Sequence[Update],
    *,
    flushed: int = 0,
    last: int = 0,
    log: UUID = LOG_ID,
    signature: bytes = b"loge",
    length: int | None = None,
    count: int | None = None,
    data_sequence: int | None = None,
    error: int = 0,
) -> bytes:
    """A log entry (§2.3.1)."""
    descriptors, sectors = b"", b""
    number = sequence if data_sequence is None else data_sequence
    for offset, data in updates:
        if isinstance(data, int):
            descriptors += b"zero" + struct.pack("<IQQQ", 0, data, offset, sequence)
        else:
            descriptors += b"desc" + data[-4:] + data[:8] + struct.pack("<QQ", offset, sequence)
            sectors += b"data" + struct.pack("<I", number >> 32) + data[8:-4] + struct.pack("<I", number & 0xFFFFFFFF)
    size = -(-(64 + len(descriptors)) // SECTOR) * SECTOR
    total = size + len(sectors) if length is None else length
    head = signature + struct.pack("<IIIQII", 0, total, tail, sequence, len(updates) if count is None else count, 0)
    head += log.bytes_le + struct.pack("<QQ", flushed, last)
    return checksummed((head + descriptors).ljust(size, b"\0") + sectors, error)


def with_log(recipe: Vhdx, entries: dict[int, bytes], **fields: int) -> bytes:
    """The recipe's file with these entries at these bytes of its log, not closed."""
    recipe.headers = (header(8, log=LOG_ID, **fields), header(9, log=LOG_ID, **fields))  # type: ignore[arg-type]
    file = bytearray(recipe.build())
    for offset, data in entries.items():
        put(file, offset, data)
    return bytes(file)


def put(file: bytearray, offset: int, data: bytes) -> None:
    """Write into the log, over its end to its start."""
    for at in range(0, len(data), SECTOR):
        place = LOG_AT + (offset + at) % MIB
        file[place : place + SECTOR] = data[at : at + SECTOR]


@dataclass
class Logged:
    """An entry in the log: sectors of the log it lies in, and what is to be written for it."""

    sectors: list[int]
    updates: list[Update]
    content: bytes
    """What the disk reads as when this is the newest one."""


class Interrupted:
    """`file` is what a crash would leave now; `active` are the entries from the tail to the head."""

    def __init__(self, recipe: Vhdx, *, lag: int, first_sector: int = 0, sequence: int = 0, below: bytes = b"") -> None:
        recipe.headers = (header(8, log=LOG_ID), header(9, log=LOG_ID))
        self.recipe, self.lag, self.below = recipe, lag, below
        self.view = recipe.build()
        """The file as it would be with everything in its place."""
        self.file = bytearray(self.view)
        self.sequence, self.head = sequence, first_sector * SECTOR
        self.active: list[Logged] = []
        self.previous: bytes | None = None
        """What the disk read as one entry earlier, if there was one."""

    @property
    def content(self) -> bytes:
        return self.active[-1].content

    def step(self, change: Callable[[Vhdx], None], *, extend: bool = True) -> None:
        """Change the recipe, as far as the log; `extend`: new blocks were written before, and are on the disk."""
        self.previous = self.content if self.active else None
        change(self.recipe)
        old, self.view = self.view, self.recipe.build()
        if extend:
            self.file += self.view[len(self.file) :]
        updates = self._updates(old)
        while len(self.active) >= self.lag:
            for offset, data in self.active.pop(0).updates:
                self.write(offset, data)
        self.sequence += 1
        tail = self.active[0].sectors[0] * SECTOR if self.active else self.head
        data = entry(self.sequence, tail, updates, flushed=len(self.file) // MIB * MIB, last=len(self.view))
        sectors = [(self.head + at) % MIB // SECTOR for at in range(0, len(data), SECTOR)]
        assert not {sector for logged in self.active for sector in logged.sectors} & set(sectors), "the log is full"
        put(self.file, self.head, data)
        self.head = (self.head + len(data)) % MIB
        self.active.append(Logged(sectors, updates, self.recipe.content(self.below)))

    def _updates(self, old: bytes) -> list[Update]:
        """Structures that differ from `old`: the table, the metadata, and behind the blocks the sector bitmaps."""
        bitmaps = range(BLOCKS_AT + len(self.recipe.blocks) * self.recipe.block_bytes, len(self.view), SECTOR)
        updates: list[Update] = []
        for at in [*range(2 * MIB, BAT_AT + MIB, SECTOR), *bitmaps]:
            sector = self.view[at : at + SECTOR]
            if sector != old[at : at + SECTOR]:
                updates.append((at, sector if any(sector) else SECTOR))
        return updates

    def write(self, offset: int, data: bytes | int) -> None:
        """To its place in the file."""
        data = bytes(data) if isinstance(data, int) else data
        self.file.extend(bytes(max(0, offset + len(data) - len(self.file))))
        self.file[offset : offset + len(data)] = data

    def half_applied(self, seed: int) -> bytes:
        """The file with some of the pending writes done, in any order, and all of the log."""
        kept, some = bytes(self.file), random.Random(seed)
        pending = [update for logged in self.active for update in logged.updates if some.random() < 0.5]
        some.shuffle(pending)
        for offset, data in pending:
            if offset + SECTOR <= len(kept):
                self.write(offset, data)
        half, self.file = bytes(self.file), bytearray(kept)
        return half


def allocate(block: int, letter: bytes) -> Callable[[Vhdx], None]:
    """A new block, all of this letter."""

    def change(recipe: Vhdx) -> None:
        recipe.states.pop(block, None)
        recipe.blocks[block] = letter * recipe.block_bytes

    return change


def state(block: int, number: int) -> Callable[[Vhdx], None]:
    """A block without data comes into this state."""

    def change(recipe: Vhdx) -> None:
        recipe.states[block] = number

    return change


def grow(size: int) -> Callable[[Vhdx], None]:
    """The disk is resized: a change of the metadata region."""

    def change(recipe: Vhdx) -> None:
        recipe.size = size

    return change


def present(block: int, sectors: set[int]) -> Callable[[Vhdx], None]:
    """Other sectors of a partial block are there: a change of the bitmap."""

    def change(recipe: Vhdx) -> None:
        recipe.present[block] = sectors

    return change
