"""Thinning and rotation on disk: exact afterwards, whatever is cut, read, pinned, locked or damaged meanwhile."""

from __future__ import annotations

import hashlib
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from replica import documents
from replica.delta import DeltaFileReader, Keyring, MemoryDelta, compose
from replica.durable import File, FileSystem, Lock
from replica.errors import DamageError
from replica.model import NEVER, DamagedLeaves, DeltaId, Stamp, random_id
from replica.store import Layout, Policy, ReplicaReader, ReplicaStore, StoreState, pins, thin
from replica.store import damage as damage_marks
from replica.store.clock import Reading
from replica.store.layout import load_state, save_state
from replica.store.marks import Marks
from replica.store.points import PointIndex
from replica.store.thin import Sliced
from tests.store.small_primary import SmallPrimary

HOUR_NS = 3600 * 10**9
HOURLY = Policy(keep_last=1, hourly=24)


class Unsynced(FileSystem):
    """What is cut here are steps, not what the kernel holds back: nothing need reach the device."""

    def sync_directory(self, path: Path) -> None:
        pass

    def create(self, path: Path, *, private: bool = False) -> File:
        file = super().create(path, private=private)
        file.sync = lambda: None  # type: ignore[method-assign]
        return file


class Clocks:
    """The host's clocks, moved by hand."""

    def __init__(self) -> None:
        self.wall_ns, self.boot_ns, self.boot_id = 500_000 * HOUR_NS, 10**9, "one"

    def __call__(self) -> Reading:
        return Reading(self.wall_ns, self.boot_ns, self.boot_id)

    def pass_(self, seconds: float) -> None:
        self.wall_ns += int(seconds * 1e9)
        self.boot_ns += int(seconds * 1e9)


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    clocks = Clocks()
    monkeypatch.setattr(Marks.__init__, "__defaults__", (clocks,))
    return clocks


@pytest.fixture
def fs() -> FileSystem:
    return FileSystem()


def make_points(primary: SmallPrimary, store: ReplicaStore, clocks: Clocks, count: int, every: float = 600.0) -> None:
    for _ in range(count):
        primary.scribble(count=3)
        primary.sync(store)
        clocks.pass_(every)


def chain_of(fs: FileSystem, directory: Path):  # type: ignore[no-untyped-def]
    layout = Layout(directory)
    return PointIndex(fs, layout, Keyring(fs, layout.keys)).chain()


def check(fs: FileSystem, directory: Path, primary: SmallPrimary) -> list[int]:
    """Every listed point is restorable and exact; returns their numbers."""
    reader = ReplicaReader(fs, directory)
    infos = reader.points()
    assert all(info.restorable for info in infos) and not reader.damaged
    for info in infos:
        with reader.open_point(info.state.point) as point:
            for disk in point.disks:
                buffer = bytearray(disk.size_bytes)
                point.read_into(disk.id, 0, buffer)
                assert buffer == primary.copies[info.state.point][disk.name], (info.state.point, disk.name)
    return [info.state.point for info in infos]


def no_leaks(fs: FileSystem, directory: Path) -> None:
    """As many inverses as points but the newest, nothing spare, nothing temporary, no pin."""
    chain = chain_of(fs, directory)
    assert not chain.spare and not chain.strays
    assert len(fs.list_names(directory / "points")) == len(chain.points) - 1
    assert not [name for name in fs.list_names(directory) if name.startswith(".")]
    assert fs.list_names(directory / "pins") == []


def test_a_closed_hour_is_composed_into_its_first_point(fs: FileSystem, tmp_path: Path, clocks: Clocks) -> None:
    primary = SmallPrimary({"os": 400_001, "data": 90_000})
    store = primary.enrol(fs, tmp_path)
    make_points(primary, store, clocks, 14)
    committed = {info.state.point: info.committed for info in ReplicaReader(fs, store.directory).points()}
    assert not store.rotate(HOURLY).dropped
    assert store.thin(HOURLY).composed == (2, 3, 4, 5, 6, 8, 9, 10, 11, 12)
    assert not store.thin(HOURLY)
    assert check(fs, store.directory, primary) == [1, 7, 13, 14]
    assert {i.state.point: i.committed for i in ReplicaReader(fs, store.directory).points()} == {
        number: committed[number] for number in (1, 7, 13, 14)
    }, "the time of a point's commit moved"
    store.rotate(HOURLY)
    no_leaks(fs, store.directory)
    make_points(primary, store, clocks, 3)
    assert check(fs, store.directory, primary) == [1, 7, 13, 14, 15, 16, 17]
    assert store.rotate(Policy(keep_last=1, hourly=1)).dropped == (1, 7)


def test_thinning_119_of_120_writes_what_remains(fs: FileSystem, tmp_path: Path, clocks: Clocks) -> None:
    written = [0]

    class Counting(Unsynced):
        def create(self, path: Path, *, private: bool = False) -> File:
            file = super().create(path, private=private)
            write = file.write

            def count(offset: int, data: bytes) -> None:
                written[0] += memoryview(data).nbytes
                write(offset, data)

            file.write = count  # type: ignore[method-assign, assignment]
            return file

    counting = Counting()
    primary = SmallPrimary({"os": 2_000_000})
    primary.content["os"][:] = primary.random.randbytes(2_000_000)
    store = primary.enrol(counting, tmp_path)
    total = 0
    for _ in range(121):
        at = primary.random.randrange(480) * 4096
        primary.content["os"][at : at + 4096] = primary.random.randbytes(4096)
        primary.sync(store)
        clocks.pass_(30)
        before = written[0]
        store.rotate(HOURLY)
        store.thin(HOURLY)
        total += written[0] - before
    (first, *_) = ReplicaReader(fs, store.directory).points()
    assert [i.state.point for i in ReplicaReader(fs, store.directory).points()] == [1, 121]
    assert first.stored_bytes <= total <= 1.5 * first.stored_bytes
    check(fs, store.directory, primary)


def test_steps_of_a_copy_leave_no_inverse_behind(fs: FileSystem, tmp_path: Path, clocks: Clocks) -> None:
    primary = SmallPrimary({"os": 400_001})
    store = primary.enrol(fs, tmp_path)
    for _ in range(3):
        primary.scribble()
        primary.sync(store, partial=True)
        store.rotate(Policy())
        assert fs.list_names(store.directory / "points") == [], "before the first point nothing is worth keeping"
    make_points(primary, store, clocks, 2)
    for _ in range(3):
        primary.scribble()
        primary.sync(store, partial=True)
        assert not store.thin(Policy())
    assert check(fs, store.directory, primary) == [1, 2]
    make_points(primary, store, clocks, 1)
    store.rotate(Policy())
    store.thin(Policy())
    assert check(fs, store.directory, primary) == [1, 2, 3]
    store.rotate(Policy())
    no_leaks(fs, store.directory)


def test_a_copy_that_comes_to_no_point_does_not_fill_the_directory(
    fs: FileSystem, tmp_path: Path, clocks: Clocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replica.store.retention.MAX_WAITING", 4)
    primary = SmallPrimary({"os": 400_001})
    store = primary.enrol(fs, tmp_path)
    make_points(primary, store, clocks, 2)
    for _ in range(10):
        primary.scribble()
        primary.sync(store, partial=True)
        store.rotate(Policy())
        store.thin(Policy())
        assert len(fs.list_names(store.directory / "points")) <= 6
        assert check(fs, store.directory, primary) == [1, 2]
    make_points(primary, store, clocks, 1)
    store.rotate(Policy())
    store.thin(Policy())
    assert check(fs, store.directory, primary) == [1, 2, 3]
    store.rotate(Policy())
    no_leaks(fs, store.directory)


class PowerCut(BaseException):
    """Nothing of the program runs on."""


class Cutting(Unsynced):
    """Every step that changes something counts; the one that is due, and all after it, do not happen."""

    def __init__(self, due: int) -> None:
        self.due, self.steps = due, 0

    def step(self) -> None:
        self.steps += 1
        if self.steps > self.due:
            raise PowerCut

    def create(self, path: Path, *, private: bool = False) -> File:
        self.step()
        file = super().create(path, private=private)
        for name in ("write", "sync", "truncate"):
            setattr(file, name, self.cut(getattr(file, name)))
        return file

    def cut(self, method: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: object) -> None:
            self.step()
            method(*arguments)

        return run

    def publish(self, temporary: Path, final: Path) -> None:
        self.step()
        temporary.rename(final)
        self.step()
        self.sync_directory(final.parent)

    def unlink(self, path: Path) -> None:
        self.step()
        path.unlink(missing_ok=True)
        self.step()
        self.sync_directory(path.parent)


def test_a_cut_at_every_step_loses_and_leaks_nothing(tmp_path: Path, clocks: Clocks) -> None:
    fs = Unsynced()
    primary = SmallPrimary({"os": 20_001, "data": 9_000})
    store = primary.enrol(fs, tmp_path / "storage")
    primary.sync(store, partial=True)
    make_points(primary, store, clocks, 4, every=1800)
    primary.scribble()
    primary.sync(store, partial=True)
    make_points(primary, store, clocks, 3, every=1800)
    everything = check(fs, store.directory, primary)
    directory = store.directory
    store.close()
    saved = tmp_path / "saved"
    subprocess.run(["cp", "-a", "--sparse=always", directory, saved], check=True)
    policy = Policy(keep_last=1, hourly=3)
    cuts, seen = 0, set()
    while True:
        shutil.rmtree(directory)
        subprocess.run(["cp", "-a", "--sparse=always", saved, directory], check=True)  # trees are mostly holes
        store = ReplicaStore.open(fs, directory)
        cutting = Cutting(cuts)
        for part in (store, store._dropper, store._thinner, store._marks, store._dropper._index):
            part._fs = cutting
        try:
            store.rotate(policy)
            store.thin(policy)
            done = True
        except PowerCut:
            done = False
        store._lock.release()
        listed = check(fs, directory, primary)
        assert set(listed) <= set(everything) and {3, 5, 7} <= set(listed), cuts
        seen.add(tuple(listed))
        store = ReplicaStore.open(fs, directory)
        assert store.stopped is None
        store.rotate(policy)
        store.thin(policy)
        store.rotate(policy)
        assert check(fs, directory, primary) == [3, 5, 7], cuts
        store.rotate(policy)
        no_leaks(fs, directory)
        store.close()
        if done:
            break
        cuts += 1
    assert cuts > 30 and len(seen) > 3, (cuts, len(seen))


def test_a_cut_while_leftovers_are_removed_leaves_no_stray(tmp_path: Path, clocks: Clocks) -> None:
    """What a first cut left over is removed from the far end, so that a second cut leaves it reachable."""
    fs = Unsynced()
    primary = SmallPrimary({"os": 20_001})
    store = primary.enrol(fs, tmp_path / "storage")
    make_points(primary, store, clocks, 7)
    store.rotate(HOURLY)

    class CutAtTheSecond(Unsynced):
        """Cut when the second of the replaced inverses is to go."""

        gone = 0

        def unlink(self, path: Path) -> None:
            self.gone += path.parent.name == "points"
            if self.gone == 2:
                raise PowerCut
            super().unlink(path)

    store._thinner._fs = CutAtTheSecond()
    with pytest.raises(PowerCut):
        store.thin(HOURLY)
    directory = store.directory
    assert len(chain_of(fs, directory).spare) == 5
    store._lock.release()
    saved = tmp_path / "saved"
    subprocess.run(["cp", "-a", "--sparse=always", directory, saved], check=True)
    cuts = 0
    while True:
        shutil.rmtree(directory)
        subprocess.run(["cp", "-a", "--sparse=always", saved, directory], check=True)
        store = ReplicaStore.open(fs, directory)
        store._dropper._fs = Cutting(cuts)
        try:
            store.rotate(HOURLY)
            break
        except PowerCut:
            assert not chain_of(fs, directory).strays, cuts
            assert check(fs, directory, primary) == [1, 7]
        finally:
            store._lock.release()
        cuts += 1
    assert cuts >= 10
    store = ReplicaStore.open(fs, directory)
    store.rotate(HOURLY)
    no_leaks(fs, directory)


def test_a_commit_that_is_undone_does_not_make_its_point_younger(
    fs: FileSystem, tmp_path: Path, clocks: Clocks
) -> None:
    primary = SmallPrimary({"os": 100_000})
    store = primary.enrol(fs, tmp_path)
    make_points(primary, store, clocks, 1)
    store.close()
    path = store.directory / "state"
    state = documents.load(fs, path, StoreState)
    applying = StoreState(state.head, state.epoch, DeltaId(random_id()), state.committed, state.serial + 1)
    save_state(fs, Layout(store.directory), applying)
    store = ReplicaStore.open(fs, store.directory)
    assert store.applying is None and documents.load(fs, path, StoreState).head == state.head
    store.adopt(state.epoch, random_id())
    assert documents.load(fs, path, StoreState).committed == state.committed


def test_a_pin_holds_its_point_and_all_that_leads_to_it(fs: FileSystem, tmp_path: Path, clocks: Clocks) -> None:
    primary = SmallPrimary({"os": 400_001})
    store = primary.enrol(fs, tmp_path)
    make_points(primary, store, clocks, 14)
    with ReplicaReader(fs, store.directory).open_point(3):
        assert not store.thin(HOURLY)
        assert store.rotate(Policy(keep_last=1, hourly=0)).dropped == (1, 2)
    with ReplicaReader(fs, store.directory).open_point(8):
        assert store.rotate(Policy(keep_last=1, hourly=2)).dropped == (3, 4, 5, 6)
        assert not store.thin(Policy(keep_last=1, hourly=2)), "8 is read through what would be composed"
    with ReplicaReader(fs, store.directory).open_point(13) as point:
        assert store.thin(HOURLY).composed == (8, 9, 10, 11, 12), "nothing older than 13 leads to 13"
        buffer = bytearray(400_001)
        point.read_into(point.disks[0].id, 0, buffer)
        assert buffer == primary.copies[13]["os"]
    check(fs, store.directory, primary)
    store.rotate(HOURLY)
    no_leaks(fs, store.directory)


def test_a_killed_reader_pins_nothing(fs: FileSystem, tmp_path: Path, clocks: Clocks) -> None:
    primary = SmallPrimary({"os": 400_001})
    store = primary.enrol(fs, tmp_path)
    make_points(primary, store, clocks, 4)
    code = (
        "import sys; from pathlib import Path; from replica.durable import FileSystem;"
        "from replica.store import ReplicaReader;"
        "point = ReplicaReader(FileSystem(), Path(sys.argv[1])).open_point(1);"
        "print('open', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(store.directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None and child.stdout.readline() == b"open\n"
    last = Policy(keep_last=1, hourly=0)
    assert not store.rotate(last)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert store.rotate(last).dropped == (1, 2, 3)
    assert fs.list_names(store.directory / "pins") == []


def test_readers_are_exact_while_everything_goes_on(fs: FileSystem, tmp_path: Path, clocks: Clocks) -> None:
    """Threads and another process read every point while commits, rotation and thinning go on."""
    primary = SmallPrimary({"os": 200_000})
    store = primary.enrol(fs, tmp_path)
    make_points(primary, store, clocks, 5, every=900)
    stop, failures, reads = threading.Event(), [], [0]
    code = (
        "import sys, hashlib; from pathlib import Path; from replica.durable import FileSystem;"
        "from replica.errors import PointGoneError; from replica.store import ReplicaReader\n"
        "reader = ReplicaReader(FileSystem(), Path(sys.argv[1]))\n"
        "print('ready', flush=True)\n"
        "import select\n"
        "while not select.select([sys.stdin], [], [], 0)[0]:\n"
        "    for info in reader.points():\n"
        "        try:\n"
        "            with reader.open_point(info.state.point) as point:\n"
        "                buffer = bytearray(200_000)\n"
        "                point.read_into(point.disks[0].id, 0, buffer)\n"
        "                print(info.state.point, hashlib.sha256(buffer).hexdigest(), flush=True)\n"
        "        except PointGoneError:\n"
        "            pass\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(store.directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdin is not None and child.stdout.readline() == "ready\n"

    def read_all_the_time() -> None:
        reader = ReplicaReader(fs, store.directory)
        while not stop.is_set():
            try:
                for info in reader.points():
                    with reader.open_point(info.state.point) as point:
                        for _ in range(2):
                            buffer = bytearray(200_000)
                            point.read_into(point.disks[0].id, 0, buffer)
                            if buffer != primary.copies[info.state.point]["os"]:
                                failures.append(info.state.point)
                            reads[0] += 1
            except Exception as error:  # noqa: BLE001 - a thread must hand every failure to the test
                if type(error).__name__ != "PointGoneError":
                    failures.append(error)

    def thin_all_the_time() -> None:
        while not stop.is_set():
            try:
                composed.extend(store.thin(policy).composed)
            except Exception as error:  # noqa: BLE001
                if type(error).__name__ != "BusyError":
                    failures.append(error)

    policy, composed = Policy(keep_last=2, hourly=4), []
    threads = [threading.Thread(target=read_all_the_time), threading.Thread(target=thin_all_the_time)]
    for thread in threads:
        thread.start()
    lines: list[str] = []
    collecting = threading.Thread(target=lambda: lines.extend(child.stdout))
    collecting.start()
    dropped: list[int] = []
    for _ in range(30):
        primary.scribble(count=5)
        made = primary.make()
        primary.send(store, made)
        primary.copies[made.result.point] = {n: bytes(d) for n, d in primary.content.items()}
        store.commit(made.delta_id)
        primary.acknowledge(made)
        clocks.pass_(900)
        try:
            dropped.extend(store.rotate(policy).dropped)
        except Exception as error:  # noqa: BLE001
            assert type(error).__name__ == "BusyError", error
    stop.set()
    child.stdin.close()
    for thread in (*threads, collecting):
        thread.join()
    assert child.wait(60) == 0
    child.stdout.close()
    for line in lines:
        number, digest = line.split()
        assert digest == hashlib.sha256(primary.copies[int(number)]["os"]).hexdigest(), number
    assert not failures and reads[0] > 10 and len(lines) > 5
    store.rotate(policy)
    store.thin(policy, at_once=True)
    assert composed and dropped and len(check(fs, store.directory, primary)) <= 6
    store.rotate(policy)
    no_leaks(fs, store.directory)


def test_a_damaged_inverse_is_left_alone_and_said_once(
    fs: FileSystem, tmp_path: Path, clocks: Clocks, caplog: pytest.LogCaptureFixture
) -> None:
    primary = SmallPrimary({"os": 400_001})
    store = primary.enrol(fs, tmp_path)
    make_points(primary, store, clocks, 14)
    damaged = store.directory / "points" / str(primary.made[3].delta_id)
    data = bytearray(damaged.read_bytes())
    data[400] ^= 1
    damaged.write_bytes(data)
    names = set(fs.list_names(store.directory / "points"))
    for _ in range(3):
        store.thin(HOURLY)
    assert caplog.text.count("points are not thinned") == 1
    assert len(names & set(fs.list_names(store.directory / "points"))) == 14 - 6, "the other hour was composed"
    assert [i.state.point for i in ReplicaReader(fs, store.directory).points()] == [1, 2, 3, 4, 5, 6, 7, 13, 14]


def test_what_a_disk_makes_of_a_composed_file_is_noticed_in_time(
    fs: FileSystem, tmp_path: Path, clocks: Clocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A composed file that reads back wrong replaces nothing."""
    primary = SmallPrimary({"os": 400_001})
    store = primary.enrol(fs, tmp_path)
    make_points(primary, store, clocks, 8)
    real = thin.check

    def rot(fs: FileSystem, keyring: Keyring, path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[500] ^= 1
        path.write_bytes(data)
        real(fs, keyring, path)

    monkeypatch.setattr(thin, "check", rot)
    assert not store.thin(HOURLY)
    assert check(fs, store.directory, primary) == list(range(1, 9))
    assert not [name for name in fs.list_names(store.directory / "points") if name.startswith(".")]


def test_a_commit_goes_on_while_a_bucket_is_composed(
    fs: FileSystem, tmp_path: Path, clocks: Clocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    primary = SmallPrimary({"os": 400_001})
    store = primary.enrol(fs, tmp_path)
    make_points(primary, store, clocks, 8)
    real, composing, go_on = thin.compose_segments, threading.Event(), threading.Event()

    def slowly(deltas: object) -> Iterator[object]:
        composing.set()
        assert go_on.wait(30)
        yield from real(deltas)  # type: ignore[arg-type]

    monkeypatch.setattr(thin, "compose_segments", slowly)
    thread = threading.Thread(target=lambda: store.thin(HOURLY))
    thread.start()
    assert composing.wait(30)
    make_points(primary, store, clocks, 2)
    assert store.rotate(HOURLY).dropped == ()
    go_on.set()
    thread.join()
    assert check(fs, store.directory, primary) == [1, 7, 8, 9, 10]


def test_closing_ends_a_composition(
    fs: FileSystem, tmp_path: Path, clocks: Clocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    primary = SmallPrimary({"os": 400_001})
    store = primary.enrol(fs, tmp_path)
    make_points(primary, store, clocks, 8)
    real = thin.compose_segments
    closing: list[threading.Thread] = []

    def close_meanwhile(deltas: object) -> Iterator[object]:
        closing.append(threading.Thread(target=store.close))
        closing[0].start()
        while not store._closed:
            pass
        yield from real(deltas)  # type: ignore[arg-type]

    monkeypatch.setattr(thin, "compose_segments", close_meanwhile)
    with pytest.raises(Exception, match="being closed"):
        store.thin(HOURLY)
    closing[0].join()
    assert check(fs, store.directory, primary) == list(range(1, 9))
    assert not [name for name in fs.list_names(store.directory / "points") if name.startswith(".")]


def test_slices_compose_to_the_same(fs: FileSystem, tmp_path: Path, clocks: Clocks) -> None:
    primary = SmallPrimary({"os": 3_000_001, "data": 700_000})
    store = primary.enrol(fs, tmp_path)
    for _ in range(4):
        primary.scribble(count=60)
        primary.sync(store)
    links = chain_of(fs, store.directory).links[:3]
    keyring = Keyring(fs, Layout(store.directory).keys)
    readers = [DeltaFileReader(fs.open(link.path), keyring) for link in links]
    whole = compose(*readers)
    for size in (4096, 50_000, 300_000, 10 << 20):
        sliced = compose(*(Sliced(reader, size) for reader in readers))
        assert isinstance(sliced, MemoryDelta) and sliced == whole, size
        pieces = list(Sliced(readers[0], size).segments())
        assert max(piece.raw_bytes for piece in pieces) <= size


def test_points_of_before_commit_times_count_from_their_freeze(fs: FileSystem, tmp_path: Path, clocks: Clocks) -> None:
    primary = SmallPrimary({"os": 400_001})
    store = primary.enrol(fs, tmp_path)
    make_points(primary, store, clocks, 1)
    state = documents.load(fs, store.directory / "state", StoreState)
    assert state.committed == Stamp(500_000 * HOUR_NS, 500_000 * HOUR_NS)
    store.close()
    old = StoreState(state.head, state.epoch, serial=state.serial + 1)
    save_state(fs, Layout(store.directory), old)
    store = ReplicaStore.open(fs, store.directory)
    make_points(primary, store, clocks, 1)
    assert ReplicaReader(fs, store.directory).points()[0].committed == NEVER
    assert store.rotate(HOURLY).dropped == () and store.thin(HOURLY).composed == ()


def test_points_committed_while_observed_time_is_unknown_keep_their_minimum_age(
    fs: FileSystem, tmp_path: Path, clocks: Clocks
) -> None:
    """As long as `marks/retention` cannot be read nobody knows it; afterwards a clock set ahead must end nothing."""
    primary = SmallPrimary({"os": 100_000})
    store = primary.enrol(fs, tmp_path)
    document = store.directory / "marks" / "retention"
    whole = document.read_bytes()
    document.write_bytes(b"damaged")
    make_points(primary, store, clocks, 3)
    document.write_bytes(whole)
    make_points(primary, store, clocks, 1)
    month = Policy(keep_last=1, hourly=0, min_age_seconds=30 * 86400)
    clocks.wall_ns += 40 * 24 * HOUR_NS
    assert not store.rotate(month) and not store.thin(month, at_once=True)
    clocks.boot_ns += 40 * 24 * HOUR_NS
    assert store.rotate(month).dropped == (1, 2, 3)


def test_a_damaged_locks_document_locks_everything(fs: FileSystem, tmp_path: Path, clocks: Clocks) -> None:
    primary = SmallPrimary({"os": 100_000})
    store = primary.enrol(fs, tmp_path)
    make_points(primary, store, clocks, 4)
    document = store.directory / "marks" / "retention"
    last = Policy(keep_last=1, hourly=0)
    whole = document.read_bytes()
    for damage in (whole[:-3], b"", None):
        document.unlink() if damage is None else document.write_bytes(damage)
        assert not store.rotate(last) and not store.thin(last, at_once=True)
        with pytest.raises(DamageError, match="every point is kept"):
            Marks(fs, Layout(store.directory)).load()
    document.write_bytes(whole)
    assert store.rotate(last).dropped == (1, 2, 3)


def test_marks_that_are_gone_are_not_a_replica_without_locks(fs: FileSystem, tmp_path: Path, clocks: Clocks) -> None:
    primary = SmallPrimary({"os": 100_000})
    store = primary.enrol(fs, tmp_path)
    make_points(primary, store, clocks, 4)
    layout = Layout(store.directory)
    Marks(fs, layout).lock(primary.made[0].delta_id, 1, clocks.wall_ns + HOUR_NS)
    last = Policy(keep_last=1, hourly=0)
    shutil.rmtree(layout.marks)
    for _ in range(2):
        assert not store.rotate(last) and not store.thin(last, at_once=True)
        for call in (Marks(fs, layout).load, lambda: Marks(fs, layout).lock(primary.made[0].delta_id, 1, 1 << 62)):
            with pytest.raises(DamageError, match="every point is kept"):
                call()
        damage_marks.note(fs, layout, [DamagedLeaves(primary.ids["os"], 0, 1)])  # makes the directory
        damage_marks.clear(fs, layout, [DamagedLeaves(primary.ids["os"], 0, 1)])
        store.close()
        store = ReplicaStore.open(fs, store.directory)
        assert store.stopped is None
        make_points(primary, store, clocks, 1)
    Marks(fs, layout).begin_anew()
    assert store.rotate(last).dropped == (1, 2, 3, 4, 5)


def test_a_replica_of_before_the_marks_gets_them(fs: FileSystem, tmp_path: Path, clocks: Clocks) -> None:
    primary = SmallPrimary({"os": 100_000})
    store = primary.enrol(fs, tmp_path)
    make_points(primary, store, clocks, 3)
    layout = Layout(store.directory)
    store.close()
    old = load_state(fs, layout)
    save_state(fs, layout, StoreState(old.head, old.epoch, committed=old.committed, serial=old.serial + 1))
    shutil.rmtree(layout.marks)
    store = ReplicaStore.open(fs, store.directory)
    assert store.rotate(Policy(keep_last=1, hourly=0)).dropped == (1, 2)
    assert load_state(fs, layout).marks
    assert store.adopt(store.epoch, random_id()) == load_state(fs, layout).epoch
    assert load_state(fs, layout).marks, "noted for good"


@pytest.mark.parametrize("what", ["pin", "lock"])
def test_pins_and_marks_are_looked_at_in_the_step(
    fs: FileSystem, tmp_path: Path, clocks: Clocks, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A pin or a lock that comes while a bucket is composed saves its points."""
    real = thin.compose_segments
    primary = SmallPrimary({"os": 200_000})
    store = primary.enrol(fs, tmp_path)
    make_points(primary, store, clocks, 8)
    layout = Layout(store.directory)
    held: list[object] = []

    def meanwhile(deltas: object) -> Iterator[object]:
        if what == "pin":
            held.append(pins.pin(fs, layout, primary.made[2].delta_id))
        else:
            held.append(Marks(fs, layout).lock(primary.made[2].delta_id, 3, clocks.wall_ns + HOUR_NS))
        yield from real(deltas)  # type: ignore[arg-type]

    monkeypatch.setattr(thin, "compose_segments", meanwhile)
    assert 3 not in store.thin(HOURLY).composed, what
    monkeypatch.setattr(thin, "compose_segments", real)
    assert 3 in check(fs, store.directory, primary)
    for lock in held:
        if isinstance(lock, Lock):
            lock.release()
