"""The damage matrix: every file of the store and of the tracker, damaged in every way, everywhere.

For each cell: nothing wrong is ever restored as good, whatever was done about the damage; `verify` and the next sync
repair it, or an error of a documented class names it; points that need nothing of it can be restored; and a repair
ships what was damaged and no more. `WHAT` says what must become of each file; docs/OPERATIONS.md tells it to people.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from replica.errors import DamageError, ReplicaError
from replica.model import State
from replica.signing import decode_public, verify
from replica.store import damage
from replica.store.marks import Marks
from replica.store.receipt_key import KEY_NAME
from replica.store.receipts import ReceiptFiles, ReceiptWord
from replica.store.verify_round import verify_replica
from tests.damage.damage_lab import LEAF, DamageLab, KiB, flip

POINTS = 4
NEWEST, MIDDLE, OLDEST = "inverse-newest", "inverse-middle", "inverse-oldest"
LOCKED_UNTIL_NS = 1 << 62


def _inverse(lab: DamageLab, place: int) -> Path:
    """The inverse that leads to point POINTS - place - 1."""
    wanted = POINTS - place - 1
    reader = lab.reader()
    reader.points()
    links = reader._index.chain().links
    return next(link.path for link in links if link.result.point == wanted)


def _receipt(lab: DamageLab, point: int) -> Path:
    state = next(info.state for info in lab.reader().points() if info.state.point == point)
    return lab.reader().layout.receipt(state.delta_id)


FILES: dict[str, Callable[[DamageLab], Path]] = {
    "replica.toml": lambda lab: lab.directory / "replica.toml",
    "identity.copy": lambda lab: lab.directory / "identity.copy",
    "state": lambda lab: lab.directory / "state",
    "state.copy": lambda lab: lab.directory / "state.copy",
    "head-image": lambda lab: lab.image_of("os"),
    "head-tree": lambda lab: lab.tree_of("os"),
    NEWEST: lambda lab: _inverse(lab, 0),
    MIDDLE: lambda lab: _inverse(lab, 1),
    OLDEST: lambda lab: _inverse(lab, 2),
    "store-key": lambda lab: next((lab.directory / "keys").iterdir()),
    "lock": lambda lab: lab.directory / "lock",
    "head.lock": lambda lab: lab.directory / "head.lock",
    "commit.lock": lambda lab: lab.directory / "commit.lock",
    "marks-damage": lambda lab: lab.directory / "marks" / "damage",
    "marks-retention": lambda lab: lab.directory / "marks" / "retention",
    "verify-head": lambda lab: lab.directory / "marks" / "verify-head",
    "verify-points": lambda lab: lab.directory / "marks" / "verify-points",
    "receipt-newest": lambda lab: _receipt(lab, POINTS),
    "receipt-oldest": lambda lab: _receipt(lab, 1),
    "receipt.key": lambda lab: lab.storage / KEY_NAME,
    "receipt.pub": lambda lab: (lab.storage / KEY_NAME).with_suffix(".pub"),
    "machine.json": lambda lab: lab.root / "state" / "web-1" / "machine.json",
    "status.json": lambda lab: lab.root / "state" / "web-1" / "status.json",
    "secret": lambda lab: _tracker(lab, "secret"),
    "digests": lambda lab: _tracker(lab, "digests"),
    "leaves": lambda lab: _tracker(lab, "leaves"),
    "sender-key": lambda lab: next(next((lab.root / "keys").iterdir()).iterdir()),
}


def _tracker(lab: DamageLab, name: str) -> Path:
    return lab.root / "state" / "web-1" / "disks" / lab.image_of("os").stem / name


# What becomes of it after `verify` and one or two syncs.
REPAIRED = "repaired"  # every point restores, and replication goes on
OLDER_LOST = "older points lost"  # replication goes on; points that read the file are not restorable
NAMED = "named"  # the machine stops with an error that says what to do; with what is right put back all goes on
NOTHING = "nothing happens"  # to points and to replication; `_check_locks` and `_check_receipts` say what else is true

WHAT: dict[str, set[str]] = {
    "replica.toml": {REPAIRED, NAMED},
    "identity.copy": {REPAIRED, NAMED},
    "state": {REPAIRED},
    "state.copy": {REPAIRED},
    "head-image": {REPAIRED},
    "head-tree": {REPAIRED},
    NEWEST: {OLDER_LOST},
    MIDDLE: {OLDER_LOST},
    OLDEST: {OLDER_LOST},
    "store-key": {NAMED},
    "lock": {NOTHING},
    "head.lock": {NOTHING},
    "commit.lock": {NOTHING},
    "marks-damage": {REPAIRED},
    "marks-retention": {NOTHING},
    "verify-head": {NOTHING},
    "verify-points": {NOTHING},
    "receipt-newest": {NOTHING},
    "receipt-oldest": {NOTHING},
    "receipt.key": {NOTHING},
    "receipt.pub": {NOTHING},
    "machine.json": {REPAIRED, NAMED},
    "status.json": {NOTHING},
    "secret": {REPAIRED},
    "digests": {REPAIRED},
    "leaves": {REPAIRED},
    "sender-key": {NAMED},
}
NEEDED_BY = {NEWEST: {1, 2, 3}, MIDDLE: {1, 2}, OLDEST: {1}}
"""Which points read an inverse."""


def _most_bytes(lab: DamageLab, kind: str, action: str) -> int:
    """What a repair may ship: the leaves that were touched, a disk whose image is gone, all of a lost tracker."""
    if kind in ("machine.json", "secret", "digests", "leaves"):
        return sum(array.nbytes for array in lab.data.values()) + 2 * LEAF
    if kind == "head-image":
        return 3 * LEAF if action in ("flip", "zero") else lab.data["os"].nbytes + LEAF
    return 2 * LEAF


def _at(size: int, where: str, length: int) -> int:
    return {"begin": 0, "middle": max(0, size // 2 - length), "end": max(0, size - length)}[where]


def _data_of(path: Path) -> int:
    """Bytes up to the end of the file's data: a tree is mostly hole, and damage to a hole is damage to nothing."""
    size, end, at = path.stat().st_size, 0, 0
    with path.open("rb") as file:
        while at < size:
            try:
                begin = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            at = end = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
    return end


def _flip(path: Path, where: str, _lab: DamageLab, _other: DamageLab) -> None:
    flip(path, _at(_data_of(path), where, 1))


def _cut(path: Path, where: str, _lab: DamageLab, _other: DamageLab) -> None:
    size = path.stat().st_size
    os.truncate(path, {"begin": 0, "middle": size // 2, "end": size - 1 if size else 0}[where])


def _zero(path: Path, where: str, _lab: DamageLab, _other: DamageLab) -> None:
    size = _data_of(path)
    length = min(4096, max(1, size // 3))
    with path.open("r+b") as file:
        file.seek(_at(size, where, length))
        file.write(bytes(length))


def _delete(path: Path, _where: str, _lab: DamageLab, _other: DamageLab) -> None:
    path.unlink()


def _older(path: Path, _where: str, lab: DamageLab, _other: DamageLab) -> None:
    before = lab.root / "older" / path.relative_to(lab.root)
    if not before.exists() or before.read_bytes() == path.read_bytes():
        pytest.skip("the file is written once, there is no older one")
    _copy(before, path)


def _neighbour(path: Path, _where: str, lab: DamageLab, other: DamageLab) -> None:
    """The file of the same kind that lies beside it: another disk's, another inverse, another replica's."""
    beside = sorted(p for p in path.parent.iterdir() if p.suffix == path.suffix and p != path and not p.is_symlink())
    kind = next(name for name, find in FILES.items() if find(lab) == path)
    if path.parent.name in ("head", "points") and beside:
        _copy(beside[0], path)
    else:
        _copy(FILES[kind](other), path)


ACTIONS: dict[str, tuple[Callable[[Path, str, DamageLab, DamageLab], None], tuple[str, ...]]] = {
    "flip": (_flip, ("begin", "middle", "end")),
    "cut": (_cut, ("begin", "middle", "end")),
    "zero": (_zero, ("begin", "middle", "end")),
    "delete": (_delete, ("all",)),
    "older": (_older, ("all",)),
    "neighbour": (_neighbour, ("all",)),
}
CELLS = [
    pytest.param(kind, action, where, id=f"{kind}-{action}-{where}")
    for kind in FILES
    for action, (_, places) in ACTIONS.items()
    for where in places
]


def _copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-a", "--sparse=auto", "--reflink=auto", source, target], check=True)


def _template(root: Path) -> DamageLab:
    lab = DamageLab(root, points=POINTS - 1)
    directory = lab.directory
    lab.site.close()
    older = root / "older"
    older.mkdir()
    for part in (directory.parent, root / "state"):
        _copy(part, older / part.name)
    lab.site = lab.open_site()
    lab.scribble("os", 3 * KiB, 9000)
    lab.scribble("os", 10 * 16 * KiB + 5, 100)
    lab.point()
    lab.site.close()
    return lab


def _mark(lab: DamageLab, leaf: int) -> None:
    """A mark on a leaf that is good, as a transient error of reading leaves it."""
    disk = next(d.disk for d in lab.head.disks if d.disk.name == "os")
    damage.note(lab.fs, lab.reader().layout, [damage.DamagedLeaves(disk.id, leaf, leaf + 1)])


def _prepare(lab: DamageLab, kind: str, action: str) -> None:
    """What the file is about, where the template has nothing of it."""
    older = lab.root / "older" / lab.directory.relative_to(lab.root)
    if kind == "marks-damage":
        _mark(lab, 1)
        _copy(lab.directory / "marks", older / "marks")
        _mark(lab, 5)
        if action == "neighbour":
            pytest.skip("the other replica has no damage")
    elif kind == "marks-retention":
        _marks(lab).lock(lab.reader().points()[0].state.delta_id, 1, LOCKED_UNTIL_NS)
    elif kind.startswith("verify-"):
        if action == "neighbour":
            pytest.skip("the other replica was not verified")
        for _ in range(2):
            if FILES[kind](lab).exists():
                _copy(FILES[kind](lab), older / "marks" / kind)
            verify_replica(lab.fs, lab.reader().layout, points=True)


def _marks(lab: DamageLab) -> Marks:
    return Marks(lab.fs, lab.reader().layout)


def _check_locks(lab: DamageLab, locked: State, action: str) -> None:
    """The point is locked, or nobody knows what is, and then everything is kept."""
    if action in ("older", "neighbour"):
        return  # a whole document, signed by nobody: docs/OPERATIONS.md says so
    try:
        assert locked.delta_id in _marks(lab).locked(_marks(lab).now())
    except DamageError as error:
        assert "every point is kept" in error.message


def _word(lab: DamageLab, state: State) -> ReceiptWord:
    return ReceiptFiles(lab.fs, lab.reader().layout).word(state)


def _check_receipts(lab: DamageLab) -> None:
    """What passes for a receipt is signed and of its point."""
    reader = lab.reader()
    files = ReceiptFiles(lab.fs, reader.layout)
    public = lab.storage / "receipt.pub"
    for info in reader.points():
        if files.word(info.state) in (ReceiptWord.SIGNED, ReceiptWord.PROVEN):
            signed = files.read(info.state.delta_id)
            assert signed.receipt.describes(info.state)
            verify(signed, decode_public(public.read_bytes(), "it"))


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> tuple[DamageLab, DamageLab]:
    return _template(tmp_path_factory.mktemp("one")), _template(tmp_path_factory.mktemp("other"))


@pytest.fixture
def cell(templates: tuple[DamageLab, DamageLab], tmp_path: Path) -> Iterator[DamageLab]:
    """A copy of the first template, its site closed."""
    root = tmp_path / "lab"
    _copy(templates[0].root, root)
    lab = DamageLab.taken_up(root, templates[0])
    yield lab
    if hasattr(lab, "site"):
        lab.site.close()


OUTCOMES: dict[str, set[str]] = {}


def _restorable(lab: DamageLab) -> set[int]:
    return {number for number in range(1, POINTS + 1) if _restores(lab, number)}


def _restores(lab: DamageLab, number: int) -> bool:
    try:
        return lab.restores_exactly(number)
    except ReplicaError:
        return False  # not even the replica can be looked at


def _verify(lab: DamageLab) -> None:
    try:
        reader = lab.reader()
        damage.note_verdicts(lab.fs, reader.layout, reader.verify())
    except (ReplicaError, ValueError):
        pass  # it says so by itself; the sync that follows is what counts


def _sync(lab: DamageLab) -> tuple[ReplicaError | None, int]:
    link = lab.link()
    try:
        lab.point(link)
    except ReplicaError as error:
        return error, link.bytes_sent
    return None, link.bytes_sent


@pytest.mark.parametrize(("kind", "action", "where"), CELLS)
def test_cell(templates: tuple[DamageLab, DamageLab], cell: DamageLab, kind: str, action: str, where: str) -> None:
    _prepare(cell, kind, action)
    oldest = cell.reader().points()[0].state
    path = FILES[kind](cell)
    good = cell.root / "good"
    _copy(path, good)
    ACTIONS[action][0](path, where, cell, templates[1])

    before = _restorable(cell)  # whatever restores is exact, or this fails
    assert before >= set(range(1, POINTS + 1)) - NEEDED_BY.get(kind, set(range(1, POINTS + 1)))
    cell.site = cell.open_site()
    _verify(cell)
    error, sent = _sync(cell)
    if error is not None and error.retryable:
        error, more = _sync(cell)
        sent += more
    assert sent <= _most_bytes(cell, kind, action), "no more is shipped than what was damaged"
    outcome = REPAIRED
    if error is not None:
        outcome = NAMED
        assert error.exit_code != 1 and (error.hint or error.message), "an error that says what to do"
        cell.site.close()
        if kind in ("replica.toml", "identity.copy"):
            (cell.directory / "replica.toml").unlink(missing_ok=True)
            _copy(good, path)
        else:
            path.unlink(missing_ok=True)
            _copy(good, path)
        cell.site = cell.open_site()
        after, _ = _sync(cell)
        assert after is None, f"with the file put back nothing is wrong, but {after}"
    if kind == "marks-retention":
        _check_locks(cell, oldest, action)
    if kind.startswith("verify-"):
        report = verify_replica(cell.fs, cell.reader().layout, points=True)
        assert report.ok
    if kind.startswith("receipt"):
        cell.site.close()
        if kind in ("receipt.key", "receipt.pub"):
            path.unlink(missing_ok=True)
            _copy(good, path)
        cell.site = cell.open_site()
        assert _sync(cell)[0] is None
        _check_receipts(cell)
        words = [_word(cell, info.state) for info in cell.reader().points()]
        assert ReceiptWord.MISSING not in words, "what could not be signed is signed later"
        assert words.count(ReceiptWord.DAMAGED) <= (kind in ("receipt-newest", "receipt-oldest"))
    after_points = _restorable(cell)
    if after_points != set(range(1, POINTS + 1)):
        outcome = OLDER_LOST
        assert kind in NEEDED_BY, f"points {sorted(after_points)} are all that is left"
        assert after_points >= set(range(1, POINTS + 1)) - NEEDED_BY[kind]
    elif kind in NEEDED_BY:
        outcome = OLDER_LOST  # what was damaged is not what any point reads
    elif WHAT[kind] == {NOTHING}:
        outcome = NOTHING
    assert outcome in WHAT[kind], f"{outcome}: {error}"
    newest = max(cell.copies)
    assert cell.restores_exactly(newest)
    listed = {info.state.point: info.restorable for info in cell.reader().points()}
    assert listed[newest]
    OUTCOMES.setdefault(kind, set()).add(outcome)
