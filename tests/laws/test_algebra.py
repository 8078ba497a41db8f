"""The laws of the delta (DESIGN §3): what diff, apply and compose promise each other."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from replica.delta import MemoryDelta, apply, compose, diff
from replica.delta.change import check_segment
from tests.laws.machines import Contents, content_of, extents_of, head_of, histories, leaves_of, model_delta

BITS = st.integers(0, (1 << 61) - 1)


def check_canonical(delta: MemoryDelta) -> None:
    """Every segment is canonical, and so are the seams between them."""
    for segment in delta.segments():
        check_segment(delta.disks[segment.disk], segment)
    covered = [(change.disk_id, grain) for change, grain, _ in extents_of(delta)]
    assert covered == sorted(set(covered))


@given(histories())
def test_diff_is_the_definition(history: list[Contents]) -> None:
    before, after = (head_of(c, i) for i, c in enumerate(history))
    delta = diff(before, after)
    check_canonical(delta)
    assert delta == model_delta(before, after)


@given(histories(), BITS)
def test_apply_leads_to_the_result(history: list[Contents], reported: int) -> None:
    """apply(A, diff(A, B)) == B, content, sizes, roots and every node of the trees; over-reporting changes nothing."""
    head, after = (head_of(c, i) for i, c in enumerate(history))
    apply(head, model_delta(head, after, reported))
    assert content_of(head) == history[1]
    assert head.state == after.state
    assert leaves_of(head) == leaves_of(after)


@given(histories(), BITS)
def test_inverse_leads_back(history: list[Contents], reported: int) -> None:
    """apply(apply(A, d), inverse) == A, and the inverse of the inverse is d."""
    head, after = (head_of(c, i) for i, c in enumerate(history))
    delta = model_delta(head, after, reported)
    before = head.state
    inverse = apply(head, delta)
    check_canonical(inverse)
    again = apply(head, inverse)
    assert content_of(head) == history[0]
    assert head.state == before
    assert leaves_of(head) == leaves_of(head_of(history[0], 0))
    assert again.parts == delta.parts


@given(histories(states=3), BITS, BITS)
def test_compose_is_one_after_the_other(history: list[Contents], more: int, most: int) -> None:
    """apply(apply(A, d1), d2) == apply(A, compose(d1, d2))."""
    a, b, c = (head_of(contents, i) for i, contents in enumerate(history))
    composed = compose(model_delta(a, b, more), model_delta(b, c, most))
    check_canonical(composed)
    apply(a, composed)
    assert content_of(a) == history[2]
    assert a.state == c.state


@given(histories(states=4), BITS)
def test_compose_is_associative(history: list[Contents], reported: int) -> None:
    a, b, c, d = (head_of(contents, i) for i, contents in enumerate(history))
    one, two, three = model_delta(a, b, reported), model_delta(b, c), model_delta(c, d, reported)
    left, right = compose(compose(one, two), three), compose(one, compose(two, three))
    assert left == right == compose(one, two, three)


@settings(max_examples=200)
@given(histories(states=3), BITS, BITS)
def test_inverse_of_composed_is_composed_of_inverses(history: list[Contents], more: int, most: int) -> None:
    """inverse(compose(d1, d2)) == compose(inverse(d2), inverse(d1)), segment by segment."""
    a, b, c = (head_of(contents, i) for i, contents in enumerate(history))
    one, two = model_delta(a, b, more), model_delta(b, c, most)
    at_once = apply(head_of(history[0], 0), compose(one, two))
    inverse_one = apply(a, one)
    inverse_two = apply(a, two)
    assert compose(inverse_two, inverse_one).parts == at_once.parts
