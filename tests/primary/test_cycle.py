"""Whole cycles against a real replica site in this process."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from primary_lab import Lab, Link, MiB

from replica import images
from replica.delta import Keyring, decode_header
from replica.errors import (
    BusyError,
    ConflictError,
    FencedError,
    FreezeError,
    ImageError,
    KeyMissingError,
    ReplicaError,
    SizeChangedError,
    SourceBusyError,
    StorageError,
    TransportError,
)
from replica.model import Consistency, State
from replica.plan import Mode
from replica.primary.cycle import sync_machine
from replica.primary.record import MachineDirectory
from replica.primary.retry import Stopped
from replica.receipt import SignedReceipt
from replica.signing import sign
from replica.store import replica_directories
from replica.store.receipts import ReceiptBook
from replica.transport.wire import to_problem


def disks_directory(lab: Lab) -> Path:
    return lab.spec.machine_directory("web-1") / "disks"


def journals(lab: Lab) -> list[str]:
    names = {path.name for path in lab.spec.machine_directory("web-1").iterdir()}
    return sorted(names & {"pending", "folding", ".pending.tmp", "frozen"})


def test_points_of_a_machine_restore_exactly(lab: Lab) -> None:
    lab.scribble("os", 0, 5 * MiB)
    lab.scribble("os", 21 * MiB, 1234)
    lab.scribble("data", 3 * MiB + 5, 100_000)
    first = lab.sync()
    assert (first.machine, first.point, first.mode) == ("web-1", 1, Mode.INITIAL)
    assert first.roots == lab.head.roots and set(first.roots) == {"os", "data"}
    assert first.frozen_at_ns == lab.head.frozen_at_ns
    assert first.replica_id == lab.head.replica_id
    versions = {1: lab.copy()}
    for point in range(2, 6):
        lab.scribble("os", point * 3 * MiB + 77, 10_000)
        lab.scribble("data", point * 12345, 3)
        lab.discard("os", point * MiB, 8192)
        result = lab.sync()
        assert (result.point, result.mode) == (point, Mode.INCREMENTAL)
        versions[point] = lab.copy()
        assert journals(lab) == []
    for point, data in versions.items():
        lab.assert_equal(point, data)


def test_only_changed_grains_travel_and_only_allocated_ranges_are_read(lab: Lab) -> None:
    lab.scribble("os", 4 * MiB, 2 * MiB)
    first = lab.sync()
    assert first.bytes_scanned == first.bytes_changed == 2 * MiB
    lab.scribble("os", 5 * MiB, 1)
    second = lab.sync()
    assert second.bytes_changed == 4096
    assert second.bytes_scanned == 2 * MiB
    assert second.bytes_wire < 4096 + 4096 + 2500
    lab.discard("os", 4 * MiB, 8192)
    assert lab.sync().bytes_changed == 8192, "zeroed grains are changed grains"
    lab.assert_equal()


def test_an_unchanged_machine_makes_a_point_and_sends_next_to_nothing(lab: Lab) -> None:
    lab.scribble("os", 0, MiB)
    lab.sync()
    result = lab.sync()
    assert result.point == 2 and result.bytes_changed == 0
    assert result.bytes_wire < 4096
    assert lab.head.point == 2


def test_a_machine_without_content_is_a_point_too(lab: Lab) -> None:
    assert lab.sync().point == 1
    lab.assert_equal()


def test_progress_reaches_its_total(lab: Lab) -> None:
    lab.scribble("os", 0, 6 * MiB)
    lab.scribble("data", MiB, MiB)
    seen: list[tuple[int, int]] = []
    lab.sync(progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (7 * MiB, 7 * MiB)
    assert {total for _, total in seen} == {7 * MiB}


# --- one instant ---


def test_a_source_that_is_written_makes_no_point_and_costs_nothing(lab: Lab) -> None:
    lab.scribble("os", 0, 5 * MiB)
    lab.sync()
    lab.scribble("os", 0, 100)
    link = lab.link()
    with pytest.raises(SourceBusyError, match=r"os\.raw was written while it was read.*freeze"):
        lab.sync(link, progress=lambda _done, _total: lab.scribble("os", 4 * MiB, 10))
    assert lab.head.point == 1 and journals(lab) == []
    assert "commit" not in link.calls and link.calls[-1] == "discard"
    assert lab.sync().point == 2
    lab.assert_equal()


def test_commands_bracket_the_read_and_the_guest_does_not_wait_for_the_link(lab: Lab) -> None:
    log = lab.root / "log"
    log.touch()
    machine = lab.freezing(f"echo freeze >> {log}", f"echo thaw >> {log}", consistency=Consistency.APPLICATION)
    link = lab.link()
    thawed = threading.Event()

    def before(name: str, _arguments: Any) -> None:
        if name == "begin":
            assert log.read_text() == "", "the receiver may refuse: nothing is frozen before it has agreed"
        if name == "put_segment":
            for _ in range(500):
                if "thaw" in log.read_text():
                    break
                thawed.wait(0.02)
            assert log.read_text().split() == ["freeze", "thaw"], "no segment arrives before the thaw"

    lab.sync()
    link.before = before
    lab.scribble("os", 0, 20 * MiB)
    lab.sync(link, machine=machine)
    assert lab.head.consistency is Consistency.APPLICATION
    lab.assert_equal()


def test_a_freeze_that_lasts_too_long_is_refused(lab: Lab) -> None:
    log = lab.root / "log"
    lab.scribble("os", 0, 9 * MiB)
    machine = lab.freezing("true", f"echo thaw >> {log}", freeze_limit_seconds=0.5)
    pause = threading.Event()
    with pytest.raises(FreezeError, match=r"limit of 0\.5 s"):
        lab.sync(machine=machine, progress=lambda _done, _total: pause.wait(0.4))
    assert log.read_text() == "thaw\n"
    assert journals(lab) == [] and lab.reader().points() == []


def test_the_snapshot_that_freeze_names_is_read(lab: Lab) -> None:
    lab.scribble("os", 0, 5 * MiB)
    snapshot = lab.root / "snapshots"
    snapshot.mkdir()
    machine = lab.freezing(
        f"cp --sparse=always $REPLICA_DISK_0_IMAGE {snapshot}/0 && echo os={snapshot}/0;"
        "printf boot | dd of=$REPLICA_DISK_0_IMAGE conv=notrunc status=none",
        f"rm {snapshot}/0",
    )
    lab.sync(machine=machine)
    lab.assert_equal()
    assert list(snapshot.iterdir()) == []


def test_a_marked_machine_is_thawed_before_anything_else(lab: Lab) -> None:
    log = lab.root / "log"
    machine = lab.freezing("true", f"echo thaw >> {log}; test -e {lab.root}/fixed")
    with pytest.raises(FreezeError, match="thawing machine 'web-1' failed"):
        lab.sync(machine=machine)
    link = lab.link()
    with pytest.raises(FreezeError, match="still frozen"):
        lab.sync(link, machine=machine)
    assert link.calls == []
    (lab.root / "fixed").touch()
    assert lab.sync(machine=machine).point == 1
    assert log.read_text().split() == ["thaw"] * 4


# --- the link ---


def cut(link: Link, name: str, *times: int, after: bool = False) -> None:
    """Break the connection at these calls of `name` (from 0), before they arrive or with their answer lost."""
    count = -1

    def hook(called: str, _arguments: Any) -> None:
        nonlocal count
        if called == name:
            count += 1
            if count in times:
                raise TransportError("the connection broke")

    if after:
        link.after = hook
    else:
        link.before = hook


@pytest.mark.parametrize("after", [False, True], ids=["request-lost", "answer-lost"])
@pytest.mark.parametrize(("name", "times"), [("begin", (0, 1)), ("put_segment", (0, 2, 3)), ("commit", (0, 1))])
def test_a_cut_is_resumed_without_sending_again_what_arrived(
    lab: Lab, name: str, times: tuple[int, ...], after: bool
) -> None:
    lab.scribble("os", 0, 20 * MiB)
    link = lab.link()
    cut(link, name, *times, after=after)
    arrived: list[int] = []
    session_put = link.before

    def before(called: str, arguments: Any) -> None:
        session_put(called, arguments)
        if called == "put_segment":
            arrived.append(arguments[2])

    link.before = before
    assert lab.sync(link, retry_seconds=30).point == 1
    lab.assert_equal()
    assert arrived == sorted(set(arrived)), "no segment travelled twice"
    assert len(arrived) == 5
    assert journals(lab) == []


def test_a_connection_that_stays_broken_is_reported_and_costs_nothing(lab: Lab) -> None:
    lab.scribble("os", 0, 9 * MiB)
    lab.sync()
    lab.scribble("os", 0, 5000)
    link = lab.link()
    cut(link, "put_segment", *range(100))
    with pytest.raises(TransportError, match="the connection broke"):
        lab.sync(link, retry_seconds=0.5)
    assert 1 < link.calls.count("put_segment") < 5
    assert journals(lab) == []
    result = lab.sync()
    assert result.point == 2 and result.bytes_changed == 8192
    lab.assert_equal()


def test_a_lost_commit_answer_is_found_out_by_the_next_cycle(lab: Lab) -> None:
    lab.scribble("os", 0, 5 * MiB)
    link = lab.link()
    cut(link, "commit", *range(100), after=True)
    with pytest.raises(TransportError):
        lab.sync(link, retry_seconds=0)
    assert journals(lab) == ["pending"]
    result = lab.sync()
    assert (result.point, result.mode, result.bytes_changed) == (2, Mode.INCREMENTAL, 0)
    lab.assert_equal(1)


@pytest.mark.parametrize("answer_lost", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_a_receipt_of_something_else_is_not_believed(lab: Lab, first: bool, answer_lost: bool) -> None:
    """A receiver that signs other roots than were shipped: the point is made good by shipping everything."""
    if not first:
        lab.scribble("os", 0, 65536)
        lab.sync()
        assert (lab.root / "state/web-1/receipt").read_bytes() == lab.reader().receipt(1)
    lab.scribble("os", 0, 65536)
    link, lies = lab.link(), [0]
    honest = ReceiptBook.newest

    def lie(book: ReceiptBook, head: State) -> SignedReceipt | None:
        signed = honest(book, head)
        if signed is None or head.point != (1 if first else 2):
            return signed
        lies[0] += 1
        wrong = [msgspec.structs.replace(disk, root="0" * 64) for disk in signed.receipt.disks]
        return sign(msgspec.structs.replace(signed.receipt, disks=tuple(wrong)), Ed25519PrivateKey.generate())

    if answer_lost:
        cut(link, "commit", *range(100), after=True)
        with pytest.raises(TransportError):
            lab.sync(link, retry_seconds=0)
        link = lab.link()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReceiptBook, "newest", lie)
        result = lab.sync(link)
    assert lies[0] and result.mode is Mode.RESYNC
    assert (lab.root / "state/web-1/receipt").read_bytes() == lab.reader().receipt(result.point)
    lab.assert_equal()
    lab.scribble("os", 4096, 4096)
    assert lab.sync().mode is Mode.INCREMENTAL


def test_a_commit_that_never_arrived_is_shipped_anew(lab: Lab) -> None:
    lab.scribble("os", 0, 5 * MiB)
    lab.sync()
    lab.scribble("os", 0, 4096)
    link = lab.link()
    cut(link, "commit", *range(100))
    with pytest.raises(TransportError):
        lab.sync(link, retry_seconds=0)
    again = lab.link()
    result = lab.sync(again)
    assert (result.point, result.mode, result.bytes_changed) == (2, Mode.INCREMENTAL, 4096)
    assert "discard" in again.calls, "only when the receiver has given it up it is definite"
    lab.assert_equal()


def test_once_the_commit_was_asked_for_nothing_is_discarded(lab: Lab) -> None:
    lab.scribble("os", 0, MiB)
    link = lab.link()

    def after(name: str, _arguments: Any) -> None:
        if name == "commit":
            raise StorageError("it said, but who knows what it did")

    link.after = after
    with pytest.raises(StorageError):
        lab.sync(link)
    assert "discard" not in link.calls and journals(lab) == ["pending"]
    assert lab.sync().mode is Mode.INCREMENTAL


def test_the_receiver_may_restart_in_the_middle(lab: Lab) -> None:
    lab.scribble("os", 0, 20 * MiB)
    link = lab.link()
    count = 0

    def before(name: str, _arguments: Any) -> None:
        nonlocal count
        if name == "put_segment":
            count += 1
            if count == 3:
                lab.restart_site()
                raise TransportError("the connection broke")
        elif name == "commit" and count < 100:
            count = 100
            lab.restart_site()

    link.before = before
    assert lab.sync(link).point == 1
    lab.assert_equal()


def test_segments_lost_after_their_acknowledgement_end_the_delta(lab: Lab) -> None:
    lab.scribble("os", 0, 20 * MiB)
    link = lab.link()
    broken = False

    def before(name: str, arguments: Any) -> None:
        nonlocal broken
        if name == "put_segment" and arguments[2] == 3 and not broken:
            broken = True
            lab.site.close()
            (directory,) = replica_directories(lab.fs, lab.storage)
            shutil.rmtree(directory / "incoming")
            (directory / "incoming").mkdir()
            lab.site = lab.open_site()
            raise TransportError("the connection broke")

    link.before = before
    with pytest.raises(StorageError, match="lost 3 segments") as caught:
        lab.sync(link)
    assert caught.value.retryable
    assert lab.sync().point == 1
    lab.assert_equal()


@pytest.mark.parametrize(("attempts", "size", "retry_seconds"), [(24, 9 * MiB, 0.3), (1000, MiB, 0)])
def test_no_delta_id_and_no_salt_is_used_twice(lab: Lab, attempts: int, size: int, retry_seconds: float) -> None:
    """Whatever is read again is a new delta with a new key: no (key, nonce) pair can repeat."""
    headers: dict[str, set[bytes]] = {}
    blobs: dict[tuple[str, int], set[bytes]] = {}

    def observe(name: str, arguments: Any) -> None:
        if name == "begin":
            headers.setdefault(str(arguments[1]), set()).add(arguments[2].header)
        elif name == "put_segment":
            blobs.setdefault((str(arguments[1]), arguments[2]), set()).add(bytes(arguments[5]))

    lab.scribble("os", 0, size)
    for attempt in range(attempts):
        link = lab.link()
        cut(link, ("put_segment", "commit")[attempt % 2], attempt % 3, 4, after=attempt % 4 < 2)
        broken = link.before

        def before(name: str, arguments: Any, broken: Callable[..., None] = broken) -> None:
            observe(name, arguments)
            broken(name, arguments)

        link.before = before
        lab.scribble("os", attempt * 1000, 100)
        with suppress(TransportError):
            lab.sync(link, retry_seconds=(0, retry_seconds)[2 * attempt // attempts])
    assert all(len(found) == 1 for found in headers.values()), "one header per delta"
    assert all(len(found) == 1 for found in blobs.values()), "one ciphertext per delta and segment"
    salts = [decode_header(next(iter(found))).salt for found in headers.values()]
    assert len(set(salts)) == len(salts) >= attempts
    assert lab.sync().point > 1
    lab.assert_equal()


# --- state that is lost, old, or wrong ---


def test_a_sender_that_lost_its_state_finds_its_replica_again(lab: Lab) -> None:
    lab.scribble("os", 0, 5 * MiB)
    lab.scribble("data", 0, 5 * MiB)
    first = lab.sync()
    before = lab.head
    saved = lab.root / "saved"
    shutil.move(lab.spec.state, saved)
    lab.discard("os", 4096, 4096)
    lab.scribble("data", 1, 1)
    result = lab.sync()
    assert (result.replica_id, result.point, result.mode) == (first.replica_id, 2, Mode.RESYNC)
    assert [s.disk for s in lab.head.disks] == [s.disk for s in before.disks]
    assert lab.head.epoch.counter == before.epoch.counter + 1
    lab.assert_equal()
    assert lab.sync().mode is Mode.INCREMENTAL

    shutil.rmtree(lab.spec.state)
    shutil.move(saved, lab.spec.state)
    with pytest.raises(FencedError, match="another primary took the replica over"):
        lab.sync()


def test_lost_state_and_lost_key_stop(lab: Lab) -> None:
    first = lab.sync()
    shutil.rmtree(lab.spec.state)
    shutil.move(lab.spec.keys, lab.root / "escrow")
    with pytest.raises(KeyMissingError, match=f"{first.replica_id}.*escrow"):
        lab.sync()
    shutil.move(lab.root / "escrow", lab.spec.keys)
    assert lab.sync().point == 2


def test_a_lost_key_alone_stops(lab: Lab) -> None:
    lab.sync()
    shutil.rmtree(lab.spec.keys)
    with pytest.raises(KeyMissingError, match="escrow"):
        lab.sync()


def test_another_certificate_has_its_own_replica(lab: Lab) -> None:
    lab.scribble("os", 0, MiB)
    first = lab.sync()
    shutil.rmtree(lab.spec.state)
    other = lab.sync(lab.link("hv-2"))
    assert other.replica_id != first.replica_id and other.point == 1


def test_an_old_copy_of_the_state_is_noticed(lab: Lab) -> None:
    """Put back from a backup, the trackers describe a state the replica has left."""
    lab.scribble("os", 0, 5 * MiB)
    lab.sync()
    subprocess.run(["cp", "-a", "--sparse=always", lab.spec.state, lab.root / "saved"], check=True)
    lab.scribble("os", 0, 5000)
    lab.sync()
    shutil.rmtree(lab.spec.state)
    shutil.move(lab.root / "saved", lab.spec.state)
    lab.discard("os", 0, 8192)
    result = lab.sync()
    assert (result.point, result.mode) == (3, Mode.RESYNC)
    lab.assert_equal()


def test_a_copied_state_directory_is_fenced_not_taken_turns_with(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    lab.scribble("os", 0, 5 * MiB)
    lab.sync()
    copy = replace(lab.spec, state=lab.root / "copy")
    subprocess.run(["cp", "-a", "--sparse=always", lab.spec.state, copy.state], check=True)
    lab.scribble("os", 0, 5000)
    lab.sync()
    result = sync_machine(lab.fs, copy, lab.machine, lab.link(), retry_seconds=0)
    assert (result.point, result.mode) == (3, Mode.RESYNC)
    assert "a copy of this state directory is at work" in caplog.text
    for _ in range(2):
        with pytest.raises(FencedError, match="copy of this host.*move this machine's state directory away"):
            lab.sync()
    assert sync_machine(lab.fs, copy, lab.machine, lab.link(), retry_seconds=0).mode is Mode.INCREMENTAL
    assert lab.head.epoch.counter == 2 and lab.head.point == 4
    lab.assert_equal()


def test_digests_that_became_a_hole_ship_everything_once(lab: Lab) -> None:
    lab.scribble("os", 0, 9 * MiB)
    lab.sync()
    digests = disks_directory(lab) / disk_id(lab, "os") / "digests"
    subprocess.run(["fallocate", "--punch-hole", "-o", "8192", "-l", "8192", digests], check=True)
    lab.write("os", 4 * MiB, bytes(4 * MiB))
    result = lab.sync()
    assert (result.point, result.mode) == (2, Mode.RESYNC)
    lab.assert_equal()
    assert lab.sync().mode is Mode.INCREMENTAL


def test_digests_of_another_point_are_not_compared_with(lab: Lab) -> None:
    lab.scribble("os", 0, 5 * MiB)
    lab.sync()
    files = [disks_directory(lab) / disk_id(lab, "os") / name for name in ("digests", "windows")]
    before = [file.read_bytes() for file in files]
    earlier = lab.copy()
    lab.scribble("os", MiB, 4096)
    lab.sync()
    for file, data in zip(files, before, strict=True):
        file.write_bytes(data)
    lab.write("os", MiB, earlier["os"][MiB : MiB + 4096])
    result = lab.sync()
    assert (result.mode, result.bytes_changed, result.bytes_differing) == (Mode.RESYNC, 4096, 16384)
    lab.assert_equal()


def test_a_stopped_replica_without_a_head_is_not_taken_for_none(lab: Lab) -> None:
    lab.scribble("os", 0, MiB)
    first = lab.sync()
    shutil.rmtree(lab.spec.state)
    info = lab.link().replica(first.replica_id)
    empty = State.empty(first.replica_id, info.epoch)
    stopped = msgspec.structs.replace(info, head=empty, stopped=to_problem(StorageError("its state is rotten")))
    link = lab.link()
    link.replicas = lambda _machine: [stopped]  # type: ignore[attr-defined]
    with pytest.raises(ConflictError, match="cannot read: its state is rotten.*no other one is made"):
        lab.sync(link)
    assert "enrol" not in link.calls and "adopt" not in link.calls
    assert lab.sync().mode is Mode.RESYNC


@pytest.mark.parametrize("what", ["digests", "windows", "leaves", "secret"])
def test_a_tracker_that_lost_a_file_reads_its_disk_anew(lab: Lab, what: str) -> None:
    lab.scribble("os", 0, 5 * MiB)
    lab.scribble("data", 0, 3 * MiB)
    lab.sync()
    (lost,) = [p for p in disks_directory(lab).glob(f"*/{what}") if p.parent.name == disk_id(lab, "data")]
    lost.unlink()
    lab.discard("data", 4096, 4096)
    result = lab.sync()
    assert result.mode is Mode.RESYNC
    assert result.bytes_changed == 4096, "one disk is compared with the replica, the other with its tracker"
    lab.assert_equal()


def disk_id(lab: Lab, name: str) -> str:
    return next(str(state.disk.id) for state in lab.head.disks if state.disk.name == name)


def test_rotten_leaves_are_found_by_the_receiver_and_everything_is_shipped_once(lab: Lab) -> None:
    lab.scribble("os", 0, 5 * MiB)
    lab.sync()
    with (disks_directory(lab) / disk_id(lab, "os") / "leaves").open("r+b") as file:
        file.seek(538984448 + 5 * 32)
        file.write(b"rot")
    lab.scribble("os", 0, 1)
    result = lab.sync()
    assert (result.point, result.mode) == (2, Mode.RESYNC)
    lab.assert_equal()
    assert lab.sync().mode is Mode.INCREMENTAL


def test_a_damaged_journal_is_not_used(lab: Lab) -> None:
    lab.scribble("os", 0, 5 * MiB)
    link = lab.link()
    cut(link, "commit", *range(100), after=True)
    with pytest.raises(TransportError):
        lab.sync(link, retry_seconds=0)
    path = lab.spec.machine_directory("web-1") / "pending"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    result = lab.sync()
    assert (result.point, result.mode) == (2, Mode.RESYNC)
    lab.assert_equal()


def test_a_damaged_record_says_what_to_do(lab: Lab) -> None:
    lab.sync()
    path = lab.spec.machine_directory("web-1") / "machine.json"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ReplicaError, match="machine.json is damaged.*move .* away"):
        lab.sync()


def test_keys_are_private_and_never_in_state(lab: Lab) -> None:
    lab.scribble("os", 0, MiB)
    lab.sync()
    (key,) = lab.spec.keys.rglob("*.key")
    assert key.stat().st_mode & 0o777 == 0o600
    secret = Keyring(lab.fs, key.parent).newest
    assert secret is not None
    for path in (
        p for p in lab.spec.state.rglob("*") if p.is_file() and p.name not in ("digests", "windows", "leaves")
    ):
        assert secret.secret not in path.read_bytes()
    assert lab.spec.machine_directory("web-1").stat().st_mode & 0o077 == 0


# --- refusals ---


def test_a_second_sync_at_the_same_time_is_refused(lab: Lab) -> None:
    directory = MachineDirectory(lab.fs, lab.spec.machine_directory("web-1"))
    with directory.locked("web-1"), pytest.raises(BusyError, match="another sync or run is working on machine 'web-1'"):
        lab.sync()
    assert lab.sync().point == 1


def test_a_disk_resized_between_measuring_and_opening_makes_no_point(lab: Lab) -> None:
    lab.scribble("data", 0, MiB)
    lab.sync()
    link = lab.link()

    def before(name: str, _arguments: Any) -> None:
        if name == "begin":
            os.truncate(lab.images["data"], 10 * MiB)

    link.before = before
    with pytest.raises(SizeChangedError, match="has 10485760 bytes where 9437184 were expected"):
        lab.sync(link)
    os.truncate(lab.images["data"], 9 * MiB)
    assert lab.sync().point == 2


def test_before_the_first_point_disks_may_change(lab: Lab) -> None:
    lab.scribble("os", 0, MiB)
    link = lab.link()
    cut(link, "begin", *range(10))
    with pytest.raises(TransportError):
        lab.sync(link, retry_seconds=0)
    lab.data["data"] = lab.data["data"][: 2 * MiB].copy()
    with lab.images["data"].open("r+b") as file:
        file.truncate(2 * MiB)
    assert lab.sync().point == 1
    lab.assert_equal()
    assert lab.sync().mode is Mode.INCREMENTAL


def test_a_vanished_image_is_named(lab: Lab) -> None:
    lab.sync()
    lab.images["data"].rename(lab.root / "elsewhere")
    with pytest.raises(ImageError, match=r"data\.raw"):
        lab.sync()
    assert lab.head.point == 1


def test_stopping_ends_in_the_middle(lab: Lab) -> None:
    lab.scribble("os", 0, 20 * MiB)
    stop = threading.Event()
    link = lab.link()
    link.before = lambda name, _arguments: stop.set() if name == "put_segment" else None
    with pytest.raises(Stopped):
        lab.sync(link, stop=stop)
    assert journals(lab) == [] and lab.head.is_empty
    assert lab.sync().point == 1
    lab.assert_equal()


def test_a_stopped_replica_is_asked_to_recover(lab: Lab) -> None:
    """A full disk at the receiver, say: the next cycle goes on by itself when the cause is gone."""
    lab.scribble("os", 0, MiB)
    first = lab.sync()
    slot = lab.site.slot("hv-1", first.replica_id)
    slot.store().stopped = StorageError("it was full")
    lab.scribble("os", 0, 1)
    link = lab.link()
    assert lab.sync(link).point == 2
    assert "adopt" in link.calls


def test_thaw_finds_no_image_open(lab: Lab) -> None:
    """It may remove the snapshot that was read: an open file would keep a mount or volume busy."""
    snap = lab.root / "snap.raw"
    look = f"! ls -l /proc/{os.getpid()}/fd | grep -q {snap}"
    machine = lab.freezing(f"cp {lab.images['os']} {snap}; echo os={snap}", look)
    lab.scribble("os", 0, 4096)
    assert lab.sync(machine=machine).point == 1
    lab.assert_equal()


def test_an_image_swapped_while_it_is_opened_makes_no_point(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was stamped is not what was opened, and the path names the stamped file again at the end."""
    other = lab.root / "other.raw"
    other.write_bytes(bytes(lab.images["os"].stat().st_size))
    real = images.open

    def swapped(path: Path, *arguments: Any, **options: Any) -> Any:
        return real(other if path == lab.images["os"] else path, *arguments, **options)

    monkeypatch.setattr(images, "open", swapped)
    lab.scribble("os", 0, 4096)
    with pytest.raises(SourceBusyError, match="replaced while it was opened"):
        lab.sync()


def test_a_stopped_replica_that_recovers_by_itself_is_waited_for(lab: Lab) -> None:
    lab.scribble("os", 0, MiB)
    first = lab.sync()
    slot = lab.site.slot("hv-1", first.replica_id)
    slot.store().stopped = StorageError("it was full")
    link = lab.link()

    def before(name: str, _arguments: Any) -> None:
        if name == "adopt":
            slot.store().stopped = None
            raise BusyError("it is recovering")

    link.before = before
    lab.scribble("os", 0, 1)
    assert lab.sync(link).point == 2
    lab.assert_equal()
