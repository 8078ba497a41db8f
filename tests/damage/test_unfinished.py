"""Damage to what is there only in the middle of something: the journal, a delta that arrives, a commit that was cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from replica.errors import ReplicaError, TransportError
from tests.damage.damage_lab import LEAF, DamageLab, flip


def cut_off(lab: DamageLab, name: str, *, before: bool) -> None:
    """A sync whose link is gone for good before or after its first call of that name."""
    link = lab.link()
    gone = [False]

    def check(called: str, _arguments: object) -> None:
        if called == name or gone[0]:
            gone[0] = True
            raise TransportError("cut")

    if before:
        link.before = check
    else:
        link.after = check
        link.before = lambda _called, _arguments: check("", None)
    lab.scribble("os", 2 * LEAF + 100, 5000)
    with pytest.raises(ReplicaError):
        lab.sync(link, retry_seconds=0)


def _pending(lab: DamageLab) -> Path:
    return lab.root / "state" / "web-1" / "pending"


def _part(lab: DamageLab) -> Path:
    return next((lab.directory / "incoming").glob("*.part"))


def _index(lab: DamageLab) -> Path:
    return next((lab.directory / "incoming").glob("*.index"))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flip begin": lambda path: flip(path, 0),
    "flip middle": lambda path: flip(path, path.stat().st_size // 2),
    "flip end": lambda path: flip(path, path.stat().st_size - 1),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "delete": lambda path: path.unlink(),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize(
    ("find", "name", "before"),
    [(_pending, "commit", False), (_pending, "commit", True), (_part, "commit", True), (_index, "commit", True)],
    ids=["pending, committed", "pending, not committed", "part", "index"],
)
def test_what_is_in_flight_is_done_again(
    lab: DamageLab, how: str, find: Callable[[DamageLab], Path], name: str, before: bool
) -> None:
    cut_off(lab, name, before=before)
    lab.site.close()
    DAMAGE[how](find(lab))
    committed = not before
    if committed:
        lab.copies[4] = lab.copy()
    lab.site = lab.open_site()
    result = lab.point()
    assert result.point == (5 if committed else 4)
    assert all(lab.restores_exactly(point) for point in lab.copies)
    assert all(info.restorable for info in lab.reader().points())


@pytest.mark.parametrize("how", DAMAGE)
def test_a_received_delta_that_rots_before_its_commit_is_sent_again(lab: DamageLab, how: str) -> None:
    """Received and durable, and the site dies before it commits."""
    store = next(iter(lab.site._slots.values())).store()
    original = store.commit
    store.commit = lambda *_a, **_k: (_ for _ in ()).throw(TransportError("power cut"))  # type: ignore[method-assign]
    cut_off(lab, "never", before=True)
    store.commit = original  # type: ignore[method-assign]
    (whole,) = [path for path in (lab.directory / "incoming").iterdir() if not path.suffix]
    lab.site.close()
    DAMAGE[how](whole)
    lab.site = lab.open_site()
    assert lab.point().point in (4, 5)
    assert all(lab.restores_exactly(point) for point in lab.copies)
