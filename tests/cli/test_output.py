"""What a person reads: sizes, times, tables, one line per error; and what a program reads: one JSON document."""

from __future__ import annotations

import json

import pytest

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
