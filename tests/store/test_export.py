"""Points that leave: as single images of every format, and as chains; read by qemu, by dissect and by this project."""

import os
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from dissect.hypervisor.disk.qcow2 import QCow2
from dissect.hypervisor.disk.vhd import VHD
from dissect.hypervisor.disk.vhdx import VHDX
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from replica import images
from replica.durable import File, FileSystem
from replica.errors import DamageError, ImageError, PointGoneError, StorageError, TargetExistsError
from replica.images.exporting import SUBFORMATS, ExportFormat
from replica.store import ReplicaReader, ReplicaStore, export_points, restore_point
from tests.store.small_primary import SmallPrimary

MIB = 1 << 20
SIZES = {"os": 9 * MIB + 512, "data": 5 * MIB}
KINDS = [(name, kind) for name, kinds in SUBFORMATS.items() for kind in kinds]
CHAINS = [(name, kind) for name, kind in KINDS if name != "raw"]
QEMU = {"vhd": "vpc"}

needs_qemu = pytest.mark.skipif(
    subprocess.run(["sh", "-c", "command -v qemu-img"], capture_output=True).returncode != 0, reason="no qemu-utils"
)


class Site:
    """A replica whose points are known byte by byte: `primary.copies`."""

    def __init__(self, fs: FileSystem, root: Path, sizes: dict[str, int] = SIZES, seed: int = 7) -> None:
        self.primary = SmallPrimary(sizes, seed)
        self.store: ReplicaStore = self.primary.enrol(fs, root)
        self.reader = ReplicaReader(fs, self.store.directory)

    def sync(self, *, full: int = 0) -> None:
        for data in self.primary.content.values():
            data[: full or 0] = self.primary.random.randbytes(full)
        self.primary.scribble(count=6)
        self.primary.sync(self.store)

    def content(self, point: int, disk: str) -> bytes:
        return self.primary.copies[point][disk]


@pytest.fixture
def site(fs: FileSystem, tmp_path: Path) -> Site:
    made = Site(fs, tmp_path / "store")
    for full in (3 * MIB, 0, 0):
        made.sync(full=full)
    return made


def by_qemu(path: Path, size: int) -> bytes:
    """The disk in an image, through its backing files if it is a qcow2."""
    raw = path.with_suffix(".read")
    form = QEMU.get(path.suffix[1:], path.suffix[1:])
    subprocess.run(["qemu-img", "convert", "-f", form, "-O", "raw", path, raw], check=True, capture_output=True)
    data = raw.read_bytes()
    raw.unlink()
    assert not any(data[size:])
    return data[:size]


def by_dissect(path: Path) -> bytes:
    """A VHDX on its parents. Block by block: from within a partial block `read` gives other bytes, or none."""
    layer = top = VHDX(path)
    step, count = top.block_size // top.sector_size, top.size // top.sector_size
    content = b"".join(top.read_sectors(first, min(step, count - first)) for first in range(0, count, step))
    while layer is not None:
        layer.fh.close()
        layer = layer.parent
    return content


def by_us(path: Path, size: int) -> bytes:
    with images.open(path) as image:
        data = bytearray(image.size_bytes)
        image.read_into(0, data)
    assert not any(data[size:])
    return bytes(data[:size])


@needs_qemu
@pytest.mark.parametrize(("form", "kind"), KINDS)
def test_a_point_in_every_format(site: Site, fs: FileSystem, tmp_path: Path, form: str, kind: str) -> None:
    with site.reader.open_point(2) as point:
        files = restore_point(fs, point, tmp_path / "out", form, subformat=kind)
    for name, path in files.items():
        assert path.name == f"{name}.{form}"
        assert by_qemu(path, SIZES[name]) == site.content(2, name)
    assert files["os"].stat().st_blocks * 512 < 6 * MIB, "zeros are holes"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(path.name for path in files.values())


@needs_qemu
@pytest.mark.parametrize(("form", "kind"), CHAINS)
def test_a_chain_of_all_points(site: Site, fs: FileSystem, tmp_path: Path, form: str, kind: str) -> None:
    out = tmp_path / "out"
    points = export_points(fs, site.reader, out, ExportFormat.of(form, kind, chain=True))
    assert [entry.point for entry in points] == [1, 2, 3]
    read = by_qemu if form == "qcow2" else by_us
    for entry in points:
        for name, path in entry.files.items():
            assert path == out / f"{name}-{entry.point}.{form}"
            assert read(path, SIZES[name]) == site.content(entry.point, name)
    later = [path for entry in points[1:] for path in entry.files.values()]
    assert all(path.stat().st_blocks * 512 < 3 * MIB for path in later), "no later one has what an earlier one has"
    assert len(list(out.iterdir())) == 6, "nothing is left beside the images"


def test_chains_under_the_eyes_of_dissect(site: Site, fs: FileSystem, tmp_path: Path) -> None:
    """A second reader of VHDX chains; it finds the parents by their names, as a hypervisor does."""
    points = export_points(fs, site.reader, tmp_path / "out", ExportFormat.of("vhdx", chain=True))
    for entry in points:
        for name, path in entry.files.items():
            assert by_dissect(path)[: SIZES[name]] == site.content(entry.point, name)


def test_vhd_chains_have_what_xen_and_hyper_v_look_for(site: Site, fs: FileSystem, tmp_path: Path) -> None:
    """Identity and time stamp of the parent: a copy that keeps its time is no remark."""
    points = export_points(fs, site.reader, tmp_path / "out", ExportFormat.of("vhd", "dynamic", chain=True))
    with images.open(points[-1].files["os"]) as image:
        facts = image.facts()
    assert [fact.subformat for fact in facts] == ["differencing", "differencing", "dynamic"]
    assert len({fact.id for fact in facts}) == 3
    assert not any(fact.remarks for fact in facts)
    with points[0].files["os"].open("rb") as file:
        assert VHD(file).read(SIZES["os"]) == site.content(1, "os")


@needs_qemu
def test_qcow2_chains_name_their_parents_and_formats(site: Site, fs: FileSystem, tmp_path: Path) -> None:
    points = export_points(fs, site.reader, tmp_path / "out", ExportFormat.of("qcow2", chain=True))
    for older, newer in pairwise(points):
        with newer.files["os"].open("rb") as file:
            header = QCow2(file, allow_no_backing_file=True)
            assert header.auto_backing_file == older.files["os"].name
        subprocess.run(["qemu-img", "check", "-q", newer.files["os"]], check=True)


def test_a_part_of_the_points(site: Site, fs: FileSystem, tmp_path: Path) -> None:
    form = ExportFormat.of("vhdx", chain=True)
    points = export_points(fs, site.reader, tmp_path / "out", form, first=2, last=3)
    assert [entry.point for entry in points] == [2, 3]
    assert by_us(points[1].files["data"], SIZES["data"]) == site.content(3, "data")
    with pytest.raises(PointGoneError, match="no such points"):
        export_points(fs, site.reader, tmp_path / "none", form, last=9)
    with pytest.raises(TargetExistsError, match=r"(os|data)-2.vhdx already exists"):
        export_points(fs, site.reader, tmp_path / "out", form, first=2)


def test_a_disk_that_changed_its_size_begins_anew(fs: FileSystem, tmp_path: Path) -> None:
    site = Site(fs, tmp_path / "store")
    site.sync(full=MIB)
    site.primary.content["os"].extend(bytes(MIB))
    site.sync()
    site.sync()
    points = export_points(fs, site.reader, tmp_path / "out", ExportFormat.of("vhdx", chain=True))
    with images.open(points[1].files["os"]) as resized, images.open(points[1].files["data"]) as other:
        assert (len(resized.files), len(other.files)) == (1, 2)
    for entry in points:
        for name, path in entry.files.items():
            content = site.content(entry.point, name)
            assert by_us(path, len(content)) == content


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_history_leaves_as_it_was(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Random writes and zeros at random places, in steps that are points or not; VHD and VHDX."""
    root, fs = tmp_path_factory.mktemp("history"), FileSystem()
    sizes = {"os": data.draw(st.sampled_from([512, 4096 * 3, 3 * MIB + 1536, 6 * MIB]))}
    site = Site(fs, root / "store", sizes, data.draw(st.integers(0, 1 << 32)))
    for partial in data.draw(st.lists(st.booleans(), min_size=1, max_size=4)):
        site.primary.scribble(count=data.draw(st.integers(0, 5)))
        site.primary.sync(site.store, partial=partial)
    site.sync()
    form = data.draw(st.sampled_from([kind for kind in CHAINS if kind[0] != "qcow2"]))
    for entry in export_points(fs, site.reader, root / "out", ExportFormat.of(*form, chain=True)):
        content = site.content(entry.point, "os")
        assert by_us(entry.files["os"], len(content)) == content


def test_what_does_not_read_as_it_was_written_gets_no_name(
    site: Site, fs: FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = File.write

    def broken(self: File, offset: int, data: bytes) -> None:
        """One bit of a block's content is another one on its way."""
        payload = self.path.suffix == ".partial" and offset > 4 * MIB and bytes(data[:512]).strip(b"\0")
        write(self, offset, bytes([data[0] ^ 1, *data[1:]]) if payload else data)

    monkeypatch.setattr(File, "write", broken)
    with pytest.raises(StorageError, match="does not read as it was written"):
        export_points(fs, site.reader, tmp_path / "out", ExportFormat.of("vhdx", chain=True))
    assert not (tmp_path / "out").exists()


def test_content_that_is_not_the_point_gets_no_name(site: Site, fs: FileSystem, tmp_path: Path) -> None:
    (head,) = [
        p for p in site.reader.layout.head.glob("*.img") if not p.is_symlink() and p.stat().st_size == SIZES["data"]
    ]
    with head.open("r+b") as file:
        file.seek(MIB // 2)
        file.write(os.urandom(4096))
    with pytest.raises(DamageError):
        export_points(fs, site.reader, tmp_path / "out", ExportFormat.of("vhd", chain=True))
    assert not (tmp_path / "out").exists()


def test_a_failure_at_the_end_takes_all_names_back(
    site: Site, fs: FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Path] = []
    publish = FileSystem.publish_new

    def fail(self: FileSystem, temporary: Path, final: Path) -> None:
        if len(given) == 3:
            raise StorageError("the disk is gone")
        publish(self, temporary, final)
        given.append(final)

    monkeypatch.setattr(FileSystem, "publish_new", fail)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(StorageError, match="is gone"):
        export_points(fs, site.reader, tmp_path / "out", ExportFormat.of("vhdx", chain=True))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_what_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[tuple[Callable[[], ExportFormat], str]] = [
        (lambda: ExportFormat.of("vmdk"), "is not known"),
        (lambda: ExportFormat.of("raw", chain=True), "no chain"),
        (lambda: ExportFormat.of("raw", "dynamic"), "no subformat"),
    ]
    for make, words in cases:
        with pytest.raises(ImageError, match=words):
            make()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ImageError, match="qemu-img is not installed") as caught:
        ExportFormat.of("qcow2")
    assert "qemu-utils" in caught.value.hint
