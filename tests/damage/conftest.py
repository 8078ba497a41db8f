"""`lab`: one small machine with two disks, three points, and its replica site; the damage is the test's."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.damage.damage_lab import DamageLab


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[DamageLab]:
    lab = DamageLab(tmp_path)
    yield lab
    lab.site.close()
