"""The format is the operator's choice or the name's, never the content's."""

from pathlib import Path

import pytest
import vhd_maker

from replica import images
from replica.errors import ImageError


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("a.vhd", None, "vhd"),
        ("A.VHD", None, "vhd"),
        ("a.avhd", None, "vhd"),
        ("a.vhdx", None, "vhdx"),
        ("a.AVHDX", None, "vhdx"),
        ("a.raw", None, "raw"),
        ("a.img", None, "raw"),
        ("a.b.img", None, "raw"),
        ("a.vhd", "raw", "raw"),
        ("a", "vhd", "vhd"),
        ("a.qcow2", "raw", "raw"),
        ("a.qcow2", None, "qcow2"),
        ("a.vmdk", None, "vmdk"),
        ("a.VDI", None, "vdi"),
    ],
)
def test_format_of(tmp_path: Path, name: str, given: str | None, expected: str) -> None:
    assert images.format_of(tmp_path / name, given) == expected


@pytest.mark.parametrize("name", ["disk", "disk.bin", "disk.vhd.bak", ".vhd", "disk."])
def test_a_name_that_says_nothing_asks_for_the_format(tmp_path: Path, name: str) -> None:
    with pytest.raises(ImageError, match='set format = "raw" or format = "vhd" or format = "vhdx"'):
        images.format_of(tmp_path / name)


def test_an_unknown_word_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="the format 'qcow9' is not known; set format"):
        images.format_of(tmp_path / "a.raw", "qcow9")


def test_a_raw_disk_with_the_magic_of_a_vhd_stays_raw(tmp_path: Path) -> None:
    content = vhd_maker.Vhd(1 << 20, blocks={3: b"secret" * 100}).build()
    path = tmp_path / "guest.img"
    path.write_bytes(content)
    with images.open(path) as image:
        buffer = bytearray(len(content))
        image.read_into(0, buffer)
        assert buffer == content


def test_a_raw_disk_under_a_vhd_name_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "raw.vhd"
    path.write_bytes(b"\x55\xaa" * 4096)
    with pytest.raises(ImageError, match=r'no VHD .*set format = "raw"') as caught:
        images.open(path)
    assert str(path) in caught.value.message
    with images.open(path, "raw") as image:
        assert image.size_bytes == 8192


def test_an_error_says_what_the_content_looks_like(tmp_path: Path) -> None:
    path = tmp_path / "a.vhd"
    path.write_bytes(b"vhdxfile" + bytes(70000))
    with pytest.raises(ImageError, match=r"no VHD .*\(its content looks like vhdx\)"):
        images.open(path)
