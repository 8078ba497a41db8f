"""What a person reads: sizes, times, tables, one line per error; and what a program reads: one JSON document."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from replica.cli.app import run
from replica.cli.output import complain, duration, error_fields, print_json, print_table, size
from replica.errors import BusyError, StorageFullError


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (3 << 40, "3.0 TiB")],
)
def test_size(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.44, "0.4 s"),
        (12, "12 s"),
        (59.7, "1 min"),
        (300, "5 min"),
        (303, "5 min 3 s"),
        (3600, "1 h"),
        (7800, "2 h 10 min"),
        (86400 * 3 + 4 * 3600, "3 d 4 h"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("machine", "point", "state"), [("web-1", "7", "ok"), ("db", "12", "applying")])
    assert capsys.readouterr().out.splitlines() == [
        "machine  point  state",
        "web-1        7  ok",
        "db          12  applying",
    ]


def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    complain(StorageFullError("cannot write /x:\nno space"), "web-1")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("replica: web-1: cannot write /x: no space; free some space")
    assert err.count("\n") == 1


def test_an_error_in_json() -> None:
    assert error_fields(BusyError("web-1 is busy", hint="wait")) == {
        "code": "busy",
        "message": "web-1 is busy",
        "hint": "wait",
        "exit_code": 9,
        "retryable": True,
    }


def test_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    print_json([{"a": 1, "b": ["ä", None]}])
    out = capsys.readouterr().out
    assert json.loads(out) == [{"a": 1, "b": ["ä", None]}]
    assert out.endswith("]\n")


def test_keys_that_everybody_may_read_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `sync` and by `serve`, before they do anything: the data keys and the one for TLS."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("replica.transport.tls.client_context", lambda _files: None)
    monkeypatch.setattr("replica.primary.runner.sync_machines", lambda *_, **__: [])
    monkeypatch.setattr("replica.receiver.server.serve", lambda _spec: None)
    monkeypatch.setattr("replica.cli.log.log_to_stderr", lambda: None)
    tls = '[tls]\nca = "ca"\ncert = "cert"\nkey = "tls.key"\n'
    machine = '[[machine]]\nname = "web-1"\nto = "https://h"\n[[machine.disk]]\nname = "os"\nimage = "os.raw"\n'
    Path("sender.toml").write_text('name = "hv-1"\nstate = "state"\n' + tls + machine)
    Path("receiver.toml").write_text('listen = ":0"\n' + tls + '[[storage]]\nname = "a"\npath = "store"\n')
    files = [Path("keys/id/1.key"), Path("store/id/keys/1.key"), Path("store/receipt.key"), Path("tls.key")]
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    for open_to_all, of_sync, of_serve in ((False, set(), set()), (True, {0, 3}, {1, 2, 3})):
        for path in files:
            path.chmod(0o644 if open_to_all else 0o640)
        for command, expected in (
            (["sync", "-c", "sender.toml"], of_sync),
            (["serve", "-c", "receiver.toml"], of_serve),
        ):
            assert run(command) == 0
            err = capsys.readouterr().err
            assert {n for n, path in enumerate(files) if f"the key {tmp_path / path} is open" in err} == expected, err
            assert len(err.splitlines()) == len(expected)
