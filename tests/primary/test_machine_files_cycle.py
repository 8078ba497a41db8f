"""Machine files: they travel with each point, at its instant, and come back with it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from primary_lab import KiB, Lab, MiB

from replica.errors import DamageError, ImageError, LostError, SourceBusyError, TargetExistsError, UnknownMachineError
from replica.plan import Mode
from replica.primary import cycle
from replica.receiver.session import find_disk
from replica.store import damage, machine_files, read_files, restore_point
from replica.tracking import still


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    (tmp_path / "lab").mkdir()
    lab = Lab(tmp_path / "lab", {"os": MiB})
    lab.scribble("os", 0, 64 * KiB)
    for name, text in (("web-1.xml", b"<domain 1/>"), ("nvram", bytes(range(256)) * 500)):
        (lab.root / name).write_bytes(text)
    lab.machine = replace(lab.machine, files=(lab.root / "web-1.xml", lab.root / "nvram"))
    yield lab
    lab.site.close()


def inside(lab: Lab, name: str) -> str:
    return str(lab.root / name).lstrip("/")


def restored(lab: Lab, point: int | None, to: Path) -> dict[str, bytes]:
    with lab.reader().open_point(point) as opened:
        paths = restore_point(lab.fs, opened, to, "raw")
    assert set(paths) == {"os"}
    found = [p for p in (to / "files").rglob("*") if p.is_file()]
    assert all(p.stat().st_mode & 0o777 == 0o600 for p in found)
    assert not [p for p in to.iterdir() if p.name.startswith(".")]
    return {str(p.relative_to(to / "files")): p.read_bytes() for p in found}


def test_files_travel_with_each_point(lab: Lab) -> None:
    first = lab.sync()
    assert set(first.roots) == {"os"}, "they are no disk of the machine"
    (lab.root / "web-1.xml").write_bytes(b"<domain 2/>")
    second = lab.sync()
    assert (second.mode, second.bytes_changed) == (Mode.INCREMENTAL, 8192)
    assert lab.sync().bytes_changed == 0
    nvram = (lab.root / "nvram").read_bytes()
    for point, text in ((1, b"<domain 1/>"), (2, b"<domain 2/>"), (3, b"<domain 2/>")):
        assert restored(lab, point, lab.root / f"out{point}") == {
            inside(lab, "web-1.xml"): text,
            inside(lab, "nvram"): nvram,
        }


def test_files_come_and_go(lab: Lab) -> None:
    machine = replace(lab.machine, files=())
    lab.sync(machine=machine)
    lab.sync()
    lab.sync(machine=replace(lab.machine, files=lab.machine.files[:1]))
    lab.sync(machine=machine)
    with lab.reader().open_point(1) as opened:
        assert opened.state.files is None and read_files(opened) == {}
    for point, count in ((2, 2), (3, 1)):
        with lab.reader().open_point(point) as opened:
            assert len(read_files(opened)) == count
    assert lab.head.files is None and len(lab.head.disks) == 1
    with lab.reader().open_point(4) as opened:
        restore_point(lab.fs, opened, lab.root / "out", "raw")
    assert not (lab.root / "out" / "files").exists()


def test_a_missing_file_stops_the_cycle_and_is_named(lab: Lab) -> None:
    (lab.root / "nvram").unlink()
    with pytest.raises(ImageError, match="machine's files.*nvram"):
        lab.sync()
    (lab.root / "nvram").write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(ImageError, match="machine's files.*nvram"):
        lab.sync()


def test_a_file_that_changes_while_the_disks_are_read_makes_no_point(lab: Lab) -> None:
    link = lab.link()

    def before(name: str, _arguments: Any) -> None:
        if name == "put_segment":
            (lab.root / "web-1.xml").write_bytes(b"<domain 9/>")

    link.before = before
    lab.scribble("os", 0, MiB)
    os.truncate(lab.images["os"], 64 * MiB)
    lab.data["os"] = lab.rng.integers(1, 256, 64 * MiB, "u1")
    lab.images["os"].write_bytes(lab.data["os"].tobytes())
    with pytest.raises(SourceBusyError, match="web-1.xml was written"):
        lab.sync(link)


def test_files_that_change_between_a_comparison_and_its_point_are_of_one_instant(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each window is what the point's own reading found, also those where the comparison saw no difference."""
    files = [lab.root / f"file-{number}" for number in range(6)]
    for file in files:
        file.write_bytes(os.urandom(MiB))
    lab.machine = replace(lab.machine, files=tuple(files))
    lab.sync()
    files[0].write_bytes(os.urandom(MiB))  # in the first window of 4 MiB; the last file is in the second one

    def resync(*arguments: Any) -> Any:
        found = original(*arguments)
        files[5].write_bytes(os.urandom(MiB))
        return found

    original = cycle.resync
    monkeypatch.setattr(cycle, "resync", resync)
    assert lab.sync(rebuild=True).point == 2
    assert restored(lab, 2, lab.root / "out") == {inside(lab, file.name): file.read_bytes() for file in files}


@pytest.fixture
def guest(lab: Lab) -> Iterator[Path]:
    """A guest that goes on writing one of its files, and is stopped by `freeze`: the file that says so."""
    frozen, ended = lab.root / "now-frozen", threading.Event()

    def write() -> None:
        while not ended.wait(0.002):
            if not frozen.exists():
                (lab.root / "nvram").write_bytes(os.urandom(MiB // 8))

    thread = threading.Thread(target=write)
    thread.start()
    lab.machine = lab.freezing(["touch", str(frozen)], ["rm", "-f", str(frozen)])
    yield frozen
    ended.set()
    thread.join()


def test_files_that_only_freeze_stops_are_no_hindrance(lab: Lab, guest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(still, "WAIT_SECONDS", 1.0)
    kept = lab.root / "kept"
    lab.machine = replace(lab.machine, thaw=f"cp {lab.root}/nvram {kept}; rm -f {guest}")
    lab.spec = replace(lab.spec, part_bytes=64 * KiB)
    first = lab.sync()  # a first copy in parts, read while the guest goes on
    assert (first.mode, first.parts > 0) == (Mode.INITIAL, True)
    assert restored(lab, 1, lab.root / "out1")[inside(lab, "nvram")] == kept.read_bytes()
    for point, options in ((2, {}), (3, {"rebuild": True})):
        assert lab.sync(**options).point == point
        assert restored(lab, point, lab.root / f"out{point}")[inside(lab, "nvram")] == kept.read_bytes()


def test_files_that_freeze_does_not_stop_make_no_point(lab: Lab, guest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(still, "WAIT_SECONDS", 0.2)
    with pytest.raises(SourceBusyError, match="nvram"):
        lab.sync(machine=replace(lab.machine, freeze="true", thaw="true"))
    assert lab.reader().points() == [] and not guest.exists()


@pytest.mark.parametrize("freezing", [False, True])
def test_a_named_pipe_is_no_file(lab: Lab, freezing: bool) -> None:
    (lab.root / "nvram").unlink()
    os.mkfifo(lab.root / "nvram")
    machine = lab.freezing("true", "true") if freezing else lab.machine
    with pytest.raises(ImageError, match="nvram"):
        lab.sync(machine=machine)


def test_restoring_writes_nothing_over_what_is_there(lab: Lab) -> None:
    lab.sync()
    (lab.root / "out").mkdir()
    (lab.root / "out" / "files").symlink_to(lab.root)
    with lab.reader().open_point(1) as opened, pytest.raises(TargetExistsError, match="files"):
        restore_point(lab.fs, opened, lab.root / "out", "raw")
    assert [p.name for p in (lab.root / "out").iterdir()] == ["files"]


@pytest.mark.parametrize("marked", [False, True])
def test_damaged_files_do_not_keep_the_disks(lab: Lab, marked: bool) -> None:
    lab.sync()
    layout = lab.reader().layout
    with layout.image(lab.head.files).open("r+b") as file:
        file.seek(20)
        file.write(b"rotten")
    if marked:
        damage.note_verdicts(lab.fs, layout, lab.reader().verify())
    with lab.reader().open_point(1) as opened:
        with pytest.raises(LostError if marked else DamageError):
            restore_point(lab.fs, opened, lab.root / "refused", "raw")
        assert not any((lab.root / "refused").glob("*"))
        written = restore_point(lab.fs, opened, lab.root / "out", "raw", missing={})
        assert machine_files(opened, allow_lost=True) == {}
    assert [p.name for p in (lab.root / "out").iterdir()] == [written["os"].name]
    assert written["os"].read_bytes() == lab.images["os"].read_bytes()


def test_the_disk_that_holds_them_has_no_name_for_others(lab: Lab) -> None:
    lab.sync()
    assert find_disk(lab.head, "os").name == "os"
    with pytest.raises(UnknownMachineError, match="it has os$"):
        find_disk(lab.head, "machine-files")
    assert find_disk(lab.head, str(lab.head.files)).id == lab.head.files
