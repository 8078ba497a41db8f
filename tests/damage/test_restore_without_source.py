"""The source is gone and the head has a rotten leaf: everything else of every point can still be had."""

from __future__ import annotations

import numpy as np
import pytest

from replica.errors import DamageError, LostError
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
        files = restore_point(lab.fs, point, lab.root / "most", "raw", missing={})
    expected = lab.copies[newest.state.point]["os"].copy()
    expected[4 * LEAF : 5 * LEAF] = 0
    assert files["os"].read_bytes() == expected.tobytes()
    assert files["data"].read_bytes() == lab.copies[newest.state.point]["data"].tobytes()


@pytest.mark.parametrize("at", [0.2, 0.5, 0.8])
def test_all_but_what_a_damaged_inverse_held_is_restored(lab: DamageLab, at: float) -> None:
    lab.scribble("os", 0, 8 * LEAF)
    lab.point()
    links = lab.reader()
    links.points()
    inverse = next(link.path for link in links._index.chain().links if link.result.point == 3)
    flip(inverse, int(at * inverse.stat().st_size))
    with lab.reader().open_point(3) as point:
        with pytest.raises(DamageError, match="allow-lost"):
            restore_point(lab.fs, point, lab.root / "all", "raw")
        missing: dict[str, list[tuple[int, int]]] = {}
        files = restore_point(lab.fs, point, lab.root / "most", "raw", missing=missing)
    assert sum(len(ranges) for ranges in missing.values()) >= 1
    for disk, path in files.items():
        expected = lab.copies[3][disk].copy()
        for start, stop in missing.get(disk, ()):
            expected[start:stop] = 0
        assert np.array_equal(np.fromfile(path, np.uint8), expected)
    assert sum(stop - start for ranges in missing.values() for start, stop in ranges) < lab.data["os"].size
