"""What qemu reads for us: the same bytes as qemu-img's, only permitted files, and no server that is left over."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from replica import images
from replica.errors import ImageError
from replica.images.copying import windows

pytestmark = pytest.mark.skipif(not shutil.which("qemu-nbd"), reason="qemu-utils is not installed")
MiB = 1 << 20


def qemu_img(*words: object) -> str:
    return subprocess.run(["qemu-img", *map(str, words)], capture_output=True, text=True, check=True).stdout


def by_us(path: Path, *parents: Path) -> bytes:
    with images.open(path, parents=parents) as image:
        data = bytearray(image.size_bytes)
        for start, stop in windows(image.allocated(0, image.size_bytes), 4 * MiB):
            image.read_into(start, memoryview(data)[start:stop])
        return bytes(data)


def by_qemu(path: Path, format: str) -> bytes:
    raw = path.with_name("by-qemu")
    qemu_img("convert", "-f", format, "-O", "raw", path, raw)
    return raw.read_bytes()


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "base.raw"
    path.write_bytes(os.urandom(2 * MiB) + bytes(5 * MiB) + os.urandom(70_144) + bytes(3 * MiB))
    return path


KINDS = [
    ("qcow2", "qcow2", ()),
    ("qcow2", "qcow2", ("compat=0.10",)),
    ("qcow2", "qcow2", ("cluster_size=512",)),
    ("qcow2", "qcow2", ("cluster_size=2M,extended_l2=on",)),
    ("vmdk", "vmdk", ("subformat=monolithicSparse",)),
    ("vmdk", "vmdk", ("subformat=streamOptimized",)),
    ("vdi", "vdi", ()),
    ("parallels", "hds", ()),
]


@pytest.mark.parametrize(("format", "extension", "options"), KINDS, ids=str)
def test_reads_as_qemu_does(tmp_path: Path, raw: Path, format: str, extension: str, options: tuple[str, ...]) -> None:
    path = tmp_path / f"a.{extension}"
    words = [word for option in options for word in ("-o", option)]
    qemu_img("convert", "-f", "raw", "-O", format, *words, raw, path)
    assert by_us(path) == by_qemu(path, format)
    with images.open(path) as image:
        assert image.format == format and [file.path for file in image.files] == [path]
        assert sum(stop - start for start, stop in image.allocated(0, image.size_bytes)) < 6 * MiB


def overlay(path: Path, base: Path | str, format: str | None = "qcow2") -> Path:
    words = ["-F", format] if format else []
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", base, *words, path, 12 * MiB)
    return path


@pytest.fixture
def chain(tmp_path: Path, raw: Path) -> Path:
    """vm/top.qcow2 -> vm/mid.qcow2 -> bases/base.raw"""
    for folder in ("vm", "bases"):
        (tmp_path / folder).mkdir()
    raw.rename(tmp_path / "bases/base.raw")
    overlay(tmp_path / "vm/mid.qcow2", "../bases/base.raw", "raw")
    top = overlay(tmp_path / "vm/top.qcow2", "mid.qcow2")
    for path, pattern in [(tmp_path / "vm/mid.qcow2", 5), (top, 6)]:
        command = f"write -P {pattern} {pattern}M 100k"
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", command, path], check=True, stdout=subprocess.DEVNULL)
    return top


def test_a_chain(chain: Path) -> None:
    bases = chain.parents[1] / "bases"
    assert by_us(chain, bases) == by_qemu(chain, "qcow2")
    with images.open(chain, parents=[bases]) as image:
        assert [file.path.name for file in image.files] == ["top.qcow2", "mid.qcow2", "base.raw"]
        assert [facts.subformat for facts in image.facts()] == ["differencing", "differencing", "fixed"]
    with pytest.raises(ImageError, match=r"parent \(../bases/base.raw\) is not in .*`parents`"):
        images.open(chain)


def test_a_guest_that_writes_a_header_into_its_raw_disk(tmp_path: Path) -> None:
    """The raw-probing attack: a raw base whose content is a qcow2 with the host's secrets as its backing file."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret" * 200_000)
    overlay(tmp_path / "guest.raw", secret, "raw")
    top = overlay(tmp_path / "top.qcow2", "guest.raw", "raw")
    content = by_us(top)
    assert content[:4] == b"QFI\xfb" and b"secretsecret" not in content


@pytest.mark.parametrize(
    ("base", "format", "match"),
    [
        ("/etc/hostname", "raw", "is not in"),
        ("../../../../../etc/hostname", "raw", "is not in"),
        ("link.raw", "raw", "is not in"),
        ("gone.qcow2", "qcow2", "is not in"),
        ("moved/base.raw", "raw", "is not in"),
        ("nbd://127.0.0.1/x", "raw", "is not in"),
        ('json:{"driver":"file","filename":"/etc/hostname"}', "raw", "is not in"),
        ("base.raw", None, "of the format '', which must be qcow2 or raw"),
        ("base.raw", "vmdk", "of the format 'vmdk', which must be"),
        ("base.raw", "qcow2", "is no qcow2"),
        ("top.qcow2", "qcow2", "part of the chain already"),
    ],
)
def test_backing_files_that_are_not_followed(
    tmp_path: Path, raw: Path, base: str, format: str | None, match: str
) -> None:
    (tmp_path / "link.raw").symlink_to("/etc/hostname")
    top = overlay(tmp_path / "top.qcow2", "x" * len(base), "vhdx" if format is None else format)
    header = bytearray(top.read_bytes())
    at = header.index(b"x" * len(base))
    header[at : at + len(base)] = base.encode()
    if format is None:
        at = header.index(b"\xe2\x79\x2a\xca")
        header[at : at + 4] = b"\x12\x34\x56\x78"
    top.write_bytes(header)
    with pytest.raises(ImageError, match=match):
        images.open(top)


def damage(offset: int, data: bytes) -> object:
    def change(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (damage(0, b"NOPE"), "is no qcow2"),
        (damage(4, b"\0\0\0\x09"), "version 9"),
        (damage(20, b"\0\0\0\x40"), "not known or damaged"),
        (damage(32, b"\0\0\0\1"), "encrypted"),
        (damage(79, b"\4"), "its data in another file"),
        (damage(79, b"\2"), "marked corrupt; repair it"),
        (damage(8, b"\0\0\0\0\x7f\xff\xff\xff\0\0\1\0"), "outside of its header"),
        (damage(24, b"\x7f" * 8), "qemu-nbd cannot open image .*a.qcow2: "),
        (damage(40, b"\x7f" * 8), "qemu-nbd cannot open image .*a.qcow2: "),
    ],
)
def test_headers_that_are_refused(tmp_path: Path, change, match: str) -> None:  # type: ignore[no-untyped-def]
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "a.qcow2", 8 * MiB)
    change(tmp_path / "a.qcow2")
    with pytest.raises(ImageError, match=match):
        images.open(tmp_path / "a.qcow2")


def test_vmdks_of_several_files(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret" * 1000)
    text = b'# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType="monolithicFlat"\n'
    text += b'RW 11 FLAT "%s" 0\n' % str(secret).encode()
    (tmp_path / "flat.vmdk").write_bytes(text)
    with pytest.raises(ImageError, match="is no VMDK that is one file; .*-flat.vmdk"):
        images.open(tmp_path / "flat.vmdk")
    nested = bytearray(8192)
    nested[:4], nested[28:36] = b"KDMV", (1).to_bytes(8, "little")
    nested[4:8], nested[512 : 512 + len(text)] = (1).to_bytes(4, "little"), text
    (tmp_path / "nested.vmdk").write_bytes(nested)
    with pytest.raises(ImageError, match="describes other files"):
        images.open(tmp_path / "nested.vmdk")
    base = tmp_path / "base.vmdk"
    qemu_img("create", "-q", "-f", "vmdk", base, 8 * MiB)
    qemu_img("create", "-q", "-f", "vmdk", "-b", base, "-F", "vmdk", tmp_path / "snapshot.vmdk")
    with pytest.raises(ImageError, match="is a snapshot of another one"):
        images.open(tmp_path / "snapshot.vmdk")


def test_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "a.qcow2", MiB)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "setpriv").symlink_to(shutil.which("setpriv") or "")
    monkeypatch.setattr(os, "defpath", str(tools))
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(ImageError, match="qemu-nbd is needed .*; install qemu-utils"):
        images.open(tmp_path / "a.qcow2")


def servers_of(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid), "qemu-nbd"], capture_output=True, text=True, check=False)
    return [int(word) for word in found.stdout.split()]


def gone(pid: int) -> bool:
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


HOLD = """
import pathlib, sys, time
from replica import images
from replica.images.qemu_server import QemuServer

def wait(server):
    while not pathlib.Path(server.uri.socket).exists():
        time.sleep(0.01)
    print(1, flush=True)
    time.sleep(60)

if sys.argv[2] == "before it has clients":
    QemuServer._connect = wait
image = images.open(pathlib.Path(sys.argv[1]))
print(1, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("when", ["before it has clients", "while it has clients"])
def test_a_server_ends_with_its_process(tmp_path: Path, when: str) -> None:
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "a.qcow2", MiB)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "a.qcow2"), when], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"1\n"
    (server,) = servers_of(holder.pid)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    assert gone(server)


def test_a_server_outlives_the_thread_that_opened_it_and_ends_with_the_image(tmp_path: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "a.qcow2", MiB)
    opened: list[images.DiskImage] = []
    thread = threading.Thread(target=lambda: opened.append(images.open(tmp_path / "a.qcow2")))
    thread.start()
    thread.join()
    with opened[0] as image:
        (server,) = servers_of(os.getpid())
        time.sleep(0.1)
        image.read_into(0, bytearray(MiB))
    assert gone(server) and not servers_of(os.getpid())


def test_a_machine_that_holds_the_image(tmp_path: Path) -> None:
    """qemu's image lock, held by a writer, keeps nobody from reading; nor does reading keep a writer out."""
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, MiB)
    with images.open(path):
        writer = subprocess.Popen(["qemu-nbd", "-t", "-f", "qcow2", "-k", tmp_path / "s", path])
        while not (tmp_path / "s").exists():
            assert writer.poll() is None
            time.sleep(0.01)
        with images.open(path) as image:
            image.read_into(0, bytearray(MiB))
        writer.kill()
        writer.wait()
