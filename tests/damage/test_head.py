"""Rot in the head: found, told, repaired from the source, or lost in exactly the points that needed it."""

from __future__ import annotations

from pathlib import Path

import pytest

from replica.errors import DamageError, FencedError, LostError, ProtocolError
from replica.model import Epoch, random_id
from replica.store import damage
from replica.store.head import FileHead
from replica.transport.wire import digest_of
from tests.damage.damage_lab import LEAF, DamageLab, flip

LEAVES = 538984448
"""Where the leaves begin in a tree file."""


def verify(lab: DamageLab) -> int:
    """`replica verify`: notes what it finds; how many bytes that are, a tree counted as one."""
    reader = lab.reader()
    verdicts = reader.verify()
    damage.note_verdicts(lab.fs, reader.layout, verdicts)
    return sum(length for v in verdicts for _, length in v.mismatches) + sum(v.tree_unfit for v in verdicts)


def listed(lab: DamageLab) -> dict[int, bool]:
    return {info.state.point: info.restorable for info in lab.reader().points()}


@pytest.mark.parametrize("leaf", [0, 3, 5, 10], ids=["first", "middle", "unchanged since", "short last"])
def test_what_verify_finds_the_next_sync_repairs(lab: DamageLab, leaf: int) -> None:
    flip(lab.image_of("os"), leaf * LEAF + 20, 512)
    assert verify(lab) == (LEAF if leaf < 10 else 1234)
    assert listed(lab)[3] is False
    assert not lab.restores_exactly(3)
    last = min((leaf + 1) * LEAF, 10 * LEAF + 1234) - 1
    with lab.reader().open_point(3) as opened, pytest.raises(LostError, match="sync the machine first") as caught:
        restore(lab, opened)
    assert f"lost bytes {leaf * LEAF} to {last};" in str(caught.value), "as verify counts"
    assert not (lab.root / "out").exists()
    link = lab.link()
    result = lab.sync(link)
    assert result.bytes_repaired == (LEAF if leaf < 10 else 1234) and result.notices == ()
    assert link.calls.count("repair") == 1
    assert link.bytes_sent < 3 * LEAF
    assert verify(lab) == 0
    lab.copies[4] = lab.copy()
    assert listed(lab) == {1: True, 2: True, 3: True, 4: True}
    assert all(lab.restores_exactly(point) for point in listed(lab))
    assert not lab.reader().layout.damage.exists()


def test_a_long_repair_is_one_line_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    size = 5 << 20
    (tmp_path / "long").mkdir()
    lab = DamageLab(tmp_path / "long", 1, {"os": size, "data": 5 * LEAF})
    lab.scribble("os", 0, size)
    lab.sync()
    flip(lab.image_of("os"), 0, size)
    verify(lab)
    link = lab.link()
    assert lab.sync(link).bytes_repaired == size
    said = [r.getMessage() for r in caplog.records if r.name == "replica.receiver.slot" and r.levelname == "WARNING"]
    assert link.calls.count("repair") == 5 and len(said) == 1
    assert "(web-1): damage on disk os, bytes 0 to 1048575: repaired by the sender" in said[0]
    lab.site.close()


def test_points_that_do_not_read_the_damage_stay_restorable(lab: DamageLab) -> None:
    """Leaf 2 was written between points 2 and 3: of its first grain, the older points need nothing of the head."""
    flip(lab.image_of("os"), 2 * LEAF + 600, 1)
    lab.scribble("os", 7 * LEAF, 8 * 512)
    verify(lab)
    # The rest of the leaf is read by every point, and which grain of it rotted nobody knows.
    assert listed(lab) == {1: False, 2: False, 3: False}
    lab.sync()
    assert all(listed(lab).values())


def test_a_commit_that_meets_rot_is_repaired_in_the_same_call(lab: DamageLab) -> None:
    """Nobody verified: the delta touches the leaf, is refused, the leaf is sent as it was, and the delta goes again."""
    flip(lab.image_of("os"), 4 * LEAF + 9000)
    lab.scribble("os", 4 * LEAF, 100)  # another grain of it than the one that rotted
    link = lab.link()
    assert lab.sync(link).point == 4
    lab.copies[4] = lab.copy()
    assert link.calls.count("repair") == 1
    assert link.calls.count("begin") == 2
    assert verify(lab) == 0
    assert listed(lab) == {1: True, 2: True, 3: True, 4: True}
    assert all(lab.restores_exactly(point) for point in (1, 2, 3, 4))


def test_what_the_source_has_no_more_is_lost_in_the_points_that_need_it(lab: DamageLab) -> None:
    flip(lab.image_of("os"), 4 * LEAF + 10)
    lab.scribble("os", 4 * LEAF, 100)  # the very grain that rotted
    verify(lab)
    result = lab.sync()
    assert (result.point, result.bytes_repaired) == (4, 0)
    assert result.notices == (
        "1 leaves of the head rotted and have changed at the source since: older points may lack them",
    )
    lab.copies[4] = lab.copy()
    assert verify(lab) == 0
    assert lab.restores_exactly(4)
    for point in (1, 2, 3):
        with lab.reader().open_point(point) as opened, pytest.raises(DamageError):
            restore(lab, opened)
        assert not lab.restores_exactly(point)
        assert other_disk_is_exact(lab, point)
    infos = {info.state.point: info for info in lab.reader().points()}
    for point in (1, 2, 3):
        assert not infos[point].restorable
        (lost,) = infos[point].lost
        assert lost.disk == "os" and lost.offset >= 4 * LEAF and lost.offset + lost.length <= 5 * LEAF
    assert infos[4].restorable and not infos[4].lost
    assert lab.sync().point == 5, "replication goes on"
    lab.copies[5] = lab.copy()
    assert lab.restores_exactly(4) and lab.restores_exactly(5)


def restore(lab: DamageLab, opened: object) -> None:
    from replica.store import restore_point

    restore_point(lab.fs, opened, lab.root / "out", "raw")  # type: ignore[arg-type]


def other_disk_is_exact(lab: DamageLab, point: int) -> bool:
    """What is not in the lost range can be read as it was."""
    with lab.reader().open_point(point) as opened:
        disks = {disk.name: disk for disk in opened.disks}
        whole = bytearray(disks["data"].size_bytes)
        opened.read_into(disks["data"].id, 0, whole)
        before = bytearray(4 * LEAF)
        opened.read_into(disks["os"].id, 0, before)
    copy = lab.copies[point]
    return bytes(whole) == copy["data"].tobytes() and bytes(before) == copy["os"][: 4 * LEAF].tobytes()


def test_rot_that_is_replaced_without_a_mark_is_recovered_from_the_delta(lab: DamageLab) -> None:
    """Every grain of the leaf is in the delta, and the one that rotted did not change: the delta tells what it was."""
    flip(lab.image_of("os"), 4 * LEAF + 9000)
    lab.scribble("os", 4 * LEAF, 100)
    reader = lab.reader()
    os = next(d.disk for d in reader.head.disks if d.disk.name == "os")
    from replica.primary import repair

    class Whole(repair.Repair):
        def run(self, record: object, damaged: object) -> None:
            self.left = [damage.DamagedLeaves(os.id, 4, 5)]

    from replica.primary import cycle

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cycle, "Repair", Whole)
        link = lab.link()
        assert lab.sync(link).point == 4
    assert link.calls.count("begin") == 1
    lab.copies[4] = lab.copy()
    assert all(lab.restores_exactly(point) for point in (1, 2, 3, 4))


def test_only_what_the_root_proves_is_taken(lab: DamageLab) -> None:
    flip(lab.image_of("os"), 4 * LEAF, 4)
    verify(lab)
    rotten = lab.image_of("os").read_bytes()
    info = lab.site.session("hv-1").replicas("web-1")[0]
    os = next(d.disk for d in info.head.disks if d.disk.name == "os")
    assert [(d.first, d.stop) for d in info.damaged] == [(4, 5)]
    session = lab.site.session("hv-1")

    def put(first: int, content: bytes, epoch: Epoch = info.epoch) -> list[tuple[int, int]]:
        left = session.repair(info.replica_id, os.id, first, epoch, digest_of(content), content).leaves
        return [(d.first, d.stop) for d in left]

    assert put(4, bytes(LEAF)) == [(4, 5)]
    assert put(4, lab.copies[3]["os"][5 * LEAF : 6 * LEAF].tobytes()) == [(4, 5)]
    assert lab.image_of("os").read_bytes() == rotten
    with pytest.raises(FencedError):
        put(4, bytes(LEAF), Epoch(info.epoch.counter + 1, random_id()))
    for first, length in ((4, LEAF - 1), (10, LEAF), (11, 512), (0, 0)):
        with pytest.raises(ProtocolError):
            put(first, bytes(length))
    good = lab.copies[3]["os"].tobytes()
    assert put(3, good[3 * LEAF : 6 * LEAF]) == []
    assert put(3, good[3 * LEAF : 6 * LEAF]) == [], "the same again changes nothing"
    assert lab.image_of("os").read_bytes() == good
    assert session.replica(info.replica_id).damaged == ()


def test_a_mark_goes_only_when_the_repair_is_durable_and_was_read_back(
    lab: DamageLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(lab.image_of("os"), 4 * LEAF, 4)
    verify(lab)
    steps: list[str] = []
    flush, clear, read = FileHead.flush, damage.clear, FileHead.read_into

    def note(name: str, call: object) -> object:
        def noted(*arguments: object) -> object:
            steps.append(name)
            return call(*arguments)  # type: ignore[operator]

        return noted

    with monkeypatch.context() as patch:
        patch.setattr(FileHead, "drop_cache", note("drop", FileHead.drop_cache))
        patch.setattr(FileHead, "write", note("write", FileHead.write))
        patch.setattr(FileHead, "flush", note("flush", flush))
        patch.setattr(FileHead, "read_into", note("read", read))
        patch.setattr(damage, "clear", note("clear", clear))
        lab.sync()
    at = steps.index("write")
    assert steps[at : at + 5] == ["write", "flush", "drop", "read", "clear"]
    assert steps[:2] == ["drop", "read"], "what counts is what the device gives back, also of an earlier attempt"


def test_a_sender_cannot_make_good_leaves_lost(lab: DamageLab) -> None:
    """Marks of leaves that are good count for nothing: what a delta replaces there is sealed as it was."""
    reader = lab.reader()
    os = next(d.disk for d in reader.head.disks if d.disk.name == "os")
    damage.note(lab.fs, reader.layout, [damage.DamagedLeaves(os.id, 0, os.count_leaves)])
    lab.scribble("os", 0, 6 * LEAF)
    lab.sync()
    lab.copies[4] = lab.copy()
    assert all(lab.restores_exactly(point) for point in (1, 2, 3, 4))
    assert all(listed(lab).values())


def test_a_tree_that_rotted_is_made_anew_from_the_image(lab: DamageLab) -> None:
    for path, offset in (("os", LEAVES + 4 * 32), ("data", LEAVES), ("data", 0)):
        flip(lab.tree_of(path), offset, 8)
        assert verify(lab) > 0
        link = lab.link()
        lab.sync(link)
        assert verify(lab) == 0, (path, offset)
    point = max(listed(lab))
    lab.copies |= dict.fromkeys(range(4, point + 1), lab.copies[3])
    assert all(lab.restores_exactly(n) for n in range(1, point + 1))


@pytest.mark.parametrize("level", [1, 2, 3])
def test_inner_nodes_that_rotted_are_made_anew_by_the_next_commit(tmp_path: Path, level: int) -> None:
    """A node beside the path of what changes: without it the resulting root would be another one."""
    lab = DamageLab(tmp_path, sizes={"os": 9 << 20, "data": 4096})
    node = {1: 2113536 + 32, 2: 16384 + 32, 3: 8192 + 32}[level]
    flip(lab.tree_of("os"), node, 8)
    lab.scribble("os", 100, 100)
    link = lab.link()
    lab.point()
    lab.site.close()
    assert link.calls == []
    assert all(lab.restores_exactly(point) for point in (1, 2, 3, 4))
    assert verify(lab) == 0


def test_a_link_that_breaks_in_a_repair_is_tried_again(lab: DamageLab) -> None:
    from replica.errors import TransportError

    flip(lab.image_of("os"), 4 * LEAF)
    verify(lab)
    link, broken = lab.link(), [0]

    def break_once(name: str, _arguments: object) -> None:
        if name == "repair" and not broken[0]:
            broken[0] = 1
            raise TransportError("cut")

    link.after = break_once
    lab.sync(link)
    assert link.calls.count("repair") == 2
    assert verify(lab) == 0


def test_an_image_that_is_gone_is_sent_again_in_one_cycle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many leaves are named at a time, and but for those that the source has no more."""
    monkeypatch.setattr("replica.store.replica.MAX_LEAVES", 7)
    lab = DamageLab(tmp_path, sizes={"os": 60 * LEAF + 100, "data": LEAF})
    lab.scribble("os", 0, 60 * LEAF)
    lab.point()
    lab.site.close()
    lab.image_of("os").unlink()
    lab.site = lab.open_site()
    lab.scribble("os", 30 * LEAF, 100)
    link = lab.link()
    lab.point(link)
    assert link.bytes_sent < 70 * LEAF
    listed = lab.check_listed()
    assert listed[max(listed)]
    assert not lab.reader().marks.leaves
    lab.site.close()
