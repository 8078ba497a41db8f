"""LOST extents against a naive model: a value per grain, and the layer nearest to the point wins."""

from __future__ import annotations

from uuid import UUID

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replica.delta import ChainReader, DiskChange
from replica.delta.change import disk_changes
from replica.delta.extents import LOST, ZERO, Rows, rows_of_kinds
from replica.delta.segment import CHUNK, Table
from replica.errors import LostError
from replica.model import Consistency, DeltaId, Disk, DiskId, DiskState, State
from tests.laws.machines import EPOCH, REPLICA

GRAIN = 512
MAX_GRAINS = 24
PASSED = 3


class MemoryLayer:
    """An inverse of one disk and one segment, with whole grains as payload."""

    def __init__(self, base: State, result: State, kinds: list[int], value: int) -> None:
        self.base, self.result, self._value = base, result, value
        self.disks: tuple[DiskChange, ...] = disk_changes(base, result)
        codes = np.array([0 if kind == PASSED else kind + 1 for kind in kinds], np.uint8)
        self.rows: Rows = _rows(codes)

    def overlapping(self, disk: int, first: int, stop: int) -> range:
        return range(1 if len(self.rows) else 0)

    def span(self, number: int) -> tuple[int, int]:
        return int(self.rows["first"][0]), int(self.rows["first"][-1] + self.rows["count"][-1])

    def table(self, number: int) -> Table:
        grains = int(self.rows["count"][self.rows["data"] == 1].sum())
        chunks = np.zeros(1, CHUNK)
        return Table(0, 0, self.rows, chunks, np.array([0, grains * GRAIN]), np.array([0, 0]))

    def chunk(self, table: Table, index: int) -> bytes:
        return bytes([self._value]) * table.payload_bytes


def _rows(codes: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> Rows:
    rows = rows_of_kinds(0, codes)
    for row in rows:
        row["data"] = codes[int(row["first"])] - 1
    return rows


def state(number: int, grains: int) -> State:
    disk = Disk(DiskId(UUID(int=1)), "os", grains * GRAIN, grain_bytes=GRAIN, leaf_bytes=GRAIN)
    disks = (DiskState(disk, bytes(32)),) if grains else ()
    return State(REPLICA, DeltaId(UUID(int=number + 1)), number + 1, EPOCH, 0, Consistency.CRASH, disks)


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[MemoryLayer], State, list[int | None]]:
    """Layers, the head's state, and the point as a list: a value per grain, None where it is lost."""
    sizes = draw(st.lists(st.integers(0, MAX_GRAINS), min_size=2, max_size=6))
    sizes[0] = max(sizes[0], 1)
    layers: list[MemoryLayer] = []
    model: list[int | None] = [9] * sizes[-1]
    for number in range(len(sizes) - 2, -1, -1):
        base, result = state(number + 1, sizes[number + 1]), state(number, sizes[number])
        kinds = draw(st.lists(st.sampled_from((ZERO, 1, LOST, PASSED)), min_size=sizes[number], max_size=sizes[number]))
        model = (model + [0] * MAX_GRAINS)[: sizes[number]]
        for grain, kind in enumerate(kinds):
            model[grain] = {ZERO: 0, 1: 20 + number, LOST: None, PASSED: model[grain]}[kind]
        layers.insert(0, MemoryLayer(base, result, kinds, 20 + number))
    return layers, state(len(sizes) - 1, sizes[-1]), model


def below(disk_id: DiskId, offset: int, buffer: memoryview) -> None:
    buffer[:] = b"\x09" * len(buffer)


@given(chains(), st.data())
def test_what_is_lost_is_named_and_the_rest_reads(
    chain: tuple[list[MemoryLayer], State, list[int | None]], data: st.DataObject
) -> None:
    layers, head, model = chain
    reader = ChainReader(head, layers, below)
    disk_id, size = DiskId(UUID(int=1)), len(model) * GRAIN
    expected = b"".join(bytes([value or 0]) * GRAIN for value in model)
    whole = bytearray(b"\xee" * size)
    reader.read_into(disk_id, 0, whole, missing=[])
    assert whole == expected
    lost = [grain for low, high in reader.lost(disk_id, 0, size) for grain in range(low // GRAIN, high // GRAIN)]
    assert lost == [grain for grain, value in enumerate(model) if value is None]
    start = data.draw(st.integers(0, size), label="start")
    stop = data.draw(st.integers(start, size), label="stop")
    part = bytearray(b"\xee" * (stop - start))
    touched = [g for g in lost if g * GRAIN < stop and start < (g + 1) * GRAIN] if start < stop else []
    if touched:
        with pytest.raises(LostError) as caught:
            reader.read_into(disk_id, start, part)
        at = caught.value
        assert at.disk == "os" and start <= at.offset < at.offset + at.length <= stop
        assert all(model[(at.offset + i) // GRAIN] is None for i in range(at.length))
    else:
        reader.read_into(disk_id, start, part)
        assert part == expected[start:stop]
