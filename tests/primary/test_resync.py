"""Resync: what it costs on the wire and on the disk, and what becomes of a head that rots or lies."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from primary_lab import Lab, MiB

from replica import _native, documents
from replica.errors import (
    BaseMismatchError,
    BusyError,
    ConflictError,
    DamageError,
    RootMismatchError,
    SourceBusyError,
    TransportError,
)
from replica.model import DeltaId
from replica.plan import Mode
from replica.primary.enrol import enrol_machine
from replica.store import adopt_images, replica_directories
from replica.store.layout import Layout
from replica.transport.wire import GrainQuery, TreeQuery


def lose_state(lab: Lab) -> None:
    shutil.rmtree(lab.spec.state)


def test_an_unchanged_machine_without_state_is_read_once_and_sends_next_to_nothing(lab: Lab) -> None:
    lab.scribble("os", 0, 21 * MiB)
    lab.scribble("data", MiB, 5 * MiB)
    lab.sync()
    lose_state(lab)
    link = lab.link()
    result = lab.sync(link)
    assert (result.point, result.mode, result.bytes_changed, result.bytes_differing) == (2, Mode.RESYNC, 0, 0)
    assert result.bytes_scanned == 26 * MiB, "read once, not twice"
    assert "nodes" not in link.calls and "grains" not in link.calls, "equal disks are equal roots"
    assert link.bytes_sent < 5000
    lab.assert_equal()


def test_only_the_grains_that_differ_are_shipped(lab: Lab) -> None:
    lab.scribble("os", 0, 20 * MiB)
    lab.sync()
    lose_state(lab)
    lab.scribble("os", 7 * MiB, 1)
    lab.discard("os", 12 * MiB, 8192)
    link = lab.link()
    result = lab.sync(link)
    assert (result.mode, result.bytes_changed, result.bytes_differing) == (Mode.RESYNC, 3 * 4096, 2 * 16384)
    assert result.bytes_scanned == 20 * MiB - 8192 + 8 * MiB - 8192, "the windows that differ are read again, no more"
    assert link.calls.count("put_segment") == 1 and link.bytes_sent < 20_000
    lab.assert_equal()
    assert lab.sync().mode is Mode.INCREMENTAL


def test_a_machine_with_freeze_commands_is_compared_before_it_is_frozen(lab: Lab) -> None:
    log = lab.root / "log"
    log.touch()
    machine = lab.freezing(f"echo freeze >> {log}", f"echo thaw >> {log}")
    lab.scribble("os", 0, 9 * MiB)
    lab.sync(machine=machine)
    log.write_text("")
    lose_state(lab)
    lab.scribble("os", 5 * MiB, 10)
    link = lab.link()

    def before(name: str, _arguments: Any) -> None:
        if name in ("nodes", "grains"):
            assert log.read_text() == ""

    link.before = before
    result = lab.sync(link, machine=machine)
    assert (result.mode, result.bytes_changed) == (Mode.RESYNC, 4096)
    assert {"nodes", "grains"} <= set(link.calls) and log.read_text().split() == ["freeze", "thaw"]
    lab.assert_equal()


def test_it_can_be_forced_and_says_how_much_differed(lab: Lab) -> None:
    lab.scribble("os", 0, 9 * MiB)
    lab.sync()
    lab.scribble("os", 0, 4096)
    result = lab.sync(rebuild=True)
    assert (result.mode, result.bytes_changed, result.bytes_differing) == (Mode.RESYNC, 4096, 16384)
    lab.assert_equal()


def test_a_forced_resync_of_a_first_copy_is_a_first_copy(lab: Lab) -> None:
    lab.scribble("os", 0, MiB)
    assert lab.sync(rebuild=True).mode is Mode.INITIAL


def test_a_large_resync_is_a_series(lab: Lab) -> None:
    lab.spec = replace(lab.spec, part_bytes=4 * MiB)
    lab.scribble("os", 0, 3 * MiB)
    lab.sync()
    lose_state(lab)
    lab.scribble("os", 0, 18 * MiB)
    result = lab.sync()
    assert (result.point, result.mode) == (2, Mode.RESYNC) and result.parts >= 4
    lab.assert_equal()


def rot_head(lab: Lab, offset: int) -> None:
    (directory,) = replica_directories(lab.fs, lab.storage)
    disk = next(state.disk for state in lab.head.disks if state.disk.name == "os")
    with Layout(directory).image(disk.id).open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


def test_a_rotten_leaf_of_the_head_is_not_taken_for_known(lab: Lab) -> None:
    lab.scribble("os", 0, 5 * MiB)
    lab.sync()
    lose_state(lab)
    rot_head(lab, 40_000)
    lab.scribble("os", 2 * 16384 + 100, 10)
    sent: list[int] = []
    link = lab.link()

    def before(name: str, arguments: Any) -> None:
        if name == "put_segment":
            sent.append(len(arguments[5]))

    link.before = before
    with suppress(DamageError):  # what becomes of the rotten leaf is the receiver's affair
        lab.sync(link)
    assert sum(sent) >= 16384, "the whole leaf is shipped, whatever the rotten one looks like"


def test_a_head_that_lies_about_its_grains_is_found_out_by_the_roots(lab: Lab) -> None:
    """One grain of two that differ is said to be what the source has: the next delta's root is another."""
    lab.scribble("os", 0, 5 * MiB)
    lab.sync()
    lose_state(lab)
    lab.scribble("os", 0, 8192)
    true = lab.copy()["os"][:4096]
    link = lab.link()
    lies = 0

    def grains(replica_id: Any, disk_id: Any, query: GrainQuery) -> bytes:
        nonlocal lies
        link.calls.append("grains")
        answer = bytearray(lab.site.session("hv-1").grains(replica_id, disk_id, query))
        lies += 1
        if lies == 1:
            digest = np.zeros(1, "<u8")
            _native.scan(true, 4096, query.secret, None, digest, np.zeros(1, np.uint8))
            answer[:8] = digest.tobytes()
        return bytes(answer)

    link.grains = grains  # type: ignore[attr-defined]
    result = lab.sync(link)
    assert result.mode is Mode.RESYNC and result.bytes_changed >= 5 * MiB, "everything once, when all else failed"
    lab.assert_equal()
    assert link.calls.count("commit") >= 2


def test_a_damaged_tree_at_the_replica_is_no_base_for_anything(lab: Lab) -> None:
    lab.scribble("os", 0, 5 * MiB)
    lab.sync()
    lose_state(lab)
    link = lab.link()

    def nodes(replica_id: Any, disk_id: Any, query: TreeQuery) -> bytes:
        answer = bytearray(lab.site.session("hv-1").nodes(replica_id, disk_id, query))
        answer[0] ^= 1
        return bytes(answer)

    link.nodes = nodes  # type: ignore[attr-defined]
    lab.scribble("os", MiB, 5)
    result = lab.sync(link)
    assert (result.mode, result.bytes_changed) == (Mode.RESYNC, 5 * MiB)
    lab.assert_equal()


def test_a_damaged_state_document_is_no_hindrance_while_its_copy_stands(lab: Lab) -> None:
    lab.scribble("os", 0, MiB)
    lab.sync()
    session, head = lab.site.session("hv-1"), lab.head
    (directory,) = replica_directories(lab.fs, lab.storage)
    Layout(directory).state.write_bytes(b"rotten")
    disk = head.disks[0].disk
    assert len(session.nodes(head.replica_id, disk.id, TreeQuery(head.delta_id, 3, [(0, 256)]))) == 256 * 32


def test_answers_are_about_one_head_only(lab: Lab) -> None:
    lab.scribble("os", 0, MiB)
    lab.sync()
    session, head = lab.site.session("hv-1"), lab.head
    disk = head.disks[0].disk
    assert len(session.nodes(head.replica_id, disk.id, TreeQuery(head.delta_id, 3, [(0, 256)]))) == 256 * 32
    other = DeltaId(UUID(int=9))
    for question in (TreeQuery(other, 0, [(0, 1)]), GrainQuery(other, bytes(192), [(0, 1)])):
        with pytest.raises(BaseMismatchError) as caught:
            if isinstance(question, TreeQuery):
                session.nodes(head.replica_id, disk.id, question)
            else:
                session.grains(head.replica_id, disk.id, question)
        assert caught.value.head == head.delta_id
    (directory,) = replica_directories(lab.fs, lab.storage)
    with lab.fs.lock(Layout(directory).head_lock), pytest.raises(BusyError, match="being rewritten"):
        session.nodes(head.replica_id, disk.id, TreeQuery(head.delta_id, 0, [(0, 1)]))


def test_a_source_that_is_written_while_it_is_compared_makes_no_point(lab: Lab) -> None:
    """The stamps are older than the first read of the comparison, so what it found unchanged is part of the proof."""
    lab.scribble("os", 0, 9 * MiB)
    lab.sync()
    lose_state(lab)
    lab.scribble("os", 6 * MiB, 10)
    link = lab.link()

    def before(name: str, _arguments: Any) -> None:
        if name == "grains":
            lab.scribble("os", 100, 10)

    link.before = before
    with pytest.raises(SourceBusyError, match="was written"):
        lab.sync(link)
    assert "commit" not in link.calls and lab.head.point == 1
    result = lab.sync()
    assert (result.point, result.mode, result.bytes_changed) == (2, Mode.INCREMENTAL, 2 * 4096)
    lab.assert_equal()


@pytest.mark.parametrize("name", ["nodes", "grains"])
def test_a_link_that_breaks_in_a_comparison_costs_another_read(lab: Lab, name: str) -> None:
    lab.scribble("os", 0, 9 * MiB)
    lab.sync()
    lose_state(lab)
    lab.scribble("os", 6 * MiB, 10)
    link = lab.link()

    def before(called: str, _arguments: Any) -> None:
        if called == name:
            raise TransportError("the connection broke")

    link.before = before
    with pytest.raises(TransportError):
        lab.sync(link, retry_seconds=0)
    result = lab.sync()
    assert (result.point, result.mode, result.bytes_changed) == (2, Mode.RESYNC, 4096)
    lab.assert_equal()


# --- adopting what is there ---


def old_copies(lab: Lab) -> dict[str, Path]:
    copies = {name: lab.root / f"old-{name}.raw" for name in lab.images}
    for name, path in copies.items():
        shutil.copy(lab.images[name], path)
    return copies


def adopt(lab: Lab, images: dict[str, Path]) -> None:
    lab.site.close()
    (directory,) = replica_directories(lab.fs, lab.storage)
    try:
        adopt_images(lab.fs, directory, images)
    finally:
        lab.site = lab.open_site()


def test_old_copies_become_the_base_of_the_first_point(lab: Lab) -> None:
    lab.scribble("os", 0, 20 * MiB)
    lab.scribble("data", 2 * MiB, 3 * MiB)
    images = old_copies(lab)
    lab.scribble("os", 9 * MiB, 5)
    info = enrol_machine(lab.fs, lab.spec, lab.machine, lab.link())
    assert enrol_machine(lab.fs, lab.spec, lab.machine, lab.link()) == info and info.head.is_empty
    adopt(lab, images)
    assert lab.head.partial and lab.reader().points() == []
    link = lab.link()
    result = lab.sync(link)
    assert (result.replica_id, result.point, result.mode) == (info.replica_id, 1, Mode.RESYNC)
    assert result.bytes_changed == 4096 and link.bytes_sent < 20_000
    lab.assert_equal()
    assert lab.sync().mode is Mode.INCREMENTAL
    for state in lab.head.disks:
        assert (
            Layout(replica_directories(lab.fs, lab.storage)[0]).image(state.disk.id).stat().st_blocks * 512 < 24 * MiB
        )


def test_adoption_is_refused_where_it_could_lose_something(lab: Lab) -> None:
    images = old_copies(lab)
    enrol_machine(lab.fs, lab.spec, lab.machine, lab.link())
    (directory,) = replica_directories(lab.fs, lab.storage)
    with pytest.raises(BusyError, match="stop `replica serve`"):
        adopt_images(lab.fs, directory, images)
    lab.sync()
    with pytest.raises(ConflictError, match="has a head already"):
        adopt(lab, images)
    lab.assert_equal()


@pytest.mark.parametrize("size", [30 * MiB, 21 * MiB + 100, 9 * MiB + 5])
def test_adopted_images_may_have_had_another_size(lab: Lab, size: int) -> None:
    lab.scribble("os", 0, 21 * MiB)
    images = old_copies(lab)
    with images["os"].open("ab") as file:
        file.truncate(size)
    enrol_machine(lab.fs, lab.spec, lab.machine, lab.link())
    adopt(lab, images)
    result = lab.sync()
    assert (result.point, result.mode) == (1, Mode.RESYNC)
    lab.assert_equal()


def test_an_adoption_that_is_cut_leaves_an_empty_replica_and_no_rest(lab: Lab, monkeypatch: Any) -> None:
    lab.scribble("os", 0, MiB)
    images = old_copies(lab)
    enrol_machine(lab.fs, lab.spec, lab.machine, lab.link())
    real = documents.save

    def save(fs: Any, path: Path, value: Any, **options: Any) -> None:
        if path.name == "state" and not value.head.is_empty:
            raise KeyboardInterrupt
        real(fs, path, value, **options)

    with monkeypatch.context() as patch:
        patch.setattr(documents, "save", save)
        with pytest.raises(KeyboardInterrupt):
            adopt(lab, images)
    (directory,) = replica_directories(lab.fs, lab.storage)
    assert lab.head.is_empty
    assert list((directory / "head").iterdir()) == [], "the next start removes what was left"
    assert lab.sync().mode is Mode.INITIAL
    lab.assert_equal()


def test_a_receiver_that_refuses_whatever_comes_ends_the_cycle(lab: Lab) -> None:
    lab.scribble("os", 0, MiB)
    lab.sync()
    link = lab.link()

    def before(name: str, _arguments: Any) -> None:
        if name == "commit":
            raise RootMismatchError("another root")

    link.before = before
    with pytest.raises(RootMismatchError):
        lab.sync(link)
    assert link.calls.count("commit") == 3
    assert lab.sync().point == 2
    lab.assert_equal()
