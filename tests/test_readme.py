"""The README's examples work as printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 2
    for step in ("images.open", "sync_machine", "restore_point"):
        assert step in EXAMPLES[0]


@pytest.mark.parametrize("example", EXAMPLES, ids=["engine", "delta"])
def test_an_example_works_as_printed(example: str, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(example)
    done = subprocess.run(
        [sys.executable, "-W", "error", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    if "sync_machine" in example:
        assert [line.split()[0] for line in done.stdout.splitlines()] == ["raw", "1", "2"]
        assert (tmp_path / "out/os.raw").read_bytes() == b"monday" * 100_000
