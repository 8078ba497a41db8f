"""Fixed and dynamic VHD, against files made byte by byte from the specification."""

import os
import threading
from pathlib import Path

import pytest
import vhd_maker
from hypothesis import given, settings
from hypothesis import strategies as st

from replica import images
from replica.durable import FileSystem, SystemCalls
from replica.errors import ImageError
from replica.images import vhd_blocks
from replica.images.image import Image
from replica.images.vhd import VhdImage


def whole(image: Image) -> bytes:
    buffer = bytearray(b"\xa5" * image.size_bytes)
    image.read_into(0, buffer)
    return bytes(buffer)


def open_bytes(path: Path, data: bytes) -> VhdImage:
    path.write_bytes(data)
    return VhdImage.open(FileSystem(), path)


def test_fixed(tmp_path: Path) -> None:
    content = os.urandom(10 * 512)
    with open_bytes(tmp_path / "a.vhd", content + vhd_maker.footer(len(content))) as image:
        assert (image.format, image.subformat, image.sector_bytes) == ("vhd", "fixed", 512)
        assert whole(image) == content
        piece = bytearray(1000)
        image.read_into(777, piece)
        assert piece == content[777:1777]
        assert list(image.allocated(100, 1 << 30)) == [(100, len(content))]
        with pytest.raises(ImageError, match="has 5120 bytes"):
            image.read_into(5119, piece)


def test_fixed_with_a_false_vhd_at_its_start_is_what_it_is(tmp_path: Path) -> None:
    false = vhd_maker.Vhd(1 << 20, blocks={0: b"lie" * 100, 3: b"lie"}).build()
    with open_bytes(tmp_path / "a.vhd", false + vhd_maker.footer(len(false))) as image:
        assert image.subformat == "fixed"
        assert whole(image) == false


def test_fixed_holes_are_not_allocated(tmp_path: Path) -> None:
    path = tmp_path / "a.vhd"
    with path.open("wb") as file:
        file.seek(4 << 20)
        file.write(b"x" * 4096)
        file.seek(16 << 20)
        file.write(vhd_maker.footer(16 << 20))
    with images.open(path) as image:
        assert list(image.allocated(0, image.size_bytes)) == [(4 << 20, (4 << 20) + 4096)]


def test_geometry_cuts_the_disk_of_virtual_pc(tmp_path: Path) -> None:
    content = os.urandom(100 * 512)
    footer = vhd_maker.footer(len(content), creator=b"vpc ", chs=(1, 4, 17))
    with open_bytes(tmp_path / "a.vhd", content + footer) as image:
        assert image.size_bytes == 68 * 512
        assert whole(image) == content[: 68 * 512]


def test_footer_of_511_bytes(tmp_path: Path) -> None:
    content = os.urandom(1024)
    with open_bytes(tmp_path / "fixed.vhd", content + vhd_maker.footer(1024)[:511]) as image:
        assert whole(image) == content
    vhd = vhd_maker.Vhd(20000 // 512 * 512, blocks={1: os.urandom(8192)})
    with open_bytes(tmp_path / "dynamic.vhd", vhd.build()[:-1]) as image:
        assert not image.end_damaged
        assert whole(image) == vhd.content()


def test_dynamic_with_an_unordered_table(tmp_path: Path) -> None:
    blocks = {n: os.urandom(8192) for n in (9, 2, 7, 0, 3)}
    vhd = vhd_maker.Vhd(12 * 8192 - 512, blocks=blocks, gap=3)
    with open_bytes(tmp_path / "a.vhd", vhd.build()) as image:
        assert image.subformat == "dynamic"
        assert whole(image) == vhd.content()
        ranges = [(0, 8192), (2 * 8192, 4 * 8192), (7 * 8192, 8 * 8192), (9 * 8192, 10 * 8192)]
        assert list(image.allocated(0, image.size_bytes)) == ranges
        assert list(image.allocated(8193, 3 * 8192 + 1)) == [(2 * 8192, 3 * 8192 + 1)]
        assert list(image.allocated(3 * 8192 + 5, 7 * 8192 + 1)) == [(3 * 8192 + 5, 4 * 8192), (7 * 8192, 7 * 8192 + 1)]
        assert list(image.allocated(4 * 8192, 7 * 8192)) == []


def test_sector_bitmaps_count_from_the_most_significant_bit(tmp_path: Path) -> None:
    vhd = vhd_maker.Vhd(8192, blocks={0: b"\x77" * 8192}, bitmaps={0: bytes([0b10010000, 0b00000001])})
    with open_bytes(tmp_path / "a.vhd", vhd.build()) as image:
        sectors = [whole(image)[n * 512] for n in range(16)]
    assert sectors == [0x77, 0, 0, 0x77, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x77]


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_any_dynamic_disk_reads_as_the_specification_says(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    block_bytes = data.draw(st.sampled_from([512, 1024, 4096, 8192, 1 << 20]))
    size = data.draw(st.integers(1, 6 * block_bytes // 512)) * 512
    count = -(-size // block_bytes)
    numbers = data.draw(st.lists(st.integers(0, count - 1), unique=True, max_size=count))
    vhd = vhd_maker.Vhd(size, block_bytes, {n: bytes([n + 1]) * block_bytes for n in numbers})
    length = max(1, block_bytes // 512 // 8)
    for n in numbers:
        if data.draw(st.booleans()):
            pattern = data.draw(st.binary(min_size=1, max_size=16))
            vhd.bitmaps[n] = (pattern * (length // len(pattern) + 1))[:length]
    expected = vhd.content()
    with open_bytes(tmp_path_factory.mktemp("vhd") / "a.vhd", vhd.build()) as image:
        assert image.size_bytes == size
        for _ in range(4):
            start = data.draw(st.integers(0, size - 1))
            stop = data.draw(st.integers(start, size))
            buffer = bytearray(b"\xa5" * (stop - start))
            image.read_into(start, buffer)
            assert buffer == expected[start:stop]
        covered = bytearray(size)
        end = -1
        for start, stop in image.allocated(0, size):
            assert end < start < stop <= size
            covered[start:stop] = expected[start:stop]
            end = stop
        assert covered == expected


class CountingCalls(SystemCalls):
    """Counts reads."""

    reads = 0

    def preadv(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        self.reads += 1
        return super().preadv(fd, buffers, offset)

    def taken(self) -> int:
        """How many since the last question."""
        reads, self.reads = self.reads, 0
        return reads


def test_one_read_per_block_and_none_for_what_is_not_there(tmp_path: Path) -> None:
    blocks = {n: os.urandom(8192) for n in (1, 0, 5)}
    vhd = vhd_maker.Vhd(64 * 8192, blocks=blocks, bitmaps={5: b"\xf0\x0f"})
    (tmp_path / "a.vhd").write_bytes(vhd.build())
    calls = CountingCalls()
    with VhdImage.open(FileSystem(calls), tmp_path / "a.vhd") as image:
        assert calls.taken() <= 4
        image.read_into(6 * 8192, bytearray(58 * 8192))
        assert calls.taken() == 0
        image.read_into(5 * 8192 + 4 * 512, bytearray(8 * 512))
        assert calls.taken() == 1  # the bitmap
        assert whole(image) == vhd.content()
        assert calls.taken() == 5
        assert whole(image) == vhd.content()
        assert calls.taken() == 3


@pytest.mark.parametrize("kept_bytes", [0, 600, 1 << 20])
def test_bitmaps_that_the_cache_let_go_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept_bytes: int
) -> None:
    blocks = {n: os.urandom(8192) for n in range(8)}
    vhd = vhd_maker.Vhd(8 * 8192, blocks=blocks, bitmaps={n: bytes([n + 1, 0x81]) for n in (0, 2, 3, 6)})
    (tmp_path / "a.vhd").write_bytes(vhd.build())
    monkeypatch.setattr(vhd_blocks, "_CACHED_BITMAP_BYTES", kept_bytes)
    with VhdImage.open(FileSystem(), tmp_path / "a.vhd") as image:
        for step in (8192, 3 * 8192, 8 * 8192, 512):
            buffer = bytearray(image.size_bytes)
            for start in range(image.size_bytes - image.size_bytes % step, -1, -step):
                image.read_into(start, memoryview(buffer)[start : start + step])
            assert bytes(buffer) == vhd.content()


def test_holes_of_the_file_inside_blocks_are_not_allocated(tmp_path: Path) -> None:
    vhd = vhd_maker.Vhd(4 << 20, 1 << 20, blocks={0: b"", 2: b"", 3: b""})
    data = bytearray(vhd.build())
    path = tmp_path / "a.vhd"
    with path.open("wb") as file:
        file.truncate(len(data))
        file.write(data[:2048])
        for at in range(2048, len(data) - 512, 512 + (1 << 20)):
            file.seek(at)
            file.write(b"\xff" * 512)
        file.seek(2048 + 512 + (1 << 20) + 512 + (1 << 19))
        file.write(b"k" * 1000)
        file.seek(len(data) - 512)
        file.write(data[-512:])
    with images.open(path) as image:
        expected = bytearray(4 << 20)
        expected[(5 << 19) : (5 << 19) + 1000] = b"k" * 1000
        assert whole(image) == expected
        runs = list(image.allocated(0, 4 << 20))
        assert sum(stop - start for start, stop in runs) < 100_000
        assert any(start <= 5 << 19 and stop >= (5 << 19) + 1000 for start, stop in runs)


def test_the_copy_at_the_start_stands_in_for_a_damaged_end(tmp_path: Path) -> None:
    vhd = vhd_maker.Vhd(40960, blocks={2: os.urandom(8192), 4: os.urandom(8192)})
    whole_file = vhd.build()
    for data in (whole_file[:-512], whole_file[:-1] + b"x", whole_file[:-512] + bytes(512), whole_file[:-100]):
        with open_bytes(tmp_path / "a.vhd", data) as image:
            assert image.end_damaged
            assert whole(image) == vhd.content()
    with open_bytes(tmp_path / "a.vhd", whole_file) as image:
        assert not image.end_damaged


def test_a_block_being_added_when_the_writer_died(tmp_path: Path) -> None:
    """The bitmap of the new block has overwritten the footer, the table does not know it yet."""
    vhd = vhd_maker.Vhd(40960, blocks={2: os.urandom(8192)})
    with open_bytes(tmp_path / "a.vhd", vhd.build()[:-512] + b"\xff" * 512 + b"half a block" * 100) as image:
        assert image.end_damaged
        assert whole(image) == vhd.content()


def test_the_end_counts_when_the_copy_at_the_start_is_damaged(tmp_path: Path) -> None:
    vhd = vhd_maker.Vhd(40960, blocks={2: os.urandom(8192)}, head=bytes(512))
    with open_bytes(tmp_path / "a.vhd", vhd.build()) as image:
        assert whole(image) == vhd.content()


def test_threads_may_read_at_once(tmp_path: Path) -> None:
    vhd = vhd_maker.Vhd(32 * 8192, blocks={n: os.urandom(8192) for n in range(0, 32, 3)})
    vhd.bitmaps = {n: os.urandom(2) for n in range(0, 32, 6)}
    expected = vhd.content()
    wrong: list[int] = []
    with open_bytes(tmp_path / "a.vhd", vhd.build()) as image:

        def read(seed: int) -> None:
            for step in range(200):
                offset = (seed * 7919 + step * 104729) % (len(expected) - 20000)
                buffer = bytearray(20000)
                image.read_into(offset, buffer)
                if buffer != expected[offset : offset + 20000]:
                    wrong.append(offset)

        threads = [threading.Thread(target=read, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
