"""VHDX between this project, qemu (writer, reader, and player of logs) and dissect.hypervisor (a second reader)."""

import hashlib
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest
from dissect.hypervisor.disk.vhdx import VHDX
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from replica import images
from replica.durable import FileSystem
from replica.images import ParentLink
from replica.images.image import Image
from replica.images.vhdx import VhdxImage
from replica.images.vhdx_write import VhdxWriter

sys.path.insert(0, str(Path(__file__).parents[1] / "images"))
from vhdx_interrupted import Interrupted, allocate, grow, state
from vhdx_maker import MIB, Vhdx

pytestmark = pytest.mark.skipif(
    not (shutil.which("qemu-img") and shutil.which("qemu-io")), reason="qemu-utils is not installed"
)

FS = FileSystem()
ID = UUID(int=0xD15C)
WINDOW = 3 << 20
SLOW = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def run(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def qemu_io(path: Path, *commands: str) -> None:
    arguments = [word for command in commands for word in ("-c", command)]
    assert "fail" not in run("qemu-io", "-f", "vhdx", *arguments, path).lower()


def windows(image: Image, *, only_allocated: bool = False) -> Iterator[bytes]:
    for offset in range(0, image.size_bytes, WINDOW):
        window = bytearray(min(WINDOW, image.size_bytes - offset))
        stop = offset + len(window)
        for low, high in image.allocated(offset, stop) if only_allocated else [(offset, stop)]:
            image.read_into(low, memoryview(window)[low - offset : high - offset])
        yield bytes(window)


def digest(pieces: Iterator[bytes]) -> str:
    found = hashlib.sha256()
    for piece in pieces:
        found.update(piece)
    return found.hexdigest()


def digest_by_qemu(path: Path) -> tuple[int, str]:
    raw = path.with_suffix(".by-qemu")
    run("qemu-img", "convert", "-f", "vhdx", "-O", "raw", path, raw)
    with raw.open("rb") as file:
        found = (raw.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
    raw.unlink()
    return found


def by_dissect(path: Path) -> bytes:
    """Read block by block: from within a partial block its `read` gives other bytes, or none."""
    layer = other = VHDX(path)
    step, count = other.block_size // other.sector_size, other.size // other.sector_size
    content = b"".join(other.read_sectors(first, min(step, count - first)) for first in range(0, count, step))
    while layer is not None:
        layer.fh.close()
        layer = layer.parent
    return content


def assert_read_as_by_qemu(path: Path) -> None:
    with images.open(path) as image:
        found = digest(windows(image))
        assert (image.size_bytes, found) == digest_by_qemu(path)
        assert digest(windows(image, only_allocated=True)) == found


def create(path: Path, size: int, **options: object) -> Path:
    words = ",".join(f"{key}={value}" for key, value in options.items())
    run("qemu-img", "create", "-q", "-f", "vhdx", "-o", words, path, size)
    return path


def scattered(size: int, seed: int) -> list[str]:
    """Writes, zeros and discards of qemu-io: at random, at the edges of blocks, at the disk's start and end."""
    some = random.Random(seed)
    commands = []
    for _ in range(8):
        start = some.randrange(size // 512) * 512
        if some.random() < 0.3:
            start = min(start // MIB * MIB + MIB - 512, size - 512)
        length = min(some.choice([512, 4096, 65536, MIB + 512, 3 * MIB]), size - start)
        kind = some.choice([f"write -P {some.randrange(1, 255)}"] * 3 + ["write -z", "discard"])
        commands.append(f"{kind} {start} {length}")
    return [*commands, f"write -P 9 {size - 512} 512", "write -P 8 0 512"]


@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
@pytest.mark.parametrize("block_size", [0, MIB, 2 * MIB, 16 * MIB, 256 * MIB])
@pytest.mark.parametrize("size", [512, MIB, 5 * MIB + 512, 33 * MIB - 512])
def test_what_qemu_made(tmp_path: Path, subformat: str, block_size: int, size: int) -> None:
    for number, options in enumerate(({}, {"log_size": 3 * MIB}, {"block_state_zero": "off"})):
        path = create(tmp_path / f"{number}.vhdx", size, subformat=subformat, block_size=block_size, **options)
        assert_read_as_by_qemu(path)
        qemu_io(path, *scattered(size, number + size))
        assert_read_as_by_qemu(path)
        with images.open(path) as image:
            assert image.facts()[0].subformat == subformat
            assert image.facts()[0].remarks == ()


def test_what_qemu_made_behind_the_first_chunk(tmp_path: Path) -> None:
    path, raw = create(tmp_path / "a.vhdx", (4 << 30) + 5 * MIB, block_size=MIB), tmp_path / "a.raw"
    qemu_io(path, f"write -P 1 {(4 << 30) - 4608} 3M", f"write -P 2 {4 << 30} 512", "write -P 3 2G 1M")
    run("qemu-img", "convert", "-f", "vhdx", "-O", "raw", path, raw)
    with images.open(path) as image, images.open(raw) as plain:
        for one in (image, plain):
            for start, stop in one.allocated(0, image.size_bytes):
                pair = bytearray(stop - start), bytearray(stop - start)
                image.read_into(start, pair[0])
                plain.read_into(start, pair[1])
                assert pair[0] == pair[1]


def test_qemu_refuses_what_is_not_replayed_and_we_do_not(tmp_path: Path) -> None:
    """The same crash, replayed by qemu into the file and by us in memory, gives the same disk.

    The log is not full: of one that goes over its end, qemu replays only what lies at its start.
    """
    recipe = Vhdx(6 * MIB, blocks={1: b"\x01" * MIB, 2: b"\x07" * MIB}, states={3: 3})
    steps = [allocate(4, b"\x02"), grow(9 * MIB - 4096), state(5, 2), allocate(0, b"\x03"), allocate(8, b"\x04")]
    writer = Interrupted(recipe, lag=3, first_sector=100, sequence=2**32 - 3)
    for number, step in enumerate(steps):
        writer.step(step)
        for seed in range(2):
            path = tmp_path / f"{number}-{seed}.vhdx"
            path.write_bytes(writer.half_applied(seed))
            with images.open(path) as image:
                assert image.facts()[0].log == "dirty"
                ours = (image.size_bytes, digest(windows(image)))
            refused = subprocess.run(["qemu-img", "convert", "-O", "raw", path, tmp_path / "x"], capture_output=True)
            assert b"log that needs to be replayed" in refused.stderr
            run("qemu-img", "check", "-f", "vhdx", "-r", "all", path)
            assert digest_by_qemu(path) == ours
            with images.open(path) as image:
                assert image.facts()[0].log == "clean"
                assert (image.size_bytes, digest(windows(image))) == ours


@settings(max_examples=20, **SLOW)  # type: ignore[arg-type]
@given(
    data=st.data(),
    block_size=st.sampled_from([MIB, 4 * MIB]),
    size=st.integers(1, 12 * 2048).map(lambda n: n * 512),
    subformat=st.sampled_from(["dynamic", "fixed"]),
)
def test_anything_qemu_io_writes(
    tmp_path: Path, data: st.DataObject, block_size: int, size: int, subformat: str
) -> None:
    path = tmp_path / "a.vhdx"
    path.unlink(missing_ok=True)
    create(path, size, subformat=subformat, block_size=block_size)
    qemu_io(path, *scattered(size, data.draw(st.integers(0, 2**32))))
    assert_read_as_by_qemu(path)


def fill(writer: VhdxWriter, model: bytearray, some: random.Random, unit: int) -> None:
    """Random writes and zeros through the writer, and the same into the model."""
    for _ in range(some.randrange(9)):
        start = some.randrange(len(model) // unit + 1) * unit
        stop = min(len(model), (start + some.choice([unit, 8192, MIB, 3 * MIB]) + unit - 1) // unit * unit)
        if start >= stop:
            continue
        if some.random() < 0.3:
            writer.zero(start, stop - start)
            model[start:stop] = bytes(stop - start)
        else:
            data = some.randbytes(512) * ((stop - start) // 512 + 1)
            writer.write(start, data[: stop - start])
            model[start:stop] = data[: stop - start]


def assert_accepted(path: Path, content: bytes) -> None:
    """qemu and dissect see exactly this content, padded to whole sectors, and complain of nothing."""
    plain = path.with_suffix(".plain")
    plain.write_bytes(content.ljust(-(-len(content) // 512) * 512, b"\0"))
    assert "No errors" in run("qemu-img", "check", "-f", "vhdx", path)
    run("qemu-img", "compare", "-f", "vhdx", "-F", "raw", path, plain)
    assert f'"virtual-size": {plain.stat().st_size}' in run("qemu-img", "info", "--output=json", "-f", "vhdx", path)
    assert by_dissect(path) == plain.read_bytes()


@settings(max_examples=30, **SLOW)  # type: ignore[arg-type]
@given(
    seed=st.integers(0, 2**32),
    size=st.one_of(st.integers(1, 12 * MIB), st.sampled_from([1, 511, 512, MIB, 4 * MIB + 1])),
    block_bytes=st.sampled_from([None, MIB, 4 * MIB]),
    fixed=st.booleans(),
)
def test_anything_we_write(tmp_path: Path, seed: int, size: int, block_bytes: int | None, fixed: bool) -> None:
    path = tmp_path / "a.vhdx"
    path.unlink(missing_ok=True)
    model = bytearray(size)
    with VhdxWriter.create(FS, path, size, ID, fixed=fixed, block_bytes=block_bytes) as writer:
        fill(writer, model, random.Random(seed), 1)
        writer.sync()
    assert_accepted(path, bytes(model))
    with images.open(path) as image:
        assert image.facts()[0].subformat == ("fixed" if fixed else "dynamic")
        assert digest(windows(image)) == digest(iter([bytes(model).ljust(image.size_bytes, b"\0")]))
    qemu_io(path, *scattered(-(-size // 512) * 512, seed))
    assert_read_as_by_qemu(path)


@settings(max_examples=12, **SLOW)  # type: ignore[arg-type]
@given(
    seed=st.integers(0, 2**32),
    sector=st.sampled_from([512, 4096]),
    blocks=st.sampled_from([(MIB,), (2 * MIB,), (MIB, 2 * MIB)]),
)
def test_chains_of_five_that_we_write(tmp_path: Path, seed: int, sector: int, blocks: tuple[int, ...]) -> None:
    """Against a naive model. dissect reads those too whose blocks all have one size: others it takes for them."""
    some = random.Random(seed)
    size = some.randrange(1, 9 * MIB // sector) * sector
    model, parent = bytearray(size), None
    for level in range(5):
        path = tmp_path / f"{level}.vhdx"
        path.unlink(missing_ok=True)
        block_bytes = some.choice(blocks)
        with VhdxWriter.create(
            FS, path, size, ID, block_bytes=block_bytes, sector_bytes=sector, parent=parent
        ) as writer:
            fill(writer, model, some, 8 * sector)
            writer.sync()
        parent = ParentLink(path, writer.data_write_id)
    with images.open(path) as image:
        assert [file.path.name for file in image.files] == [f"{n}.vhdx" for n in (4, 3, 2, 1, 0)]
        assert digest(windows(image)) == digest(windows(image, only_allocated=True)) == digest(iter([bytes(model)]))
        parts = bytearray(min(size, 3 * 512 + 1))
        start = some.randrange(size - len(parts) + 1)
        image.read_into(start, parts)
        assert parts == model[start : start + len(parts)]
    assert len(blocks) > 1 or by_dissect(path) == model


def test_a_chain_with_single_sectors(tmp_path: Path) -> None:
    """Every third sector of a block is the child's, then the rest, then all: partial, and then full."""
    base, child = tmp_path / "base.vhdx", tmp_path / "child.vhdx"
    content = random.Random(1).randbytes(3 * MIB)
    with VhdxWriter.create(FS, base, 3 * MIB, ID, block_bytes=MIB) as writer:
        writer.write(0, content)
        writer.sync()
    link = ParentLink(base, writer.data_write_id)
    model = bytearray(content)
    with VhdxWriter.create(FS, child, 3 * MIB, ID, block_bytes=MIB, parent=link) as writer:
        for step, first in ((1, 2048), (3, 0)):
            for sector in range(first, first + 2048, step):
                writer.write(sector * 512, b"\x44" * 512)
                model[sector * 512 : sector * 512 + 512] = b"\x44" * 512
        writer.zero(2 * MIB, MIB)
        model[2 * MIB :] = bytes(MIB)
        with pytest.raises(ValueError, match="no whole sectors"):
            writer.write(100, b"x" * 512)
        writer.sync()
    with VhdxImage.open(FS, child) as image:
        assert b"".join(windows(image)) == model
        facts = image.facts()
        assert facts[0].allocated_bytes == 2 * MIB
        assert facts[0].subformat == "differencing"
        outline = image.layers[0].outline(0, 3 * MIB)
        assert outline["whole"].tolist() == [False, True, True]


@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
def test_converting_there_and_back(tmp_path: Path, subformat: str) -> None:
    """Thin: holes stay holes; the temporary file is gone."""
    raw, path, back = tmp_path / "a.raw", tmp_path / "a.vhdx", tmp_path / "back.raw"
    with raw.open("wb") as file:
        file.seek(40 * MIB)
        file.write(random.Random(2).randbytes(3 * MIB))
        file.truncate(100 * MIB)
    with images.open(raw) as source:
        images.convert(source, path, "vhdx", subformat=subformat)
    with images.open(path) as source:
        images.convert(source, back, "raw")
    assert back.read_bytes() == raw.read_bytes()
    assert path.stat().st_blocks * 512 < 6 * MIB
    assert back.stat().st_blocks * 512 < 6 * MIB
    assert_accepted(path, raw.read_bytes())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.plain", "a.raw", "a.vhdx", "back.raw"]


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (0, {}),
        (-1, {}),
        ((64 << 40) + 1, {}),
        (MIB, {"sector_bytes": 1024}),
        (MIB, {"block_bytes": MIB // 2}),
        (MIB, {"block_bytes": 512 * MIB}),
        (MIB, {"block_bytes": 3 * MIB}),
        (MIB, {"fixed": True, "parent": ParentLink(Path("a"), ID)}),
    ],
)
def test_what_no_vhdx_can_be(tmp_path: Path, size: int, options: dict[str, object]) -> None:
    with pytest.raises(images.formats.ImageError):
        VhdxWriter.create(FS, tmp_path / "a.vhdx", size, ID, **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_the_largest_disk_can_be_written(tmp_path: Path) -> None:
    path, size = tmp_path / "a.vhdx", 64 << 40
    with VhdxWriter.create(FS, path, size, ID) as writer:
        writer.write(size - 4096, b"z" * 4096)
        writer.sync()
    assert path.stat().st_blocks * 512 < 8 * MIB
    assert "No errors" in run("qemu-img", "check", "-f", "vhdx", path)
    with images.open(path) as image:
        assert list(image.allocated(0, size)) == [(size - 4096, size)]
