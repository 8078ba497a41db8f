"""A commit whose inverse has lost extents, cut in the middle: it can be finished, and it cannot be undone."""

from __future__ import annotations

import shutil

import pytest

from replica.delta import DeltaFileReader, Keyring
from replica.errors import DamageError, LostError, ReplicaError, StorageError
from replica.store import commit, damage
from tests.damage.damage_lab import LEAF, DamageLab, flip


def test_lost_extents_can_be_redone_and_never_undone(lab: DamageLab, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(lab.image_of("os"), 4 * LEAF + 10)
    lab.scribble("os", 4 * LEAF, 100)
    reader = lab.reader()
    damage.note_verdicts(lab.fs, reader.layout, reader.verify())

    def cut(*_: object) -> None:
        raise StorageError("cut in the middle of the head")

    with monkeypatch.context() as patch:
        patch.setattr(commit, "settle", cut)
        with pytest.raises(StorageError):
            lab.sync()
    lab.site.close()
    (inverse,) = [path for path in (lab.directory / "points").iterdir() if _marks_lost(lab, path)]
    incoming = lab.directory / "incoming" / inverse.name
    kept = lab.root / "kept"
    shutil.move(incoming, kept)

    lab.site = lab.open_site()
    store = next(iter(lab.site._slots.values())).store()
    assert isinstance(store.stopped, LostError)
    with pytest.raises(ReplicaError):
        lab.sync()
    assert inverse.exists(), "every byte is kept"
    for point in (1, 2, 3):
        assert not lab.restores_exactly(point)
        with lab.reader().open_point(point) as opened:
            disks = {disk.name: disk for disk in opened.disks}
            whole = bytearray(disks["data"].size_bytes)
            opened.read_into(disks["data"].id, 0, whole)
            assert bytes(whole) == lab.copies[point]["data"].tobytes()
    lab.site.close()

    shutil.move(kept, incoming)
    lab.site = lab.open_site()
    assert lab.head.point == 4
    lab.copies[4] = lab.copy()
    assert lab.restores_exactly(4)
    assert lab.point().point == 5
    assert lab.restores_exactly(5)


def _marks_lost(lab: DamageLab, path: object) -> bool:
    try:
        with DeltaFileReader(lab.fs.open(path), Keyring(lab.fs, lab.directory / "keys")) as reader:  # type: ignore[arg-type]
            return reader.marks_lost
    except DamageError:
        return False
