"""What all tests share: the file system, and how hard hypothesis tries.

`HYPOTHESIS_PROFILE=deep make test` looks a hundred times longer for a counterexample.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

from replica import pipeline
from replica.durable import FileSystem

settings.register_profile("default", deadline=None, print_blob=True)
settings.register_profile("deep", deadline=None, print_blob=True, max_examples=10_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many states the crash explorer tried (tests/crash)."""
    reports = [report for word in ("passed", "failed") for report in terminalreporter.stats.get(word, [])]
    properties = [item for report in reports for item in getattr(report, "user_properties", [])]
    count = sum(int(str(value)) for name, value in properties if name == "crash states")
    if count:
        terminalreporter.write_line(f"crash explorer: {count} states recovered from")


@pytest.fixture(autouse=True)
def used_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows are used again and again: what a reader leaves as it was there is never zeros by luck."""
    fresh = pipeline.aligned

    def used(size_bytes: int) -> pipeline.Bytes:
        memory = fresh(size_bytes)
        memory[:] = 0xA5
        return memory

    monkeypatch.setattr(pipeline, "aligned", used)


@pytest.fixture
def fs() -> FileSystem:
    return FileSystem()
