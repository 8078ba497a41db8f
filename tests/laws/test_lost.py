"""LOST extents in the algebra: what nobody has any more stays lost until a layer that has it wins."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replica.delta import DATA, LOST, MemoryDelta, Packer, Segment, apply, compose, prepare, rows_of, settle, write
from replica.delta.change import check_segment
from replica.delta.prepare import RottenLeavesError
from replica.errors import FormatError
from replica.model import DamagedLeaves, DiskId
from tests.laws.files import reader_of
from tests.laws.machines import Contents, content_of, head_of, histories, leaves_of, model_delta
from tests.laws.machines import grains_of as padded

BITS = st.integers(0, (1 << 61) - 1)
Grains = dict[tuple[DiskId, int], tuple[int, bytes]]
"""(disk, grain) -> (kind, content of DATA)."""


def grains_in(delta: MemoryDelta) -> Grains:
    found: Grains = {}
    for segment in delta.segments():
        change, at = delta.disks[segment.disk], 0
        payload = bytes(segment.payload)
        for first, count, kind in segment.extents.tolist():
            for grain in range(first, first + count):
                content = payload[at : at + change.grain_bytes] if kind == DATA else b""
                found[change.disk_id, grain] = (kind, content)
                at += len(content)
    return found


def with_lost(delta: MemoryDelta, bits: int) -> MemoryDelta:
    """The same delta, with some of what it covers lost."""
    parts: list[Segment] = []
    packer = Packer(parts.append)
    held = grains_in(delta)
    for index, change in enumerate(delta.disks):
        for grain in range(change.result_grains):
            if (change.disk_id, grain) not in held:
                continue
            kind, content = held[change.disk_id, grain]
            if bits >> ((7 * grain + index) % 61) & 1:
                kind, content = LOST, b""
            packer.add(index, change.grain_bytes, rows_of([(grain, 1, kind)]), content)
    packer.flush()
    return MemoryDelta(delta.delta_id, delta.base, delta.result, tuple(parts))


def one_after_the_other(*deltas: MemoryDelta) -> Grains:
    """Compose by its definition, grain by grain: the last one decides, a cut forgets, growth is zero."""
    found: Grains = {}
    for delta in deltas:
        for change in delta.disks:
            for key in [k for k in found if k[0] == change.disk_id and k[1] >= change.result_grains]:
                del found[key]
            for grain in range(change.base_grains, change.result_grains):
                found[change.disk_id, grain] = (0, b"")
        found |= grains_in(delta)
    sizes = {d.disk.id: d.disk.count_grains for d in deltas[0].base.disks}
    return {k: v for k, v in found.items() if v[0] != 0 or k[1] < sizes.get(k[0], 0)}


@given(histories(states=4), BITS, st.tuples(BITS, BITS, BITS))
def test_the_winning_layer_decides_and_compose_is_associative(
    history: list[Contents], reported: int, lost: tuple[int, int, int]
) -> None:
    a, b, c, d = (head_of(contents, i) for i, contents in enumerate(history))
    plain = (model_delta(a, b, reported), model_delta(b, c), model_delta(c, d, reported))
    one, two, three = (with_lost(delta, bits) for delta, bits in zip(plain, lost, strict=True))
    whole = compose(one, two, three)
    assert compose(compose(one, two), three) == compose(one, compose(two, three)) == whole
    assert grains_in(whole) == one_after_the_other(one, two, three)
    for segment in whole.segments():
        check_segment(whole.disks[segment.disk], segment, lost=whole.marks_lost)
        if (segment.extents["data"] == LOST).any():
            with pytest.raises(FormatError, match="lost"):
                check_segment(whole.disks[segment.disk], segment)


@given(histories(), BITS, BITS)
def test_a_file_says_that_something_is_lost_and_a_head_refuses_it(
    history: list[Contents], reported: int, lost: int
) -> None:
    """What nobody has cannot be applied: the head stays as it is."""
    before, after = (head_of(contents, i) for i, contents in enumerate(history))
    delta = with_lost(model_delta(before, after, reported), lost)
    any_lost = any(kind == LOST for kind, _ in grains_in(delta).values())
    assert delta.marks_lost == any_lost
    content = content_of(before)
    if any_lost:
        with pytest.raises(FormatError, match="lost"):
            apply(before, delta)
        assert content_of(before) == content
    else:
        apply(before, delta)


@given(histories(), BITS, BITS)
def test_a_file_with_lost_extents_returns(history: list[Contents], reported: int, lost: int) -> None:
    before, after = (head_of(contents, i) for i, contents in enumerate(history))
    delta = with_lost(model_delta(before, after, reported), lost)
    reader = reader_of(delta)
    assert reader.marks_lost == delta.marks_lost
    assert MemoryDelta.of(reader) == delta


@given(histories(), BITS, st.data())
def test_a_rotten_leaf_is_recovered_or_lost_or_refused_and_never_sealed(
    history: list[Contents], reported: int, data: st.DataObject
) -> None:
    """By the definition: what the inverse says of a grain is what it was, or LOST where nobody can tell."""
    head, after = (head_of(contents, i) for i, contents in enumerate(history))
    rot, known = data.draw(BITS), data.draw(BITS)
    truth = {disk.id: padded(disk, content) for disk, content in history[0].items()}
    delta = model_delta(head, after, reported)
    covered = {(disk_id, grain) for disk_id, grain in grains_in(delta)}
    rotten: list[DamagedLeaves] = []
    refused = False
    for number, disk in enumerate(head.disks):
        for leaf in range(disk.count_leaves):
            if known >> ((5 * leaf + number) % 61) & 1:
                rotten.append(DamagedLeaves(disk.id, leaf, leaf + 1))
            if rot >> ((3 * leaf + number) % 61) & 1:
                head._contents[disk.id][leaf * disk.leaf_bytes] ^= 0x55
    parts: list[Segment] = []
    try:
        prepare(head, delta, parts.append, rotten=rotten)
    except RottenLeavesError as error:
        refused = True
        reported_leaves = {(d.disk_id, n) for d in error.leaves for n in range(d.first, d.stop)}
    inverse = MemoryDelta(delta.delta_id, delta.result, delta.base, tuple(parts))
    marked = {(d.disk_id, d.first) for d in rotten}
    after_sizes = {d.disk.id: d.disk.count_grains for d in delta.result.disks}
    for disk in head.disks:
        cut = after_sizes.get(disk.id, 0)
        for leaf in range(disk.count_leaves):
            grains = range(leaf * disk.grains_per_leaf, min((leaf + 1) * disk.grains_per_leaf, disk.count_grains))
            replaced = [(disk.id, grain) in covered or grain >= cut for grain in grains]
            is_rotten = bytes(head.content(disk.id)[leaf * disk.leaf_bytes :][: disk.leaf_bytes]) != bytes(
                history[0][disk][leaf * disk.leaf_bytes :][: disk.leaf_bytes]
            )
            if refused:
                if (disk.id, leaf) in reported_leaves:
                    assert is_rotten
                    assert not all(replaced) or (disk.id, leaf) not in marked
                continue
            assert not is_rotten or all(replaced) or not any(replaced), "rot that stays is never passed over"
            found = grains_in(inverse)
            for grain, covers in zip(grains, replaced, strict=True):
                kind, content = found.get((disk.id, grain), (0, b""))
                if not covers:
                    assert (disk.id, grain) not in found
                elif kind == LOST:
                    assert is_rotten and (disk.id, leaf) in marked
                else:
                    assert content.ljust(disk.grain_bytes, b"\0") == truth[disk.id][grain]
    if not refused:
        write(head, delta)
        settle(head, delta, inverse)
        assert leaves_of(head) == leaves_of(after)
