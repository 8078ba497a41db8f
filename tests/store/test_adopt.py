"""What images can be adopted under: decided before anything is copied."""

from __future__ import annotations

from pathlib import Path

import pytest

from replica.durable import FileSystem
from replica.errors import ConfigError
from replica.store import adopt_images
from tests.store.small_primary import SmallPrimary


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a/b"], "'a/b' may hold letters"),
        ([".."], "not start with a dot"),
        (["x" * 129], "1 to 128 bytes"),
        (["machine-files"], "taken by the machine's files"),
        ([f"d{n}" for n in range(257)], "257 images"),
        (["os", "\udcff"], "may hold letters"),
    ],
)
def test_names_that_no_disks_can_have_are_refused_before_anything_is_copied(
    fs: FileSystem, tmp_path: Path, names: list[str], words: str
) -> None:
    store = SmallPrimary({"os": 4096}).enrol(fs, tmp_path)
    store.close()
    image = tmp_path / "image.raw"
    image.write_bytes(bytes(4096))
    with pytest.raises(ConfigError, match=words):
        adopt_images(fs, store.directory, dict.fromkeys(names, image))
    assert list((store.directory / "head").iterdir()) == []
