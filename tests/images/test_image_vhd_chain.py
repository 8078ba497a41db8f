"""Differencing VHDs: chains of any depth, and parents that are found, refused or never looked at."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vhd_maker import DIFFERENCING, Vhd, footer

from replica import images
from replica.durable import File, FileSystem
from replica.errors import ImageError
from replica.images.chain import MAX_DEPTH, candidates, permitted_folders
from replica.images.image import Image
from replica.images.vhd import VhdImage

SIZE = 6 * 8192
BASE = Vhd(SIZE, blocks={n: bytes([n + 1]) * 8192 for n in (0, 1, 3)}, unique_id=b"b" * 16)
CHILD = Vhd(
    SIZE,
    blocks={1: b"c" * 8192, 2: b"d" * 8192},
    bitmaps={1: b"\x0f\xf0"},
    kind=DIFFERENCING,
    unique_id=b"c" * 16,
    parent_id=b"b" * 16,
    parent_name="base.vhd".encode("utf-16-be"),
)


def write(path: Path, vhd: Vhd) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(vhd.build())
    return path


def whole(image: Image) -> bytes:
    buffer = bytearray(b"\xa5" * image.size_bytes)
    image.read_into(0, buffer)
    return bytes(buffer)


def located(*locators: tuple[str, str], name: str = "") -> Vhd:
    encoded = tuple((code.encode(), path.encode("utf-8" if code == "MacX" else "utf-16-le")) for code, path in locators)
    return replace(CHILD, locators=encoded, parent_name=name.encode("utf-16-be"))


def assert_read(path: Path, *parents: Path) -> None:
    with images.open(path, parents=parents) as image:
        assert whole(image) == CHILD.content(BASE.content())
        assert [file.path.name for file in image.files] == [path.name, "base.vhd"]


def refused(path: Path, match: str, *parents: Path) -> None:
    with pytest.raises(ImageError, match=match) as caught:
        images.open(path, parents=parents)
    assert caught.value.hint


@pytest.mark.parametrize(
    "child",
    [
        located(name="base.vhd"),
        located(name="C:\\VMs\\web 1\\base.vhd"),
        located(("W2ru", ".\\base.vhd")),
        located(("W2ku", "C:\\VMs\\base.vhd")),
        located(("W2ku", "base.vhd")),
        located(("MacX", "file://./base.vhd")),
        located(("Wi2r", "?"), ("W2ku", "D:\\gone.vhd"), ("W2ru", "gone\\too.vhd"), name="base.vhd"),
    ],
)
def test_a_parent_beside_the_image(tmp_path: Path, child: Vhd) -> None:
    write(tmp_path / "base.vhd", BASE)
    assert_read(write(tmp_path / "child.avhd", child))


def test_a_parent_below_the_image(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b" / "base.vhd", BASE)
    assert_read(write(tmp_path / "child.vhd", located(("W2ru", "a\\b\\base.vhd"))))


def test_a_relative_path_counts_from_the_child(tmp_path: Path) -> None:
    """Three files in three folders, each below the image's; the middle one names its own parent from its own place."""
    write(tmp_path / "old" / "older" / "base.vhd", BASE)
    middle = replace(located(("W2ru", "older\\base.vhd")), unique_id=b"m" * 16)
    write(tmp_path / "old" / "middle.vhd", middle)
    top = replace(located(("W2ru", "old\\middle.vhd")), parent_id=b"m" * 16, blocks={})
    with images.open(write(tmp_path / "top.vhd", top)) as image:
        assert whole(image) == CHILD.content(BASE.content())


@pytest.mark.parametrize("name", ["..\\bases\\base.vhd", "E:\\bases\\base.vhd", "/bases/base.vhd"])
def test_parents_elsewhere_need_permission(tmp_path: Path, name: str) -> None:
    write(tmp_path / "bases" / "base.vhd", BASE)
    child = write(tmp_path / "web-1" / "child.vhd", located(("W2ru", name)))
    assert_read(child, tmp_path / "bases")
    refused(child, "differencing image whose parent .* is not in .*web-1; .* `parents`")


def test_the_child_over_a_link_finds_its_parent_at_home(tmp_path: Path) -> None:
    write(tmp_path / "vm" / "base.vhd", BASE)
    write(tmp_path / "vm" / "child.vhd", CHILD)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "os.vhd").symlink_to(tmp_path / "vm" / "child.vhd")
    assert_read(tmp_path / "links" / "os.vhd")


class Watched(FileSystem):
    """Notes every file that is opened or looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.touched: set[Path] = set()

    def open(self, path: Path, *, write: bool = False) -> File:
        self.touched.add(path)
        return super().open(path, write=write)

    def stat(self, path: Path) -> os.stat_result:
        self.touched.add(path)
        return super().stat(path)

    def exists(self, path: Path) -> bool:
        self.touched.add(path)
        return super().exists(path)


@pytest.mark.parametrize(
    "name", ["..\\secret.vhd", "a\\..\\..\\secret.vhd", "{}/secret.vhd", "link.vhd", "folder\\secret.vhd", "."]
)
def test_nothing_outside_is_touched(tmp_path: Path, name: str) -> None:
    secret = write(tmp_path / "secret.vhd", BASE)
    child = write(tmp_path / "web-1" / "child.vhd", located(("W2ru", name.format(tmp_path))))
    (child.parent / "link.vhd").symlink_to(secret)
    (child.parent / "folder").symlink_to(tmp_path)
    fs = Watched()
    with pytest.raises(ImageError, match="is not in"):
        images.open(child, fs=fs)
    assert fs.touched <= {child, *(child.parent / place for place in ("secret.vhd", "a/secret.vhd"))}


def test_a_named_pipe_is_no_parent(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "base.vhd")
    refused(write(tmp_path / "child.vhd", CHILD), "is not in")


def test_another_disk_under_the_name(tmp_path: Path) -> None:
    write(tmp_path / "base.vhd", replace(BASE, unique_id=b"x" * 16))
    child = write(tmp_path / "child.vhd", CHILD)
    refused(child, "parent .base.vhd. cannot be used: .*base.vhd has the id 78787878-.*, not 62626262-")
    write(tmp_path / "bases" / "base.vhd", BASE)
    assert_read(child, tmp_path / "bases")


def test_a_parent_that_is_damaged_or_no_vhd(tmp_path: Path) -> None:
    child = write(tmp_path / "child.vhd", CHILD)
    (tmp_path / "base.vhd").write_bytes(b"\x55\xaa" * 4096)
    refused(child, "cannot be used: image .*base.vhd is no VHD")
    write(tmp_path / "base.vhd", replace(BASE, entries=1))
    refused(child, "base.vhd is damaged: its table has 1 entries")


def test_loops(tmp_path: Path) -> None:
    itself = replace(CHILD, parent_id=CHILD.unique_id, parent_name="child.vhd".encode("utf-16-be"))
    refused(write(tmp_path / "child.vhd", itself), "child.vhd is part of the chain already")
    write(tmp_path / "one.vhd", replace(itself, parent_name="two.vhd".encode("utf-16-be")))
    os.link(tmp_path / "one.vhd", tmp_path / "hard.vhd")
    write(tmp_path / "two.vhd", replace(itself, parent_name="hard.vhd".encode("utf-16-be")))
    refused(tmp_path / "one.vhd", "hard.vhd is part of the chain already")


def test_the_deepest_chain(tmp_path: Path) -> None:
    vhd = Vhd(512, 512, blocks={}, unique_id=(1).to_bytes(16, "big"))
    for n in range(1, MAX_DEPTH + 1):
        write(tmp_path / f"{n}.vhd", vhd)
        vhd = replace(
            vhd,
            kind=DIFFERENCING,
            unique_id=(n + 1).to_bytes(16, "big"),
            parent_id=n.to_bytes(16, "big"),
            parent_name=f"{n}.vhd".encode("utf-16-be"),
        )
    with images.open(tmp_path / f"{MAX_DEPTH}.vhd") as image:
        assert whole(image) == bytes(512)
        assert len(image.files) == MAX_DEPTH
    before = len(list(Path("/proc/self/fd").iterdir()))
    refused(write(tmp_path / "more.vhd", vhd), f"more than {MAX_DEPTH - 1} parents")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("place", [(1 << 40, 10), (2**64 - 5, 10), (512, 1 << 17), (512, 2**32 - 1)])
def test_locators_that_lead_out_of_the_file(tmp_path: Path, place: tuple[int, int]) -> None:
    write(tmp_path / "base.vhd", BASE)
    child = replace(located(("W2ru", "base.vhd")), locator_place=place)
    refused(write(tmp_path / "child.vhd", child), "a locator of its parent .* is not inside the file")


def test_names_of_any_bytes(tmp_path: Path) -> None:
    for name in (b"\xff" * 512, b"\xd8\x00" * 256, b"\0/" * 256, b"\0\\" * 256):
        child = replace(CHILD, parent_name=name, locators=((b"W2ku", b"\xff" * 511), (b"MacX", b"file://%00%ff")))
        refused(write(tmp_path / "child.vhd", child), "is not in")


@pytest.mark.parametrize("size", [SIZE - 3 * 8192 - 512, SIZE + 8192])
def test_a_parent_of_another_size(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "base.vhd").write_bytes(content + footer(size, unique_id=b"b" * 16))
    with images.open(write(tmp_path / "child.vhd", CHILD)) as image:
        assert whole(image) == CHILD.content(content)
        ends = [stop for _, stop in image.allocated(0, SIZE)]
        assert max(ends) == min(SIZE, max(size, 3 * 8192))


def test_a_small_parent_hides_what_its_own_parent_has_behind_its_end(tmp_path: Path) -> None:
    write(tmp_path / "base.vhd", BASE)
    middle = replace(CHILD, size=8192, blocks={}, unique_id=b"m" * 16)
    write(tmp_path / "middle.vhd", middle)
    top = replace(middle, size=SIZE, parent_id=b"m" * 16, parent_name="middle.vhd".encode("utf-16-be"))
    with images.open(write(tmp_path / "top.vhd", top)) as image:
        assert whole(image) == BASE.content()[:8192].ljust(SIZE, b"\0")
        assert list(image.allocated(0, SIZE)) == [(0, 8192)]


def test_relative_paths_come_first(tmp_path: Path) -> None:
    """The absolute one may still lead to where the chain was copied from."""
    write(tmp_path / "old" / "base.vhd", replace(BASE, blocks={}))
    write(tmp_path / "vm" / "base.vhd", BASE)
    child = located(("W2ku", str(tmp_path / "old" / "base.vhd")), ("W2ru", ".\\base.vhd"))
    assert_read(write(tmp_path / "vm" / "child.vhd", child), tmp_path / "old")


@pytest.mark.parametrize(
    "name", ["/etc/shadow", "..\\..\\a", "a\\..\\..\\b", "\\\\host\\share\\c", ".", "", "..", "C:"]
)
def test_candidates_are_inside_whatever_the_name(tmp_path: Path, name: str) -> None:
    permitted = permitted_folders(tmp_path / "vm" / "child.vhd", [tmp_path / "bases"])
    found = list(candidates(tmp_path / "vm" / "child.vhd", [name, name], permitted))
    assert len(found) == len(set(found))
    for place in found:
        assert place.parent.is_relative_to(tmp_path / "vm") or place.parent.is_relative_to(tmp_path / "bases")


def test_time_stamps_are_told_and_not_refused(tmp_path: Path) -> None:
    base = write(tmp_path / "base.vhd", BASE)
    seconds = int(base.stat().st_mtime) - 946684800
    for stamp, remarks in [(0, 0), (seconds, 0), (1234, 0), (seconds - 5, 1)]:
        path = write(tmp_path / "child.vhd", replace(CHILD, parent_stamp=stamp))
        with VhdImage.open(FileSystem(), path) as image:
            assert len(image.layers[0].remarks(image.layers[1])) == remarks


def test_an_empty_child_costs_its_parent_nothing(tmp_path: Path) -> None:
    write(tmp_path / "base.vhd", BASE)
    with images.open(write(tmp_path / "child.vhd", replace(CHILD, blocks={}))) as image:
        assert list(image.allocated(0, SIZE)) == [(0, 2 * 8192), (3 * 8192, 4 * 8192)]
        assert whole(image) == BASE.content()


@st.composite
def layers(draw: st.DrawFn) -> list[Vhd]:
    """A base and up to five differencing disks over it, of sizes and block sizes of their own."""
    chain = []
    for depth in range(draw(st.integers(1, 6))):
        block_bytes = draw(st.sampled_from([512, 1024, 4096, 8192, 65536]))
        size = draw(st.integers(1, 40)) * 512
        count = -(-size // block_bytes)
        numbers = draw(st.lists(st.integers(0, count - 1), unique=True, max_size=count))
        vhd = Vhd(size, block_bytes, {n: bytes([depth * 40 + n + 1 & 255]) * block_bytes for n in numbers})
        for n in numbers:
            if draw(st.booleans()):
                vhd.bitmaps[n] = draw(st.binary(min_size=max(1, block_bytes // 4096), max_size=32)).ljust(
                    vhd.bitmap_bytes, b"\0"
                )[: vhd.bitmap_bytes]
        vhd.unique_id = bytes([depth]) * 16
        if depth:
            vhd.kind, vhd.parent_id = DIFFERENCING, bytes([depth - 1]) * 16
            vhd.parent_name = f"{depth - 1}.vhd".encode("utf-16-be")
        chain.append(vhd)
    return chain


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chain=layers(), data=st.data())
def test_any_chain_reads_as_the_specification_says(tmp_path: Path, chain: list[Vhd], data: st.DataObject) -> None:
    expected = b""
    for depth, vhd in enumerate(chain):
        write(tmp_path / f"{depth}.vhd", vhd)
        expected = vhd.content(expected)
    with images.open(tmp_path / f"{len(chain) - 1}.vhd") as image:
        assert whole(image) == expected
        start = data.draw(st.integers(0, len(expected) - 1))
        stop = data.draw(st.integers(start, len(expected)))
        buffer = bytearray(b"\xa5" * (stop - start))
        image.read_into(start, buffer)
        assert buffer == expected[start:stop]
        covered, end = bytearray(len(expected)), -1
        for first, last in image.allocated(0, len(expected)):
            assert end < first < last <= len(expected)
            covered[first:last] = expected[first:last]
            end = last
        assert covered == expected


def test_a_sector_of_one_layer_and_the_next_of_another(tmp_path: Path) -> None:
    """Every second sector is the child's, every fourth its parent's: read in one piece, and in small ones."""
    base = Vhd(1 << 20, 1 << 20, {0: os.urandom(1 << 20)}, unique_id=b"b" * 16)
    middle = replace(CHILD, size=1 << 20, block_bytes=1 << 20, unique_id=b"m" * 16)
    middle.blocks, middle.bitmaps = {0: os.urandom(1 << 20)}, {0: b"\x11" * 256}
    top = replace(middle, unique_id=b"t" * 16, parent_id=b"m" * 16, parent_name="middle.vhd".encode("utf-16-be"))
    top.blocks, top.bitmaps = {0: os.urandom(1 << 20)}, {0: b"\xaa" * 256}
    for name, vhd in (("base", base), ("middle", middle)):
        write(tmp_path / f"{name}.vhd", vhd)
    expected = top.content(middle.content(base.content()))
    with images.open(write(tmp_path / "top.vhd", top)) as image:
        assert whole(image) == expected
        for offset in (0, 511, 512, 777, 5 * 512, 1 << 19):
            buffer = bytearray(1500)
            image.read_into(offset, buffer)
            assert buffer == expected[offset : offset + 1500]


def test_hostile_bitmaps_in_a_chain_stay_bounded(tmp_path: Path) -> None:
    """Eight layers of alternating sectors cost what is read, not layers times sectors of it."""
    size = 4 << 20
    maps = [bytes((0x80 >> (n % 8)) & 255 for _ in range(size // 4096)) for n in range(8)]
    for n in range(8):
        vhd = Vhd(size, size, {0: bytes([n + 1]) * size}, {0: maps[n]}, unique_id=bytes([n]) * 16)
        if n:
            vhd.kind, vhd.parent_id = DIFFERENCING, bytes([n - 1]) * 16
            vhd.parent_name = f"{n - 1}.vhd".encode("utf-16-be")
        write(tmp_path / f"{n}.vhd", vhd)
    started = os.times().elapsed
    with images.open(tmp_path / "7.vhd") as image:
        assert whole(image) == b"".join(bytes([n + 1]) * 512 for n in range(8)) * (size // 4096)
    assert os.times().elapsed - started < 5
