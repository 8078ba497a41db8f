"""The edge of the process: help, usage, errors as one line with an exit code, and a light start."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from replica import __version__
from replica.cli.app import cli, run
from replica.cli.command import Command, json_option
from replica.cli.output import print_json
from replica.errors import SourceBusyError
from replica.model import Consistency, ReplicaId, random_id
from replica.primary import runner
from replica.primary.cycle import SyncResult
from replica.primary.runner import Outcome
from replica.transport import tls

COMMANDS = ["lock", "pki", "points", "prune", "receipt", "restore", "run", "serve", "status", "sync", "verify"]
REPLICA = [sys.executable, "-m", "replica"]


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """A command `broken` that raises what a test says."""

    def install(error: BaseException) -> None:
        @click.command(cls=Command)
        @json_option
        def broken(as_json: bool) -> None:
            raise error

        monkeypatch.setitem(cli.commands, "broken", broken)

    return install


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"replica {__version__}\n"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    listed = [line.split()[0] for line in out[out.index("Commands:") :].splitlines()[1:] if line.startswith("  ")]
    assert [name for name in listed if name in COMMANDS] == COMMANDS


@pytest.mark.parametrize(
    "command",
    [
        *(name for name in COMMANDS if name not in ("pki", "receipt")),
        "pki init",
        "pki issue",
        "receipt show",
        "receipt export",
        "receipt verify",
    ],
)
def test_help_of_a_command_shows_an_example(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert run([*command.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert "Example" in out
    assert f"replica {command}" in out.replace("Usage: ", "", 1)[out.index("\n") :]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sink"], "sink"),
        (["serve"], "-c"),
        (["points", "-c", "x.toml"], "MACHINE"),
        (["restore", "m", "-c", "x", "--to", "y", "--point", "0"], "--point"),
        (["restore", "m", "-c", "x", "--to", "y", "--format", "vdi"], "vdi"),
    ],
)
def test_wrong_usage_is_one_line_and_2(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("replica: ")
    assert words in err
    assert "--help`" in err
    assert err.count("\n") == 1


def test_an_error_has_its_line_and_code(
    broken: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    broken(SourceBusyError("it moved", hint="freeze it"))
    assert run(["broken"]) == 5
    assert capsys.readouterr() == ("", "replica: it moved; freeze it\n")


def test_an_error_in_json_is_a_document(
    broken: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    broken(SourceBusyError("it moved", hint="freeze it"))
    assert run(["broken", "--json"]) == 5
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["code"] == "source-busy"
    assert err == "replica: it moved; freeze it\n"


def test_debug_shows_the_traceback(
    broken: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    broken(SourceBusyError("it moved"))
    assert run(["broken", "--debug"]) == 5
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("replica: it moved\n")


def test_ctrl_c_ends_with_130(broken: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]) -> None:
    broken(KeyboardInterrupt())
    assert run(["broken"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_fault_in_the_engine_is_one_line_and_1() -> None:
    program = (
        "import sys; from replica.cli import app; import replica.config\n"
        "def fault(path): raise ZeroDivisionError('of course')\n"
        "replica.config.kind_of = fault\n"
        "sys.argv = ['replica', 'status', '-c', 'x', *sys.argv[1:]]\n"
        "sys.exit(app.main())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        "replica: fault in the engine: ZeroDivisionError: of course; run again with --debug and report it\n"
    )
    done = subprocess.run([sys.executable, "-c", program, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["code"] == "internal"
    done = subprocess.run([sys.executable, "-c", program, "--debug"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_a_reader_that_hangs_up_is_no_error() -> None:
    with subprocess.Popen([*REPLICA, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("replica.cli.app", ["cryptography", "aiohttp", "rich", "numpy", "replica._native"]),
        ("replica.cli.app, replica.config, replica.primary.cycle, replica.transport.client", ["aiohttp", "rich"]),
    ],
)
def test_the_start_is_light(modules: str, absent: list[str]) -> None:
    program = f"import sys, {modules}; print(*[m for m in {absent!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_bars_are_drawn_on_a_terminal_only() -> None:
    program = (
        "from replica.cli.bars import bars\n"
        "with bars(False) as bar:\n"
        "    move = bar('sync web-1')\n"
        "    for n in range(11): move(n * 1000, 10000)\n"
    )
    piped = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (piped.stdout, piped.stderr) == ("", "")
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=follower, env=environment
    ) as process:
        out, _ = process.communicate(timeout=30)
    os.close(follower)
    drawn = os.read(leader, 1 << 16).decode()
    os.close(leader)
    assert process.returncode == 0
    assert out == b""
    assert "sync web-1" in drawn
    assert "kB/s" in drawn or "/s" in drawn


def test_sigterm_ends_a_command_without_a_traceback(tmp_path: Path) -> None:
    program = (
        "import sys, time; from replica.cli import app; import replica.config\n"
        "def slow(path): print('here', flush=True); time.sleep(30)\n"
        "replica.config.kind_of = slow\n"
        "sys.argv = ['replica', 'status', '-c', 'x']\n"
        "sys.exit(app.main())"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "here\n"
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=10)
    assert process.returncode == 143
    assert "Traceback" not in err


def test_an_interrupted_sync_still_prints_its_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One machine's point is committed, the other's cycle is stopped: both are told, and the code is the signal's."""

    def interrupted(*_: object, **__: object) -> list[Outcome]:
        os.kill(os.getpid(), signal.SIGTERM)
        return [
            Outcome(
                "a",
                result=SyncResult(
                    "a", ReplicaId(random_id()), 1, 1_000, Consistency.CRASH, "first", 10, 10, 20, 0.1, {}
                ),
            ),
            Outcome("b"),
        ]

    monkeypatch.setattr(runner, "sync_machines", interrupted)
    monkeypatch.setattr(tls, "client_context", lambda _files: None)
    text = 'name = "hv-1"\nstate = "s"\n[tls]\nca = "c"\ncert = "c"\nkey = "k"\n'
    for name in ("a", "b"):
        text += f'[[machine]]\nname = "{name}"\nto = "https://h"\n[[machine.disk]]\nname = "os"\nimage = "a.img"\n'
    (tmp_path / "sender.toml").write_text(text)
    assert run(["sync", "--json", "-c", str(tmp_path / "sender.toml")]) == 143
    first, second = json.loads(capsys.readouterr().out)
    assert (first["machine"], first["point"]) == ("a", 1)
    assert (second["machine"], second["error"]["code"]) == ("b", "busy")


SENDER = (
    'name = "hv-1"\nstate = "s"\nkeys = "k"\n[tls]\nca = "c"\ncert = "c"\nkey = "k"\n'
    '[[machine]]\nname = "a"\nto = "https://h"\n[[machine.disk]]\nname = "os"\nimage = "a.img"\n'
)


@pytest.mark.parametrize(
    "arguments",
    [
        ["points", "--json"],
        ["points", "m", "-c", "x", "--json", "--sink"],
        ["restore", "m", "-c", "x", "--to", "y", "--point", "0", "--json"],
        ["lock", "m", "-c", "x", "--point", "1", "--json"],
        ["lock", "m", "-c", "x", "--point", "1", "--until", "2027-01-01", "--reason", "\udcff", "--json"],
        ["verify", "m", "-c", "x", "--rate", "0.0000001KiB/s", "--json"],
        ["verify", "m", "-c", "x", "--rate", f"{'9' * 400}GiB/s", "--json"],
        ["adopt", "m", "-c", "x", "--disk", "os", "--json"],
    ],
)
def test_wrong_usage_in_json_is_a_document(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    error = json.loads(out)["error"]
    assert (error["code"], error["exit_code"], error["retryable"]) == ("usage", 2, False)
    assert err == f"replica: {error['message']}; {error['hint']}\n"


def test_an_interruption_in_json_is_a_document(
    broken: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    for error, code in ((KeyboardInterrupt(), 130), (SystemExit(143), 143)):
        broken(error)
        assert run(["broken", "--json"]) == code
        out, err = capsys.readouterr()
        found = json.loads(out)["error"]
        assert (found["code"], found["exit_code"], found["retryable"]) == ("interrupted", code, True)
        assert "nothing is lost" in err


def test_an_interruption_after_the_document_adds_no_second(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command(cls=Command)
    @json_option
    def late(as_json: bool) -> None:
        print_json({"done": True})
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.commands, "late", late)
    assert run(["late", "--json"]) == 130
    assert json.loads(capsys.readouterr().out) == {"done": True}


@pytest.mark.parametrize("made", [False, True])
def test_an_interrupted_resync_prints_what_became_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], made: bool
) -> None:
    result = SyncResult("a", ReplicaId(random_id()), 7, 1_000, Consistency.CRASH, "resync", 10, 10, 20, 0.1, {})

    def interrupted(*_: object, **__: object) -> list[Outcome]:
        os.kill(os.getpid(), signal.SIGINT)
        return [Outcome("a", result=result if made else None)]

    monkeypatch.setattr(runner, "sync_machines", interrupted)
    monkeypatch.setattr(tls, "client_context", lambda _files: None)
    (tmp_path / "sender.toml").write_text(SENDER)
    assert run(["resync", "a", "--json", "-c", str(tmp_path / "sender.toml")]) == 130
    entry = json.loads(capsys.readouterr().out)
    assert entry["machine"] == "a"
    assert entry["point"] == 7 if made else entry["error"]["code"] == "busy"


def test_a_name_that_is_not_utf_8_is_no_fault(tmp_path: Path) -> None:
    for arguments in (["status"], ["points", b"\xff"]):
        done = subprocess.run(
            [*REPLICA, *arguments, "--json", "-c", os.fsencode(tmp_path) + b"/\xff"], capture_output=True, check=False
        )
        assert done.returncode == 3
        assert "\N{REPLACEMENT CHARACTER}" in json.loads(done.stdout)["error"]["message"]
    program = "import sys; from replica.cli import app; app.run = lambda a: print(a[0]); sys.exit(app.main())"
    done = subprocess.run([sys.executable, "-c", program, b"/\xff"], capture_output=True, check=False)
    assert done.stdout == b"/\xff\n"
