"""A VHDX left by a crash: at every entry of its log, and with every sector of the log damaged.

The result is what the replay gives, exactly, or a clear error; nothing between.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import pytest
import vhdx_maker
from test_image_vhdx import covered, whole
from vhdx_interrupted import LOG_ID, SECTOR, Interrupted, allocate, entry, grow, present, state, with_log
from vhdx_maker import LOG_AT, MIB, Vhdx, header, linked

from replica.durable import FileSystem
from replica.errors import ImageError
from replica.images.vhdx import VhdxImage

Step = Callable[[Vhdx], None]
BELOW = b"\x11" * 4 * MIB
Make = Callable[[], tuple[Vhdx, list[Step]]]


def dynamic() -> tuple[Vhdx, list[Step]]:
    recipe = Vhdx(6 * MIB, blocks={1: b"\x01" * MIB}, states={3: 3})
    steps = [
        allocate(4, b"\x02"),
        allocate(0, b"\x03"),
        grow(9 * MIB - 4096),
        state(5, 2),
        allocate(8, b"\x04"),
        allocate(3, b"\x05"),
    ]
    return recipe, steps


def differencing() -> tuple[Vhdx, list[Step]]:
    recipe = Vhdx(4 * MIB, blocks={1: b"\x21" * MIB, 2: b"\x22" * MIB}, parent=linked("base.vhdx"))
    recipe.present = {1: {0, 5, 6}, 2: set()}
    steps = [
        present(1, set(range(100))),
        present(2, {7}),
        present(1, set()),
        state(3, 1),
        present(2, set(range(0, 2048, 3))),
        present(2, set()),
    ]
    return recipe, steps


def wide() -> tuple[Vhdx, list[Step]]:
    """Entries of 130 sectors, two of them descriptors: a bitmap, also behind the disk's end, changes in 128 places."""
    recipe = Vhdx(4 * MIB, blocks={1: b"\x21" * MIB}, parent=linked("base.vhdx"))
    recipe.present = {1: {0}}

    def fill(vhdx: Vhdx) -> None:
        vhdx.present = {1: {9}, **{block: {5} for block in range(16, 4096, 32)}}

    def clear(vhdx: Vhdx) -> None:
        vhdx.present = {1: {9}}

    return recipe, [fill, clear, fill]


def interrupted(make: Make, lag: int, first: int, sequence: int) -> Iterator[Interrupted]:
    recipe, steps = make()
    writer = Interrupted(recipe, lag=lag, first_sector=first, sequence=sequence, below=BELOW)
    for step in steps:
        writer.step(step)
        yield writer


CASES = pytest.mark.parametrize(
    ("make", "lag", "first", "sequence"),
    [
        (dynamic, 1, 0, 0),
        (dynamic, 3, 250, 2**32 - 3),
        (dynamic, 9, 3, 2**64 - 9),
        (differencing, 2, 253, 5),
        (differencing, 9, 0, 2**32 - 1),
    ],
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "base.vhdx").write_bytes(Vhdx(4 * MIB, blocks=dict.fromkeys(range(4), b"\x11" * MIB)).build())
    return tmp_path / "a.vhdx"


def reads(path: Path) -> bytes:
    """The content, read where it may not be zero."""
    with VhdxImage.open(FileSystem(), path) as image:
        content = bytearray(image.size_bytes)
        for start, stop in image.allocated(0, image.size_bytes):
            image.read_into(start, memoryview(content)[start:stop])
        return bytes(content)


@CASES
def test_at_every_entry(path: Path, make: Make, lag: int, first: int, sequence: int) -> None:
    for writer in interrupted(make, lag, first, sequence):
        for file in (bytes(writer.file), *(writer.half_applied(seed) for seed in range(3))):
            path.write_bytes(file)
            with VhdxImage.open(FileSystem(), path) as image:
                assert image.layers[0].replayed_entries == len(writer.active) <= lag
                assert image.facts()[0].log == "dirty"
                assert whole(image) == writer.content
                assert covered(image, writer.content)
            assert path.read_bytes() == file


@CASES
@pytest.mark.parametrize("kind", ["zeros", "flipped", "stale"])
def test_with_every_sector_of_the_log_damaged(
    path: Path, make: Make, lag: int, first: int, sequence: int, kind: str
) -> None:
    stale = bytes(MIB)
    for writer in interrupted(make, lag, first, sequence):
        good = bytes(writer.file)
        path.write_bytes(good)
        newest = writer.active[-1].sectors
        older = {sector for logged in writer.active[:-1] for sector in logged.sectors}
        used = sorted({(sector + shift) % 256 for sector in [*older, *newest] for shift in (-1, 0, 1)})
        with path.open("r+b") as file:
            for sector in used:
                at = LOG_AT + sector * SECTOR
                whole_sector = good[at : at + SECTOR]
                flipped = bytes([*whole_sector[:-1], whole_sector[-1] ^ 1])
                damage = {"zeros": bytes(SECTOR), "flipped": flipped, "stale": stale[at - LOG_AT :][:SECTOR]}[kind]
                file.seek(at)
                file.write(damage)
                file.flush()
                if damage == whole_sector or sector not in {*older, *newest}:
                    assert reads(path) == writer.content, (kind, sector)
                elif sector in newest and writer.previous is not None:
                    assert reads(path) == writer.previous, (kind, sector)
                else:
                    with pytest.raises(ImageError, match=r"no entry in it is whole|torn in the middle"):
                        VhdxImage.open(FileSystem(), path)
                file.seek(at)
                file.write(whole_sector)
                file.flush()
        stale = good[LOG_AT : LOG_AT + MIB]


def test_entries_of_many_sectors(path: Path) -> None:
    """130 sectors, two of them of descriptors, over the end of the log; then as many zero descriptors."""
    for writer in interrupted(wide, 1, 200, 0):
        path.write_bytes(writer.file)
        assert len(writer.active[0].updates) in (128, 129)
        with VhdxImage.open(FileSystem(), path) as image:
            assert whole(image) == writer.content


def test_a_file_that_the_log_makes_longer(path: Path) -> None:
    """The new block was never written, and reads as the zeros that the file is extended with (§2.3.3)."""
    writer = Interrupted(Vhdx(4 * MIB, blocks={1: b"a"}), lag=2)
    writer.step(allocate(3, b"\0"), extend=False)
    writer.step(state(0, 2), extend=False)
    assert len(writer.file) == 5 * MIB
    path.write_bytes(writer.file)
    with VhdxImage.open(FileSystem(), path) as image:
        assert whole(image) == writer.content
        assert list(image.allocated(0, 4 * MIB)) == [(MIB, 2 * MIB)]


def moved_table(recipe: Vhdx) -> list[tuple[int, bytes | int]]:
    """The metadata region moves behind the blocks: both region tables change, through the log as they must."""
    old = recipe.build()
    place = len(old)
    recipe.regions = ((vhdx_maker.BAT, vhdx_maker.BAT_AT, MIB, 1), (vhdx_maker.METADATA, place, MIB, 1))
    table = vhdx_maker.region_table(recipe.regions)[:SECTOR]
    first, items = old[2 * MIB : 2 * MIB + SECTOR], old[2 * MIB + 65536 : 2 * MIB + 65536 + SECTOR]
    recipe.regions = Vhdx(0).regions
    return [
        (place, MIB),
        (place, first),
        (place + 65536, items),
        (2 * MIB, MIB),
        (3 << 16, table),
        (4 << 16, table),
    ]


def test_regions_that_the_log_moves(path: Path) -> None:
    """Zeros lie under data that came later and over data that came before; the file's old metadata are gone."""
    recipe = Vhdx(3 * MIB, blocks={2: b"k" * MIB})
    updates = moved_table(recipe)
    path.write_bytes(with_log(recipe, {0: entry(1, 0, updates[:3]), 4 * SECTOR: entry(2, 0, updates[3:])}))
    with pytest.raises(ImageError, match="torn in the middle"):
        VhdxImage.open(FileSystem(), path)
    file = with_log(recipe, {0: entry(1, 0, updates[:3]), 3 * SECTOR: entry(2, 0, updates[3:])})
    path.write_bytes(file)
    with VhdxImage.open(FileSystem(), path) as image:
        assert whole(image) == recipe.content()


def refused(path: Path, file: bytes, match: str) -> None:
    path.write_bytes(file)
    with pytest.raises(ImageError, match=match) as caught:
        VhdxImage.open(FileSystem(), path)
    assert str(path) in caught.value.message
    assert caught.value.hint


BAT_SECTOR = (3 * MIB, b"\x02".ljust(SECTOR, b"\0"))
OUTSIDE = "no entry in it is whole"


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (entry(0, 0, [BAT_SECTOR]), OUTSIDE),
        (entry(1, 0, [BAT_SECTOR], log=UUID(int=3)), OUTSIDE),
        (entry(1, 0, [BAT_SECTOR], error=1), OUTSIDE),
        (entry(1, 0, [BAT_SECTOR], signature=b"Loge"), OUTSIDE),
        (entry(1, 0, [BAT_SECTOR], length=SECTOR), OUTSIDE),
        (entry(1, 0, [BAT_SECTOR], length=0), OUTSIDE),
        (entry(1, 0, [BAT_SECTOR], length=2 * MIB), OUTSIDE),
        (entry(1, 0, [BAT_SECTOR], length=5000), OUTSIDE),
        (entry(1, 0, [BAT_SECTOR], count=2), OUTSIDE),
        (entry(1, 0, [BAT_SECTOR], count=2**32 - 1), OUTSIDE),
        (entry(1, 0, [BAT_SECTOR], data_sequence=2), OUTSIDE),
        (entry(1, 0, [BAT_SECTOR], data_sequence=1 + 2**32), OUTSIDE),
        (entry(1, 512, [BAT_SECTOR]), OUTSIDE),
        (entry(1, MIB, [BAT_SECTOR]), OUTSIDE),
        (entry(1, 0, [(3 * MIB + 512, SECTOR)]), OUTSIDE),
        (entry(1, 0, [(3 * MIB, 512)]), OUTSIDE),
        (entry(1, SECTOR, [BAT_SECTOR]), "torn in the middle"),
        (entry(1, 0, [BAT_SECTOR], flushed=5 * MIB), "it was cut short: it had 5242880 bytes"),
        (entry(1, 0, [(0, SECTOR)]), "writes over its headers"),
        (entry(1, 0, [(64 << 10, b"head".ljust(SECTOR, b"\0"))]), "writes over its headers"),
        (entry(1, 0, [(188 << 10, 8192)]), "writes over its headers"),
        (entry(1, 0, [(LOG_AT + 8192, SECTOR)]), "writes over itself"),
        (entry(1, 0, [(LOG_AT - SECTOR, 8192)]), "writes over itself"),
        (entry(1, 0, [(2**63, SECTOR)]), "more than 2251799813685248 bytes"),
        (entry(1, 0, [(3 * MIB, 2**64 - 4096)]), "more than 2251799813685248 bytes"),
        (entry(1, 0, [], last=2**63), "more than 2251799813685248"),
    ],
)
def test_logs_that_cannot_be_replayed(path: Path, data: bytes, match: str) -> None:
    refused(path, with_log(Vhdx(2 * MIB), {0: data}), match)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"log_version": 1}, "log is of version 1"),
        ({"log_bytes": 0}, "cannot be where its header says"),
        ({"log_bytes": 4096}, "not on whole MiB"),
        ({"log_at": 0}, "lie on the headers"),
        ({"log_at": 2**63}, "not inside the file"),
        ({"log_at": 2**64 - MIB}, "not inside the file"),
        ({"log_bytes": 2**32 - MIB}, "not inside the file"),
        ({"log_at": 2 * MIB}, OUTSIDE),
    ],
)
def test_logs_in_impossible_places(path: Path, fields: dict[str, int], match: str) -> None:
    refused(path, with_log(Vhdx(2 * MIB), {0: entry(1, 0, [BAT_SECTOR])}, **fields), match)


def test_two_newest_entries(path: Path) -> None:
    entries = {0: entry(1, 0, [BAT_SECTOR]), 4 * SECTOR: entry(1, 4 * SECTOR, [BAT_SECTOR])}
    refused(path, with_log(Vhdx(2 * MIB), entries), "two newest entries")


def test_entries_of_two_sequences_in_a_row(path: Path) -> None:
    """Whole, one behind the other, and yet not written as one sequence: a number is missing."""
    entries = {0: entry(1, 0, [BAT_SECTOR]), 2 * SECTOR: entry(3, 0, [BAT_SECTOR])}
    refused(path, with_log(Vhdx(2 * MIB), entries), "torn in the middle")


def test_a_table_that_is_in_the_log_only(path: Path) -> None:
    """Its place in the file is a hole, which would read as no blocks at all."""
    recipe = Vhdx(3 * MIB, blocks={1: b"a" * MIB})
    table = recipe.build()[3 * MIB : 3 * MIB + SECTOR]
    file = with_log(recipe, {0: entry(1, 0, [(3 * MIB, table)])})
    with path.open("wb") as out:
        out.write(file[: 3 * MIB])
        out.seek(4 * MIB)
        out.write(file[4 * MIB :])
    with VhdxImage.open(FileSystem(), path) as image:
        assert whole(image) == recipe.content()
        assert list(image.allocated(0, 3 * MIB)) == [(MIB, 2 * MIB)]


def test_old_entries_do_not_count(path: Path) -> None:
    """Of another session, or from before the tail; and an entry without updates is one."""
    zeroed = (3 * MIB, SECTOR)
    entries = {
        0: entry(4, 0, [zeroed]),
        SECTOR: entry(5, SECTOR, [BAT_SECTOR]),
        3 * SECTOR: entry(6, SECTOR, []),
        9 * SECTOR: entry(99, 9 * SECTOR, [zeroed], log=UUID(int=1)),
    }
    recipe = Vhdx(2 * MIB, blocks={0: b"a", 1: b"b" * MIB})
    path.write_bytes(with_log(recipe, entries))
    with VhdxImage.open(FileSystem(), path) as image:
        assert image.layers[0].replayed_entries == 2
        assert whole(image) == bytes(2 * MIB)


def test_only_the_current_header_knows_of_the_log(path: Path) -> None:
    recipe = Vhdx(2 * MIB, blocks={0: b"a" * MIB})
    recipe.headers = (header(9), header(8, log=LOG_ID))
    path.write_bytes(recipe.build())
    with VhdxImage.open(FileSystem(), path) as image:
        assert whole(image) == recipe.content()


def test_entries_on_top_of_each_other_cost_two_passes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sector claims to begin an entry as long as the log: squared work, if it were believed."""
    head = entry(1, 0, [], length=MIB)
    file = with_log(Vhdx(2 * MIB), dict.fromkeys(range(0, MIB, SECTOR), head))
    read = 0
    real = FileSystem.open

    def counting(self: FileSystem, path: Path, *, write: bool = False) -> object:
        opened = real(self, path, write=write)
        inner = opened.read_into

        def read_into(offset: int, buffer: object) -> int:
            nonlocal read
            read += memoryview(buffer).nbytes  # type: ignore[arg-type]
            return inner(offset, buffer)  # type: ignore[arg-type]

        opened.read_into = read_into  # type: ignore[method-assign, assignment]
        return opened

    monkeypatch.setattr(FileSystem, "open", counting)
    refused(path, file, "entries of its log overlap")
    assert read < 5 * MIB
