"""Freeze and thaw: one instant, and thaw runs whatever happens to the sender."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from replica.durable import FileSystem
from replica.errors import ConfigError, FreezeError, SourceBusyError, StorageError
from replica.model import Consistency
from replica.tracking import guard, instant, watchdog
from replica.tracking.instant import FreezeSpec, environment_of, freeze, snapshot_paths, thaw_marked

FS = FileSystem()


@pytest.fixture(autouse=True)
def _one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instant, "THAW_AGAIN_SECONDS", ())


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "os.raw"
    path.write_bytes(b"content")
    return path


@pytest.fixture
def state(tmp_path: Path) -> Path:
    path = tmp_path / "state"
    path.mkdir()
    return path


class Commands:
    """Freeze and thaw commands that write what they did into a log."""

    def __init__(self, directory: Path) -> None:
        self.log = directory / "log"
        self.log.touch()

    def say(self, word: str, *, then: str = "true") -> str:
        return f"echo {word} >> {self.log}; {then}"

    @property
    def said(self) -> list[str]:
        return self.log.read_text().split()

    def wait_for(self, *words: str) -> None:
        deadline = time.monotonic() + 10
        while self.said != list(words):
            assert time.monotonic() < deadline, f"{self.said} and not {words}"
            time.sleep(0.01)


@pytest.fixture
def commands(tmp_path: Path) -> Commands:
    return Commands(tmp_path)


def test_freeze_brackets_the_read(image: Path, state: Path, commands: Commands) -> None:
    spec = FreezeSpec(commands.say("freeze"), commands.say("thaw"), 10, Consistency.APPLICATION)
    before = time.time_ns()
    with freeze(FS, state, "web-1", {"os": image}, spec) as snapshot:
        assert commands.said == ["freeze"]
        assert (state / "frozen").exists(), "the mark is durable while frozen"
        assert snapshot.paths == {"os": image}
        assert before < snapshot.frozen_at_ns < time.time_ns()
        assert snapshot.consistency is Consistency.APPLICATION
        assert snapshot.dirty("os") is None
        snapshot.check()
        snapshot.finish()
        assert commands.said == ["freeze", "thaw"]
        assert not (state / "frozen").exists()
    assert commands.said == ["freeze", "thaw"], "once is enough"


def test_leaving_without_finish_thaws(image: Path, state: Path, commands: Commands) -> None:
    spec = FreezeSpec(commands.say("freeze"), commands.say("thaw"))
    with pytest.raises(KeyError), freeze(FS, state, "web-1", {"os": image}, spec):
        raise KeyError
    assert commands.said == ["freeze", "thaw"]
    assert not (state / "frozen").exists()


def test_the_mark_is_there_before_freeze_runs(image: Path, state: Path, commands: Commands) -> None:
    spec = FreezeSpec(f"test -e {state}/frozen && echo marked >> {commands.log}", commands.say("thaw"))
    with freeze(FS, state, "web-1", {"os": image}, spec) as snapshot:
        snapshot.finish()
    assert commands.said == ["marked", "thaw"]


def test_a_failed_freeze_is_thawed_and_says_why(image: Path, state: Path, commands: Commands) -> None:
    spec = FreezeSpec(commands.say("freeze", then="echo no agent in the guest >&2; exit 3"), commands.say("thaw"))
    with pytest.raises(FreezeError, match=r"'web-1'.*status 3: no agent in the guest"):
        freeze(FS, state, "web-1", {"os": image}, spec)
    assert commands.said == ["freeze", "thaw"]
    assert not (state / "frozen").exists()


def test_a_command_that_cannot_run_is_named(image: Path, state: Path, commands: Commands) -> None:
    with pytest.raises(FreezeError, match="cannot be run: No such file"):
        freeze(FS, state, "web-1", {"os": image}, FreezeSpec(["/none/such"], commands.say("thaw")))
    assert commands.said == ["thaw"]


def test_a_freeze_that_hangs_is_killed_and_thawed(image: Path, state: Path, commands: Commands) -> None:
    spec = FreezeSpec(commands.say("freeze", then="sleep 60"), commands.say("thaw"), 0.3)
    with pytest.raises(FreezeError, match="was killed"):
        freeze(FS, state, "web-1", {"os": image}, spec)
    assert commands.said == ["freeze", "thaw"]


def test_a_daemon_left_behind_by_freeze_does_not_hinder(image: Path, state: Path, commands: Commands) -> None:
    spec = FreezeSpec("sleep 5 & true", commands.say("thaw"))
    started = time.monotonic()
    with freeze(FS, state, "web-1", {"os": image}, spec) as snapshot:
        snapshot.finish()
    assert time.monotonic() - started < 4


def test_past_the_limit_it_is_thawed_and_the_point_refused(image: Path, state: Path, commands: Commands) -> None:
    spec = FreezeSpec(commands.say("freeze"), commands.say("thaw"), 1.5)
    with freeze(FS, state, "web-1", {"os": image}, spec) as snapshot:
        snapshot.check()
        commands.wait_for("freeze", "thaw")
        with pytest.raises(FreezeError, match=r"limit of 1\.5 s"):
            snapshot.check()
        with pytest.raises(FreezeError, match=r"limit of 1\.5 s.*raise `freeze_limit`"):
            snapshot.finish()
    assert commands.said == ["freeze", "thaw"]


def test_a_failed_thaw_is_loud_and_tried_again(image: Path, state: Path, commands: Commands) -> None:
    broken = FreezeSpec(commands.say("freeze"), commands.say("thaw", then="echo agent gone >&2; false"))
    with (
        pytest.raises(FreezeError, match=r"thawing machine 'web-1' failed.*agent gone"),
        freeze(FS, state, "web-1", {"os": image}, broken) as snapshot,
    ):
        snapshot.finish()
    assert (state / "frozen").exists()
    with pytest.raises(FreezeError, match="still frozen"):
        freeze(FS, state, "web-1", {"os": image}, broken)
    assert commands.said == ["freeze", "thaw", "thaw"], "nothing is frozen before the thaw"
    assert thaw_marked(FS, state, FreezeSpec(None, commands.say("better")))
    assert commands.said[-1] == "better"
    assert not thaw_marked(FS, state, broken)


def test_the_mark_remembers_how_to_thaw(image: Path, state: Path, commands: Commands) -> None:
    """The configuration may have lost its `thaw` meanwhile; the machine still has to go on."""
    spec = FreezeSpec(
        "true", f"test $REPLICA_DISK_0_NAME = os && test -e {state}/ready && echo thawed >> {commands.log}"
    )
    with pytest.raises(FreezeError), freeze(FS, state, "web-1", {"os": image}, spec) as snapshot:
        snapshot.finish()
    (state / "ready").touch()
    assert thaw_marked(FS, state, FreezeSpec())
    assert commands.said == ["thawed"]


def test_a_damaged_mark_is_thawed_with_the_configured_environment(image: Path, state: Path, commands: Commands) -> None:
    """A thaw command that finds its guest there would else thaw nothing, or another one."""
    spec = FreezeSpec("true", f"echo $REPLICA_MACHINE $REPLICA_DISK_0_IMAGE >> {commands.log}")
    for asked in (thaw_marked, lambda *a: freeze(a[0], a[1], "state", a[3], a[2]).__exit__()):
        (state / "frozen").write_bytes(b"rot" if asked is thaw_marked else bytes(1 << 26))  # more than is ever read
        asked(FS, state, spec, {"os": image})
        assert commands.said[:2] == ["state", str(image)]
        assert not (state / "frozen").exists()
        commands.log.write_text("")


def test_a_damaged_mark_without_a_command_asks_for_hands(state: Path, commands: Commands) -> None:
    (state / "frozen").write_bytes(b"rot")
    with pytest.raises(FreezeError, match="by hand"):
        thaw_marked(FS, state, FreezeSpec())
    assert thaw_marked(FS, state, FreezeSpec("x", commands.say("thaw")))
    assert commands.said == ["thaw"]


SENDER = """
    import sys, time
    from pathlib import Path
    from replica.durable import FileSystem
    from replica.tracking.instant import FreezeSpec, freeze
    state, image, freezing, thawing, limit = sys.argv[1:]
    spec = FreezeSpec(freezing, thawing, float(limit))
    with freeze(FileSystem(), Path(state), "web-1", {"os": Path(image)}, spec):
        print("frozen", flush=True)
        time.sleep(60)
"""


@pytest.fixture
def sender(image: Path, state: Path) -> Callable[..., subprocess.Popen[bytes]]:
    def start(freezing: str, thawing: str, limit: float = 30) -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-c", textwrap.dedent(SENDER), str(state), str(image), freezing, thawing, str(limit)]
        return subprocess.Popen(argv, stdout=subprocess.PIPE)

    return start


def kill(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_a_killed_sender_leaves_no_frozen_machine(
    sender: Callable[..., subprocess.Popen[bytes]], state: Path, commands: Commands
) -> None:
    process = sender(commands.say("freeze"), commands.say("thaw"))
    assert process.stdout is not None and process.stdout.readline() == b"frozen\n"
    kill(process)
    commands.wait_for("freeze", "thaw")
    thaw_marked(FS, state, FreezeSpec())  # the watchdog has removed the mark, or is waited for
    assert commands.said == ["freeze", "thaw"]
    assert not (state / "frozen").exists()


def test_killed_while_freeze_runs_thaw_comes_after_it(
    sender: Callable[..., subprocess.Popen[bytes]], state: Path, commands: Commands
) -> None:
    process = sender(commands.say("begin", then=f"sleep 0.7; echo end >> {commands.log}"), commands.say("thaw"))
    commands.wait_for("begin")
    kill(process)
    commands.wait_for("begin", "end", "thaw")


def test_the_next_sender_waits_for_a_thaw_that_is_under_way(
    sender: Callable[..., subprocess.Popen[bytes]], image: Path, state: Path, commands: Commands
) -> None:
    slow = f"echo thaw >> {commands.log}; sleep 0.7; echo done >> {commands.log}"
    process = sender(commands.say("freeze"), slow)
    assert process.stdout is not None and process.stdout.readline() == b"frozen\n"
    kill(process)
    with freeze(FS, state, "web-1", {"os": image}, FreezeSpec(commands.say("again"), "true")) as snapshot:
        snapshot.finish()
    assert commands.said == ["freeze", "thaw", "done", "again"]


def kill_watchdog(snapshot: instant.Snapshot) -> None:
    process = snapshot._guard._process  # type: ignore[attr-defined]
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


def test_a_killed_watchdog_is_noticed_and_another_thaws(image: Path, state: Path, commands: Commands) -> None:
    """Then nobody can say that the machine stayed frozen, and nobody else would thaw it."""
    spec = FreezeSpec(commands.say("freeze"), commands.say("thaw"))
    with (
        pytest.raises(FreezeError, match=r"was killed: the machine was thawed by a second one"),
        freeze(FS, state, "web-1", {"os": image}, spec) as snapshot,
    ):
        kill_watchdog(snapshot)
        snapshot.finish()
    assert commands.said == ["freeze", "thaw"]
    assert not (state / "frozen").exists()


def test_a_killed_watchdog_ends_the_reading_at_once(image: Path, state: Path, commands: Commands) -> None:
    spec = FreezeSpec(commands.say("freeze"), commands.say("thaw"))
    with pytest.raises(FreezeError), freeze(FS, state, "web-1", {"os": image}, spec) as snapshot:
        snapshot.check()
        kill_watchdog(snapshot)
        with pytest.raises(FreezeError, match="was killed"):
            snapshot.check()
        snapshot.finish()
    assert commands.said == ["freeze", "thaw"]


def watchdog_of(pid: int) -> int:
    """The watchdog that this process started."""
    (found,) = [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit()
        and watchdog._stat(int(entry.name))[1:2] == [str(pid)]
        and b"watchdog.py" in (entry / "cmdline").read_bytes()
    ]
    return found


@pytest.mark.parametrize("hangs", [False, True], ids=["late", "hangs"])
def test_a_freeze_whose_watchdog_was_killed_is_ended_before_the_thaw(
    image: Path, state: Path, commands: Commands, hangs: bool
) -> None:
    """A late freeze after the thaw would hold for ever: nobody would know of it."""
    late = f"(sleep 0.5; {'sleep 60;' if hangs else ''} echo late >> {commands.log})"
    spec = FreezeSpec(commands.say("begin", then=late), commands.say("thaw"))

    def kill_it() -> None:
        commands.wait_for("begin")
        os.kill(watchdog_of(os.getpid()), signal.SIGKILL)

    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill_it)
        with pytest.raises(FreezeError, match="was killed: the machine was thawed by a second one"):
            freeze(FS, state, "web-1", {"os": image}, spec)
        killed.result()
    assert commands.said == ["begin", "thaw"]
    time.sleep(0.7)
    assert commands.said == ["begin", "thaw"], "nothing of the freeze goes on"
    assert not (state / "frozen").exists()


def test_sender_and_watchdog_killed_while_freeze_runs(
    sender: Callable[..., subprocess.Popen[bytes]], state: Path, commands: Commands
) -> None:
    process = sender(commands.say("begin", then=f"sleep 0.7; echo late >> {commands.log}"), commands.say("thaw"))
    commands.wait_for("begin")
    os.kill(watchdog_of(process.pid), signal.SIGKILL)
    kill(process)
    assert thaw_marked(FS, state, FreezeSpec())
    time.sleep(0.8)
    assert commands.said == ["begin", "thaw"]


def test_a_thaw_whose_watchdog_was_killed_does_not_reach_into_the_next_freeze(
    sender: Callable[..., subprocess.Popen[bytes]], image: Path, state: Path, commands: Commands
) -> None:
    slow = f"echo thaw >> {commands.log}; sleep 0.7; echo late >> {commands.log}"
    process = sender(commands.say("freeze"), slow)
    assert process.stdout is not None and process.stdout.readline() == b"frozen\n"
    guarding = watchdog_of(process.pid)
    kill(process)
    commands.wait_for("freeze", "thaw")
    os.kill(guarding, signal.SIGKILL)
    with freeze(FS, state, "web-1", {"os": image}, FreezeSpec(commands.say("again"), commands.say("end"))) as snapshot:
        time.sleep(0.8)
        assert commands.said == ["freeze", "thaw", "end", "again"]
        snapshot.finish()


def test_only_the_session_that_was_noted_is_ended(tmp_path: Path) -> None:
    """A number that is another process's by now, or is of another host or start, is nobody to kill."""
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:
        started = watchdog._stat(process.pid)[watchdog._STARTED]
        path = tmp_path / "frozen.lock"
        for noted in (
            {"session": process.pid, "started": "1", "where": watchdog._where()},
            {"session": process.pid, "started": started, "where": "elsewhere"},
            {"session": process.pid, "started": started},
            [],
        ):
            path.write_text(json.dumps(noted))
            lock = watchdog._Lock.take(str(path), 0)
            assert lock is not None and lock.end_other() and process.poll() is None
            assert path.read_bytes() == b""
            os.close(lock._fd)
        path.write_text(json.dumps({"session": process.pid, "started": started, "where": watchdog._where()}))
        lock = watchdog._Lock.take(str(path), 0)
        assert lock is not None and lock.end_other()
        assert process.wait(5) == -signal.SIGKILL
        os.close(lock._fd)


def test_without_proc_nothing_is_frozen_and_thaw_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_stat", lambda _pid: [])
    monkeypatch.setattr(watchdog, "_where", lambda: "")
    path = tmp_path / "frozen.lock"
    path.write_text(json.dumps({"session": 1, "started": "1", "where": ""}))
    lock = watchdog._Lock.take(str(path), 0)
    assert lock is not None and lock.end_other()
    order = {"lock": str(path), "freeze": ["touch", str(tmp_path / "frozen")], "environment": {}, "limit": 1}
    assert "/proc cannot be read" in watchdog._freeze(order, lock)[1] and not (tmp_path / "frozen").exists()
    order |= {
        "thaw": ["touch", str(tmp_path / "thawed")],
        "thaw_limit": 9,
        "thaw_again": (),
        "mark": str(tmp_path / "m"),
    }
    watchdog._thaw(order, "request", SimpleNamespace(tell=lambda *_a, **_k: None), lock)  # type: ignore[arg-type]
    assert (tmp_path / "thawed").exists()
    os.close(lock._fd)


def test_what_cannot_be_ended_keeps_the_mark_and_freezes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog._Lock, "end_other", lambda _self: False)
    told: list[tuple[str, bool]] = []
    output = SimpleNamespace(
        tell=lambda about, **answer: told.append((about, answer.get("frozen", False) or answer.get("thawed", False)))
    )
    lines = SimpleNamespace(line=lambda _limit: b"now thaw")
    mark = tmp_path / "frozen"
    mark.touch()
    order = {
        "lock": str(tmp_path / "frozen.lock"),
        "lock_wait": 0,
        "mark": str(mark),
        "freeze": [],
        "thaw": ["touch", str(tmp_path / "thawed")],
        "thaw_limit": 10,
        "thaw_again": (),
        "environment": {},
        "limit": 10,
    }
    watchdog._obey(order, lines, output)  # type: ignore[arg-type]
    assert told == [("thawed", False)] and (tmp_path / "thawed").exists() and mark.exists()


def test_a_second_guard_that_cannot_thaw_leaves_the_mark(image: Path, state: Path, commands: Commands) -> None:
    spec = FreezeSpec(commands.say("freeze"), commands.say("thaw", then=f"test -e {state}/ready"))
    with (
        pytest.raises(FreezeError, match=r"thawing machine 'web-1' failed"),
        freeze(FS, state, "web-1", {"os": image}, spec) as snapshot,
    ):
        kill_watchdog(snapshot)
        snapshot.finish()
    (state / "ready").touch()
    assert thaw_marked(FS, state, spec)


def test_a_thaw_that_was_killed_is_tried_again(
    image: Path, state: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a service manager does that signals every process of the unit."""
    monkeypatch.setattr(instant, "THAW_AGAIN_SECONDS", (0.01, 0.02))
    once = f"test -e {state}/again || {{ touch {state}/again; kill -TERM $$; }}"
    with freeze(FS, state, "web-1", {"os": image}, FreezeSpec("true", commands.say("thaw", then=once))) as snapshot:
        snapshot.finish()
    assert commands.said == ["thaw", "thaw"]
    assert not (state / "frozen").exists()
    with pytest.raises(FreezeError, match="status 1"):
        freeze(FS, state, "web-1", {"os": image}, FreezeSpec("false", commands.say("no", then="false")))
    assert commands.said == ["thaw", "thaw", "no", "no", "no"], "bounded"


def test_the_limit_thaws_though_the_sender_does_not_read(image: Path, state: Path, commands: Commands) -> None:
    guarding = guard.Guard()
    spam = commands.say("freeze", then="head -c 500000 /dev/zero | tr '\\0' x")
    (state / "frozen").touch()
    guarding.order(state / "frozen", ["sh", "-c", spam], ["sh", "-c", commands.say("thaw")], 1.0, {})
    commands.wait_for("freeze", "thaw")
    assert len(guarding.ask("frozen", 5).output) == 500000, "the rest is told when it is asked for"
    assert guarding.ask("thawed", 5).cause == "limit"
    guarding.end()


def test_output_without_end_is_kept_in_bounded_form(image: Path, state: Path, commands: Commands) -> None:
    spec = FreezeSpec("echo os=/snap; yes x & exec yes error >&2", commands.say("thaw"), 1.0)
    shared_kib = shmem_kib()
    with pytest.raises(FreezeError, match=r"was killed: (r?o?r? ?)(error ?)+") as caught:
        freeze(FS, state, "web-1", {"os": image}, spec)
    assert len(str(caught.value)) < 3000
    assert shmem_kib() - shared_kib < 64 << 10
    assert commands.said == ["thaw"]
    with freeze(FS, state, "web-1", {"os": image}, FreezeSpec("yes & echo $! > /dev/null; sleep 0.2; kill $!", "true")):
        pass


def shmem_kib() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Shmem:"))


def test_output_of_a_daemon_left_behind_goes_on(image: Path, state: Path, commands: Commands) -> None:
    """A server of snapshots that logs must not die of a pipe that nobody reads."""
    daemon = f"{{ sleep 0.2; head -c 300000 /dev/zero && echo lives >> {commands.log}; }} &"
    with freeze(FS, state, "web-1", {"os": image}, FreezeSpec(f"{daemon} echo os=/snap", "true")) as snapshot:
        assert snapshot.paths == {"os": Path("/snap")}
        commands.wait_for("lives")


@pytest.mark.parametrize("command", [[], "", " ", [""], "echo \0", ["echo", "a\0b"]])
def test_commands_that_nothing_can_run_are_refused(command: str | list[str]) -> None:
    with pytest.raises(ConfigError, match="`freeze`"):
        FreezeSpec(command, "true")
    with pytest.raises(ConfigError, match="`thaw`"):
        FreezeSpec("true", command)


def test_no_mark_where_nothing_can_be_frozen(
    image: Path, state: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = FreezeSpec(commands.say("freeze"), commands.say("thaw"))
    for program in ("/none/such", "/bin/false"):
        monkeypatch.setattr(guard.sys, "executable", program)
        with pytest.raises(FreezeError, match="watchdog process.*cannot be started.*nothing was frozen"):
            freeze(FS, state, "web-1", {"os": image}, spec)
    monkeypatch.undo()
    with pytest.raises(StorageError):
        freeze(FS, state / "none", "web-1", {"os": image}, spec)
    assert commands.said == []
    assert list(state.iterdir()) == []


def test_signals_do_not_end_the_watchdog(image: Path, state: Path, commands: Commands) -> None:
    spec = FreezeSpec(commands.say("freeze"), commands.say("thaw"))
    with freeze(FS, state, "web-1", {"os": image}, spec) as snapshot:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(snapshot._guard._process.pid, number)  # type: ignore[attr-defined]
        snapshot.finish()
    assert commands.said == ["freeze", "thaw"]


def test_environment_names_every_disk(tmp_path: Path, image: Path, state: Path, commands: Commands) -> None:
    images = {"os": image, "data disk": tmp_path / "d.raw"}
    assert environment_of("web-1", images) == {
        "REPLICA_MACHINE": "web-1",
        "REPLICA_DISKS": "2",
        "REPLICA_DISK_0_NAME": "os",
        "REPLICA_DISK_0_IMAGE": str(image),
        "REPLICA_DISK_1_NAME": "data disk",
        "REPLICA_DISK_1_IMAGE": str(tmp_path / "d.raw"),
    }
    say = f"echo $REPLICA_MACHINE $REPLICA_DISK_1_IMAGE >> {commands.log}"
    with freeze(FS, state, "web-1", images, FreezeSpec(say, ["sh", "-c", say])) as snapshot:
        snapshot.finish()
    assert commands.said == ["web-1", str(tmp_path / "d.raw")] * 2


def test_freeze_may_name_snapshots(image: Path, state: Path) -> None:
    spec = FreezeSpec("echo made; echo os=/dev/vg/snap; echo x=y", "true")
    with freeze(FS, state, "web-1", {"os": image, "data": image}, spec) as snapshot:
        assert snapshot.paths == {"os": Path("/dev/vg/snap"), "data": image}


def test_snapshot_paths_are_absolute() -> None:
    assert snapshot_paths({"os": Path("/a")}, "os = 1\nos=/b=c\n") == {"os": Path("/b=c")}
    with pytest.raises(FreezeError, match="absolute"):
        snapshot_paths({"os": Path("/a")}, "os=snap.raw")


def test_a_path_that_was_meant_for_a_disk_is_never_overlooked() -> None:
    disks = {"os": Path("/a"), "data": Path("/b")}
    assert snapshot_paths(disks, "LVM_DIR=/etc\nos=/snap\n") == {"os": Path("/snap"), "data": Path("/b")}
    assert snapshot_paths(disks, "done\nx=1\n") == disks
    for said in ("OS=/snap", "os=/snap\nDATA=/snap", "foo=/snap"):
        with pytest.raises(FreezeError, match="no disk of the machine.*os, data"):
            snapshot_paths(disks, said)


def test_an_image_that_is_written_while_frozen_makes_no_point(image: Path, state: Path, tmp_path: Path) -> None:
    spec = FreezeSpec("true", f"echo thawed > {tmp_path}/thawed")
    with (
        pytest.raises(SourceBusyError, match="although machine 'm' was frozen"),
        freeze(FS, state, "m", {"os": image}, spec) as snapshot,
    ):
        with image.open("r+b") as file:
            file.write(b"a writer that freeze did not stop")
        snapshot.finish()
    assert (tmp_path / "thawed").exists()


def test_without_commands_the_source_must_stand_still(image: Path, state: Path) -> None:
    with freeze(FS, state, "web-1", {"os": image}, FreezeSpec(consistency=Consistency.APPLICATION)) as snapshot:
        assert snapshot.consistency is Consistency.CRASH, "nothing made the application consistent"
        snapshot.finish()
    with freeze(FS, state, "web-1", {"os": image}, FreezeSpec()) as snapshot:
        image.write_bytes(b"CONTENT")
        with pytest.raises(SourceBusyError, match="was written while it was read"):
            snapshot.finish()
    assert list(state.iterdir()) == []


def test_thaw_that_never_ends_is_bounded(
    image: Path, state: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "THAW_LIMIT_SECONDS", 0.3)
    with (
        pytest.raises(FreezeError, match=r"did not end within 0.3 s"),
        freeze(FS, state, "web-1", {"os": image}, FreezeSpec("true", "sleep 60")) as snapshot,
    ):
        snapshot.finish()
