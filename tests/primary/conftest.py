"""`lab`: one machine with two disks of odd sizes, and its replica site."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from primary_lab import Lab, MiB

from replica.tracking import instant


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path, {"os": 21 * MiB + 1234, "data": 9 * MiB})
    yield lab
    lab.site.close()


@pytest.fixture(autouse=True)
def _thaw_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting between the tries of a thaw that fails; tests/tracking tries them."""
    monkeypatch.setattr(instant, "THAW_AGAIN_SECONDS", ())
