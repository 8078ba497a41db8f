"""What images can be adopted under: decided before anything is copied."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import pytest

from replica.durable import FileSystem
from replica.errors import ConfigError, ImageError
from replica.images.image import ParentLink
from replica.images.vhd_write import VhdWriter
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


def test_a_differencing_image_is_adopted_with_its_parent_from_another_folder(fs: FileSystem, tmp_path: Path) -> None:
    store = SmallPrimary({"os": 4096}).enrol(fs, tmp_path / "store")
    store.close()
    folders = [tmp_path / name for name in ("bases", "snapshots")]
    for folder in folders:
        folder.mkdir()
    base, child = folders[0] / "base.vhd", folders[1] / "os.avhd"
    with VhdWriter.create(fs, base, 8192, UUID(int=1)) as image:
        image.write(0, b"b" * 8192)
        image.sync()
    link = ParentLink(folders[1] / "base.vhd", UUID(int=1))
    with VhdWriter.create(fs, child, 8192, UUID(int=2), parent=link) as image:
        image.write(512, b"c" * 512)
        image.sync()
    with pytest.raises(ImageError, match="is not in"):
        adopt_images(fs, store.directory, {"os": child})
    adopt_images(fs, store.directory, {"os": child}, parents=[folders[0]])
    (head,) = (path for path in (store.directory / "head").glob("*.img") if not path.is_symlink())
    assert head.read_bytes()[:8192] == b"b" * 512 + b"c" * 512 + b"b" * 7168
