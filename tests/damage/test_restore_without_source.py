"""The source is gone and the head has a rotten leaf: everything else of every point can still be had."""

from __future__ import annotations

import pytest

from replica.errors import LostError
from replica.store import restore_point
from tests.damage.damage_lab import LEAF, DamageLab, flip
from tests.damage.test_head import verify


def test_all_but_the_rotten_leaf_is_restored(lab: DamageLab) -> None:
    flip(lab.image_of("os"), 4 * LEAF + 10)
    assert verify(lab) == LEAF
    newest = lab.reader().points()[-1]
    assert not newest.restorable
    assert [(r.disk, r.offset, r.length) for r in newest.lost] == [("os", 4 * LEAF, LEAF)]
    with lab.reader().open_point() as point:
        with pytest.raises(LostError, match="allow-lost"):
            restore_point(lab.fs, point, lab.root / "all", "raw")
        files = restore_point(lab.fs, point, lab.root / "most", "raw", allow_lost=True)
    expected = lab.copies[newest.state.point]["os"].copy()
    expected[4 * LEAF : 5 * LEAF] = 0
    assert files["os"].read_bytes() == expected.tobytes()
    assert files["data"].read_bytes() == lab.copies[newest.state.point]["data"].tobytes()
