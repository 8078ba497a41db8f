"""Reading through the chain: every point reads as it was, while the head moves on."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from replica.delta import ChainReader, MemoryDelta, apply
from replica.delta.head import MemoryHead
from replica.model import Disk, DiskId
from tests.laws.files import reader_of
from tests.laws.machines import Contents, head_of, histories, model_delta

STATES = 4


def commit_all(history: list[Contents], reported: int) -> tuple[MemoryHead, list[MemoryDelta]]:
    """The head in the last state, and the inverses, oldest point first."""
    head, inverses = head_of(history[0], 0), []
    for number, contents in enumerate(history[1:], 1):
        inverses.append(apply(head, model_delta(head, head_of(contents, number), reported)))
    return head, inverses


def check_point(chain: ChainReader, contents: Contents, data: st.DataObject) -> None:
    for disk, content in contents.items():
        whole = bytearray(b"\xee" * len(content))
        chain.read_into(disk.id, 0, whole)
        assert whole == content
        start = data.draw(st.integers(0, len(content)), label="start")
        stop = data.draw(st.integers(start, len(content)), label="stop")
        part = bytearray(b"\xee" * (stop - start))
        chain.read_into(disk.id, start, part)
        assert part == content[start:stop]
        check_allocated(chain, disk, content, start, stop)


def check_allocated(chain: ChainReader, disk: Disk, content: bytes, start: int, stop: int) -> None:
    at = start
    for low, high in chain.allocated(disk.id, start, stop):
        assert at <= low < high <= stop
        assert not any(content[at:low])
        at = high
    assert not any(content[at:stop])


@given(histories(states=STATES), st.integers(0, (1 << 61) - 1), st.data())
def test_every_point_reads_as_it_was(history: list[Contents], reported: int, data: st.DataObject) -> None:
    head, inverses = commit_all(history, reported)
    layers = [reader_of(inverse) for inverse in inverses]
    for number, contents in enumerate(history):
        chain = ChainReader(
            head.state, layers[number:], head.read_into, cache_bytes=data.draw(st.sampled_from((1, 1 << 20)))
        )
        assert chain.state.point == number
        check_point(chain, contents, data)


@given(histories(states=STATES), st.data())
def test_a_point_stays_while_the_head_moves_on(history: list[Contents], data: st.DataObject) -> None:
    """Each look at the head is followed by a commit before `newer` is asked: the commit's inverse must win."""
    head = head_of(history[0], 0)
    upcoming = list(enumerate(history[1:], 1))
    published: list[MemoryDelta] = []

    def commit_next() -> None:
        if upcoming:
            number, contents = upcoming.pop(0)
            published.append(apply(head, model_delta(head, head_of(contents, number))))

    def below(disk_id: DiskId, offset: int, buffer: memoryview) -> None:
        commit_next()
        buffer[:] = b"\xee" * len(buffer)
        if head.state.disk(disk_id):
            content = head.content(disk_id)[offset : offset + len(buffer)]
            buffer[: len(content)] = content

    def head_ranges(disk_id: DiskId, start: int, stop: int) -> list[tuple[int, int]]:
        """The head has holes where it is zero now, after the commit."""
        commit_next()
        if not head.state.disk(disk_id):
            return []
        content = head.content(disk_id)[start:stop]
        return [(start + at, start + at + 1) for at in range(len(content)) if content[at]]

    def newer() -> list[object]:
        found = [reader_of(inverse) for inverse in published]
        published.clear()
        return found

    chain = ChainReader(head.state, [], below, newer, head_ranges)  # type: ignore[arg-type]
    if data.draw(st.booleans(), label="ask for ranges first"):
        for disk, content in history[0].items():
            check_allocated(chain, disk, content, 0, len(content))
    check_point(chain, history[0], data)
