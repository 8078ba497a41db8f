"""Receipts: of every point, whatever is cut; chained over what was dropped; refused when one bit is another."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from replica.durable import FileSystem
from replica.errors import FormatError, KeyMissingError, ReplicaError, RootMismatchError, StorageError
from replica.model import DeltaId
from replica.receipt import NO_LINK, SignedReceipt, check_chain, check_shipped, parse
from replica.signing import decode_public, encode_public, verify
from replica.store import Layout, ReplicaReader, ReplicaStore
from replica.store.receipt_key import ReceiptKey
from replica.store.receipts import ReceiptFiles, ReceiptWord
from replica.store.retention import Policy
from tests.store.small_primary import SmallPrimary
from tests.store.test_replica import CutFileSystem

SIZES = {"os": 300_001, "data": 200_000}
FS = FileSystem()


def check_all(store: Path, count: int) -> list[SignedReceipt]:
    """Every listed point has its receipt, signed by the storage's key and linked to the one before."""
    files = ReceiptFiles(FS, Layout(store))
    states = [info.state for info in ReplicaReader(FS, store).points()]
    assert len(states) == count
    key = decode_public((store.parent / "receipt.pub").read_bytes(), "it")
    found = [files.read(state.delta_id) for state in states]
    for state, signed in zip(states, found, strict=True):
        verify(signed, key)
        check_shipped(signed, state)
        assert files.word(state) is ReceiptWord.SIGNED
    for older, newer in itertools.pairwise(found):
        check_chain(older, newer, files.links(newer.receipt.delta_id))
    named = {str(state.delta_id) for state in states}
    assert {path.name.removesuffix(".links") for path in Layout(store).receipts.iterdir()} == named
    return found


def test_every_point_has_one_and_rotation_takes_it_along(tmp_path: Path) -> None:
    primary = SmallPrimary(SIZES)
    store = primary.enrol(FS, tmp_path)
    for partial in (True, False, False, True, False, False):
        primary.scribble()
        primary.sync(store, partial=partial)
    found = check_all(store.directory, 4)
    assert [signed.receipt.serial for signed in found] == [1, 2, 3, 4]
    assert found[0].receipt.previous == NO_LINK
    assert store.receipt == found[-1]
    assert (tmp_path / "receipt.key").stat().st_mode & 0o777 == 0o600
    store.close()
    store = ReplicaStore.open(FS, store.directory)
    store.rotate(Policy(keep_last=2, hourly=0))
    primary.sync(store)
    assert [signed.receipt.serial for signed in check_all(store.directory, 3)] == [3, 4, 5]


def test_the_chain_holds_over_receipts_that_went(tmp_path: Path) -> None:
    primary = SmallPrimary({"os": 50_000})
    store = primary.enrol(FS, tmp_path)
    for _ in range(9):
        primary.sync(store)
    files = ReceiptFiles(FS, Layout(store.directory))
    receipts = {s.receipt.serial: s for s in files.all()}

    def check(*serials: int) -> None:
        assert sorted(s.receipt.serial for s in files.all()) == sorted(serials)
        for one, other in itertools.pairwise(serials):
            check_chain(receipts[one], receipts[other], files.links(receipts[other].receipt.delta_id))

    def forget(*serials: int) -> None:
        store.receipts.forget([receipts[serial].receipt.delta_id for serial in serials])

    forget(2, 4, 5)
    check(1, 3, 6, 7, 8, 9)
    forget(3)
    check(1, 6, 7, 8, 9)
    forget(1, 7, 8)
    check(6, 9)
    assert files.links(receipts[6].receipt.delta_id) == b""
    assert len(files.links(receipts[9].receipt.delta_id)) == 2 * 32
    with pytest.raises(FormatError, match="2 receipts between them"):
        check_chain(receipts[6], receipts[9], b"")
    with pytest.raises(FormatError, match="other ones"):
        check_chain(receipts[6], receipts[9], bytes(64))
    with pytest.raises(FormatError, match="there are two"):
        check_chain(receipts[9], receipts[6], bytes(64))


def test_thinning_takes_receipts_along_and_leaves_the_links(tmp_path: Path) -> None:
    primary = SmallPrimary({"os": 50_000})
    store = primary.enrol(FS, tmp_path)
    for _ in range(3):
        primary.scribble()
        for _ in range(4):  # of a run of equal points the first and the newest stay
            primary.sync(store)
    assert store.thin(Policy(keep_last=9, hourly=0), at_once=True).composed
    points = ReplicaReader(FS, store.directory).points()
    found = check_all(store.directory, len(points))
    assert len(found) < 12 and found[-1].receipt.serial == 12
    assert {found[0].receipt.serial, found[-1].receipt.serial} == {1, 12}
    store.close()


def test_one_bit_is_enough_to_be_refused(tmp_path: Path) -> None:
    primary = SmallPrimary(SIZES)
    store = primary.enrol(FS, tmp_path)
    primary.sync(store)
    signed = store.receipt
    assert signed is not None
    key = decode_public((tmp_path / "receipt.pub").read_bytes(), "it")
    verify(parse(signed.data), key)
    for place in range(len(signed.data)):
        for bit in range(8):
            data = bytearray(signed.data)
            data[place] ^= 1 << bit
            with pytest.raises(FormatError):
                verify(parse(bytes(data)), key)
    for data in (signed.data[:-1], signed.data + b"\n", b"", signed.data.replace(b'":', b'" :', 1)):
        with pytest.raises(FormatError):
            parse(data)
    primary.scribble()
    primary.sync(store)
    with pytest.raises(RootMismatchError):
        check_shipped(signed, primary.state)


def test_a_crash_anywhere_costs_no_receipt(tmp_path: Path) -> None:
    """Commit and rotation cut at every step; the next start issues what is missing and leaves nothing behind."""
    cut_at, done = 0, False
    while not done:
        primary = SmallPrimary({"os": 50_000}, seed=3)
        store = primary.enrol(FS, tmp_path / str(cut_at))
        if cut_at % 2:  # the first receipt makes the key
            primary.sync(store)
        primary.scribble()
        made = primary.make()
        primary.send(store, made)
        store.close()
        cutting = CutFileSystem(1 << 60)
        store = ReplicaStore.open(cutting, store.directory)
        cutting.steps, cutting.cut_at = 0, cut_at // 2
        try:
            store.commit(made.delta_id)
            store.rotate(Policy(keep_last=1, hourly=0))
            done = store.receipts.trouble is None and cut_at % 2 == 1
        except ReplicaError:
            pass
        store.close()
        store = ReplicaStore.open(FS, store.directory)
        assert store.head.is_empty or store.receipt is not None
        if store.head.delta_id != made.delta_id:
            if store.received is None:
                primary.send(store, made)
            store.commit(made.delta_id)
        primary.acknowledge(made)
        primary.scribble()
        primary.sync(store)
        store.rotate(Policy(keep_last=2, hourly=0))
        assert store.receipts.trouble is None
        check_all(store.directory, 2)
        assert not [name for name in FS.list_names(store.directory.parent) if name.endswith(".tmp")]
        store.close()
        cut_at += 1
    assert cut_at > 40


def test_forgetting_cut_anywhere_is_finished_by_the_next(tmp_path: Path) -> None:
    for cut_at in range(40):
        primary = SmallPrimary({"os": 20_000})
        store = primary.enrol(FS, tmp_path / str(cut_at))
        for _ in range(6):
            primary.sync(store)
        store.close()
        cutting = CutFileSystem(1 << 60)
        store = ReplicaStore.open(cutting, store.directory)
        states = [made.delta_id for made in primary.made]
        cutting.steps, cutting.cut_at = 0, cut_at
        whole = False
        try:
            store.receipts.forget([states[i] for i in (1, 2, 4)])
            whole = True
        except ReplicaError:
            cutting.cut_at = 1 << 60
        store.close()
        store = ReplicaStore.open(FS, store.directory)
        store.receipts.keep_only([states[i] for i in (0, 3, 5)], 8)
        files = ReceiptFiles(FS, Layout(store.directory))
        found = files.all()
        assert [s.receipt.serial for s in found] == [1, 4, 6]
        for one, other in itertools.pairwise(found):
            check_chain(one, other, files.links(other.receipt.delta_id))
        assert len(FS.list_names(store.directory / "receipts")) == 5
        store.close()
        if whole:
            return
    raise AssertionError("never got to the end")


@pytest.mark.parametrize("how", ["lost", "damaged"])
def test_commits_go_on_without_the_key_and_receipts_follow(tmp_path: Path, how: str) -> None:
    primary = SmallPrimary(SIZES)
    store = primary.enrol(FS, tmp_path)
    primary.sync(store)
    store.close()
    key = tmp_path / "receipt.key"
    kept = key.read_bytes()
    if how == "lost":
        key.unlink()
    else:
        key.write_bytes(bytes(len(kept)))
    for both_gone in (False, True):
        if both_gone and how == "lost":
            (tmp_path / "receipt.pub").unlink()
        store = ReplicaStore.open(FS, store.directory)
        primary.scribble()
        primary.sync(store)
        assert isinstance(store.receipts.trouble, KeyMissingError if how == "lost" else FormatError)
        assert str(key) in str(store.receipts.trouble)
        assert store.receipt is None
        assert key.exists() == (how == "damaged"), "a new one is never made on the quiet"
        store.close()
    files = ReceiptFiles(FS, Layout(store.directory))
    assert files.word(primary.state) is ReceiptWord.MISSING
    key.write_bytes(kept)
    store = ReplicaStore.open(FS, store.directory)
    assert store.receipts.trouble is None
    assert [s.receipt.serial for s in check_all(store.directory, 3)] == [1, 2, 3]
    store.close()


def test_a_damaged_receipt_is_named_and_no_two_follow_the_same(tmp_path: Path) -> None:
    primary = SmallPrimary({"os": 50_000})
    store = primary.enrol(FS, tmp_path)
    for _ in range(3):
        primary.sync(store)
    store.close()
    path = Layout(store.directory).receipt(primary.state.delta_id)
    path.write_bytes(path.read_bytes().replace(b"web-1", b"web_1") + b"x")
    store = ReplicaStore.open(FS, store.directory)
    files = ReceiptFiles(FS, Layout(store.directory))
    assert files.word(primary.state) is ReceiptWord.DAMAGED
    for _ in range(2):
        primary.scribble()
        primary.sync(store)
    found = files.all()
    assert [s.receipt.point for s in found] == [1, 2, 4, 5]
    assert [s.receipt.previous == NO_LINK for s in found] == [True, False, True, False]
    assert len({s.receipt.previous for s in found[1:]}) == 3
    check_chain(found[2], found[3], b"")
    with pytest.raises(FormatError, match="begun anew"):
        check_chain(found[1], found[2], b"")
    store.rotate(Policy(keep_last=1, hourly=0))
    assert [DeltaId(s.receipt.delta_id) for s in files.all()] == [primary.state.delta_id]
    store.close()


def test_a_key_whose_name_may_not_be_durable_gets_it_anew(tmp_path: Path) -> None:
    """A sync that failed leaves the name in the page cache, and none of the later ones says anything about it."""
    published: list[Path] = []

    class Failing(FileSystem):
        def publish(self, temporary: Path, path: Path) -> None:
            super().publish(temporary, path)
            published.append(path)
            if len(published) == 1:
                raise StorageError("the sync of its name failed")

    key = ReceiptKey.of_storage(Failing(), tmp_path)
    with pytest.raises(StorageError):
        key.get()
    assert key.path.exists() and not key.public_path.exists()
    private = key.path.read_bytes()
    made = key.get()
    assert published == [key.path, key.path, key.public_path] and key.path.read_bytes() == private
    assert key.public_path.read_bytes() == encode_public(made.public_key())
    ReceiptKey.of_storage(Failing(), tmp_path).get()
    assert len(published) == 3, "what is complete is left alone"
