"""The VHD structures: every field of the footer and header, and which size counts."""

from uuid import UUID

import pytest
import vhd_maker

from replica.images.vhd_format import MAX_GEOMETRY, DiskType, DynamicHeader, Footer, Geometry

ID = UUID(int=0x0102030405060708090A0B0C0D0E0F10)


@pytest.mark.parametrize(
    ("sectors", "expected"),
    [
        (0, (0, 4, 17)),
        (67, (0, 4, 17)),
        (68, (1, 4, 17)),
        (0x3FBFF, (0x3FF, 15, 17)),
        (0x3FC00, (0x20E, 16, 31)),
        (0x3FC11, (0x3C0, 16, 17)),
        (17 * 16 * 1024 - 1, (1023, 16, 17)),
        (17 * 16 * 1024, (561, 16, 31)),
        (31 * 16 * 1024 - 1, (1023, 16, 31)),
        (31 * 16 * 1024, (503, 16, 63)),
        (6291456, (6241, 16, 63)),
        (65535 * 16 * 63 - 1, (65534, 16, 63)),
        (65535 * 16 * 63, (16191, 16, 255)),
        (65535 * 16 * 255, (65535, 16, 255)),
        (1 << 40, (65535, 16, 255)),
    ],
)
def test_geometry_of_a_size(sectors: int, expected: tuple[int, int, int]) -> None:
    geometry = Geometry.of(sectors * 512)
    assert (geometry.cylinders, geometry.heads, geometry.sectors) == expected
    assert geometry.size_bytes <= sectors * 512 or geometry == MAX_GEOMETRY


def test_written_footer_has_every_field_in_its_place() -> None:
    data = Footer.new(DiskType.FIXED, 3 << 30, ID).encode()
    assert len(data) == 512
    assert data[0:8] == b"conectix"
    assert data[8:12] == bytes([0, 0, 0, 2])
    assert data[12:16] == bytes([0, 1, 0, 0])
    assert data[16:24] == b"\xff" * 8
    assert data[28:32] == b"win "
    assert data[36:40] == b"Wi2k"
    assert data[40:48] == data[48:56] == (3 << 30).to_bytes(8, "big")
    assert data[56:60] == bytes([6241 >> 8, 6241 & 255, 16, 63])
    assert data[60:64] == bytes([0, 0, 0, 2])
    assert data == vhd_maker.checksummed(data, 64)
    assert data[68:84] == ID.bytes
    assert data[84:] == bytes(428)


def test_footer_round_trip() -> None:
    footer = Footer.new(DiskType.FIXED, 12288, ID)
    assert Footer.decode(footer.encode()) == footer
    assert Footer.decode(footer.encode()[:511]) == footer


def test_any_changed_byte_of_a_footer_is_noticed() -> None:
    data = vhd_maker.footer(1 << 20)
    assert Footer.decode(data).disk_type == DiskType.FIXED
    for at in range(512):
        with pytest.raises(ValueError, match=r"it does not start|its checksum"):
            Footer.decode(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])


def test_any_changed_byte_of_a_header_is_noticed() -> None:
    data = vhd_maker.Vhd(1 << 20).header()
    assert DynamicHeader.decode(data) == DynamicHeader(1536, 128, 8192)
    for at in range(1024):
        with pytest.raises(ValueError, match=r"it does not start|its checksum"):
            DynamicHeader.decode(data[:at] + bytes([data[at] ^ 0x01]) + data[at + 1 :])


def test_unknown_versions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"format version is 2\.0"):
        Footer.decode(vhd_maker.footer(512, version=0x20000))
    with pytest.raises(ValueError, match=r"version is 2\.1"):
        DynamicHeader.decode(vhd_maker.Vhd(8192, header_version=0x20001).header())
    Footer.decode(vhd_maker.footer(512, version=0x10003))


CHS_BYTES = 100 * 16 * 63 * 512


@pytest.mark.parametrize("creator", [b"vpc ", b"qemu"])
def test_geometry_counts_for_these_creators(creator: bytes) -> None:
    assert Footer.decode(vhd_maker.footer(1 << 26, creator=creator, chs=(100, 16, 63))).size_bytes == CHS_BYTES


@pytest.mark.parametrize(
    "creator", [b"win ", b"qem2", b"CTXS", b"tap\0", b"d2v ", b"d2v\0", b"vbox", b"vs  ", b"\0" * 4]
)
def test_current_size_counts_for_all_others(creator: bytes) -> None:
    assert Footer.decode(vhd_maker.footer(1 << 26, creator=creator, chs=(100, 16, 63))).size_bytes == 1 << 26


@pytest.mark.parametrize("creator", [b"vpc ", b"qemu"])
def test_current_size_counts_when_the_geometry_is_at_its_maximum(creator: bytes) -> None:
    footer = vhd_maker.footer(1 << 40, creator=creator, chs=(65535, 16, 255))
    assert Footer.decode(footer).size_bytes == 1 << 40
