"""What goes wrong at a site: one clear line that names the thing, its own exit code, and nothing is lost."""

from __future__ import annotations

import json
import random
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from disks import digest, scribble
from guest import command
from lab import Lab

CONFIG, IMAGE, SOURCE_BUSY, TRANSPORT, FORBIDDEN, CONFLICT, BUSY, STORAGE, DAMAGE = 3, 4, 5, 6, 7, 8, 9, 10, 11
POINT_GONE, TARGET_EXISTS, LISTEN = 12, 13, 14


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(5).randbytes(6_000_000))
    return path


@pytest.fixture
def pair(lab: Lab, image: Path) -> Lab:
    """Both sites up, one point made."""
    lab.machine("web-1", {"os": image})
    lab.serve()
    lab.sync()
    return lab


def failed(lab: Lab, code: int, *words: str, config: Path | None = None) -> str:
    """A sync that must fail with `code` and one line that holds `words`, in JSON as well; nothing is lost by it."""
    before = lab.points() if lab.server else []
    done = lab.run("sync", "web-1", "--json", "-c", config or lab.sender, code=code)
    assert done.stderr.startswith("replica: ")
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr
    document = json.loads(done.stdout)
    error = document["error"] if isinstance(document, dict) else document[0]["error"]
    assert error["exit_code"] == code
    if before:
        after = {p["point"]: p for p in lab.points()}
        for p in before:
            assert after[p["point"]]["roots"] == p["roots"]
            assert after[p["point"]]["restorable"] is True
    return done.stderr


def test_a_certificate_of_another_authority(pair: Lab, tmp_path: Path) -> None:
    pair.run("pki", "init", tmp_path / "other")
    pair.run("pki", "issue", tmp_path / "other", "hv-1")
    shutil.copy(tmp_path / "pki/ca.crt", tmp_path / "other/ca.crt")
    config = pair.write_sender("wrong.toml", "hv-1", pki="other")
    failed(pair, FORBIDDEN, "hv-1.crt", "refused", config=config)
    pair.sync()


def test_a_receiver_that_is_not_trusted(pair: Lab, tmp_path: Path) -> None:
    pair.run("pki", "init", tmp_path / "other")
    pair.run("pki", "issue", tmp_path / "other", "hv-1")
    failed(pair, FORBIDDEN, "127.0.0.1", "ca.crt", config=pair.write_sender("wrong.toml", "hv-1", pki="other"))


def test_a_primary_nobody_allowed(pair: Lab, tmp_path: Path) -> None:
    pair.run("pki", "issue", tmp_path / "pki", "xen-1")
    failed(pair, FORBIDDEN, "xen-1", config=pair.write_sender("x.toml", "xen-1", state="state-x/", keys="keys-x/"))


def test_a_sender_that_claims_anothers_replica(pair: Lab, image: Path, tmp_path: Path) -> None:
    """hv-2 has stolen hv-1's whole state and keys, but not its certificate."""
    pair.run("pki", "issue", tmp_path / "pki", "hv-2")
    shutil.copytree(tmp_path / "state", tmp_path / "state-2")
    shutil.copytree(tmp_path / "keys", tmp_path / "keys-2")
    scribble(image, 1, 10)
    failed(pair, FORBIDDEN, config=pair.write_sender("thief.toml", "hv-2", state="state-2/", keys="keys-2/"))
    assert pair.sync()["point"] == 2
    assert digest(pair.restore(tmp_path / "out")["os"]) == digest(image)


def test_two_cycles_of_one_machine_at_once(pair: Lab, image: Path, tmp_path: Path) -> None:
    mark, release = tmp_path / "frozen-now", tmp_path / "go-on"
    wait = f"touch {mark}; until [ -e {release} ]; do sleep 0.05; done"
    pair.machine("web-1", {"os": image}, freeze=wait, thaw="true")
    config = pair.sender
    first = pair.popen("sync", "web-1", "--json", "-c", config)
    while not mark.exists():
        assert first.poll() is None
        time.sleep(0.02)
    failed(pair, BUSY, "web-1", config=config)
    release.touch()
    out, err = first.communicate(timeout=60)
    assert first.returncode == 0, err
    assert json.loads(out)[0]["point"] == 2


def test_two_senders_with_one_certificate(pair: Lab, image: Path, tmp_path: Path) -> None:
    """The second one, without any state, adopts the replica; the first is fenced and told so."""
    shutil.copytree(tmp_path / "keys", tmp_path / "keys-2")
    second = pair.write_sender("second.toml", "hv-1", state="state-2/", keys="keys-2/")
    scribble(image, 3, 10)
    assert pair.json("sync", "web-1", "-c", second)[0]["point"] == 2
    failed(pair, CONFLICT, "web-1", "another primary took the replica over")
    scribble(image, 4, 10)
    assert pair.json("sync", "web-1", "-c", second)[0]["point"] == 3
    shutil.rmtree(tmp_path / "state")
    assert pair.sync()["point"] == 4
    assert digest(pair.restore(tmp_path / "out")["os"]) == digest(image)


def test_an_image_of_another_size_is_an_ordinary_point(pair: Lab, image: Path, tmp_path: Path) -> None:
    content = image.read_bytes()
    image.write_bytes(content + b"more" * 2048)
    time.sleep(0.05)
    grown = pair.sync()
    assert grown["point"] == 2
    assert grown["bytes_changed"] <= 16384
    assert pair.restore(tmp_path / "grown", point=2)["os"].read_bytes() == content + b"more" * 2048
    assert pair.restore(tmp_path / "before", point=1)["os"].read_bytes() == content


@contextmanager
def being_written(image: Path) -> Iterator[None]:
    stop = threading.Event()

    def write() -> None:
        with image.open("r+b", buffering=0) as file:
            while not stop.wait(0.002):
                file.seek(4096)
                file.write(random.randbytes(512))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield
    finally:
        stop.set()
        writer.join()
        time.sleep(0.05)


def test_an_image_that_is_being_written(pair: Lab, image: Path) -> None:
    with being_written(image):
        failed(pair, SOURCE_BUSY, str(image), "freeze")
    assert pair.sync()["point"] == 2


def test_an_image_that_vanished(pair: Lab, image: Path, tmp_path: Path) -> None:
    image.rename(tmp_path / "away")
    failed(pair, IMAGE, str(image))
    (tmp_path / "away").rename(image)
    time.sleep(0.05)
    assert pair.sync()["point"] == 2


@pytest.mark.parametrize("content", [b"", b"GARBAGE!" * 4096], ids=["empty", "garbage"])
def test_an_image_that_is_no_vhd(lab: Lab, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "disk.vhd"
    path.write_bytes(content)
    time.sleep(0.05)
    lab.machine("web-1", {"os": path})
    lab.serve()
    done = lab.run("sync", "web-1", "-c", lab.sender, code=IMAGE)
    assert str(path) in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_receiver_that_is_not_there(lab: Lab, image: Path) -> None:
    lab.machine("web-1", {"os": image})
    failed(lab, TRANSPORT, f"127.0.0.1:{lab.port}")
    lab.serve()
    assert lab.sync()["point"] == 1


def test_a_port_in_use(lab: Lab) -> None:
    with socket.create_server(("127.0.0.1", lab.port)):
        done = lab.run("serve", "-c", lab.receiver, code=LISTEN)
    assert str(lab.port) in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("replica: ")]) == 1


def test_a_second_receiver_on_the_same_storage(pair: Lab, tmp_path: Path) -> None:
    """Another process may not write to a replica that one serves; reading goes on."""
    text = pair.receiver.read_text()
    other = tmp_path / "other.toml"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    other.write_text(text.replace(f":{pair.port}", f":{port}"))
    process = pair.popen("serve", "-c", other)
    try:
        time.sleep(2)
        assert pair.sync()["point"] == 2
    finally:
        process.kill()
        _, log = process.communicate()
    assert "Traceback" not in log
    assert "another process" in log or "serves" in log or "lock" in log, log
    assert pair.sync()["point"] == 3


@contextmanager
def small_file_system(directory: Path, size_bytes: int) -> Iterator[Path]:
    """A file system of its own with that much space."""
    directory.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", directory], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield directory
    finally:
        command("umount", "-l", directory)


def test_a_full_disk_at_the_receiver(lab: Lab, tmp_path: Path, image: Path) -> None:
    with small_file_system(tmp_path / "small", 24 << 20) as small:
        lab.storage = small
        lab.machine("web-1", {"os": image})
        lab.serve()
        lab.sync()
        first = digest(image)
        ballast = small / "ballast"
        with ballast.open("wb") as file:
            file.write(bytes(9 << 20))
        scribble(image, 6, 1200)
        for _ in range(3):
            failed(lab, STORAGE, "space")
        assert digest(lab.restore(tmp_path / "full", "web-1", 1)["os"]) == first
        ballast.unlink()
        assert lab.sync()["point"] >= 2
        assert digest(lab.restore(tmp_path / "one", "web-1", 1)["os"]) == first
        assert digest(lab.restore(tmp_path / "two")["os"]) == digest(image)
        lab.kill()


def test_broken_configurations(lab: Lab, image: Path, tmp_path: Path) -> None:
    lab.machine("web-1", {"os": image})
    broken = tmp_path / "broken.toml"
    broken.write_text(lab.sender.read_text().replace("[tls]", "[tls"))
    failed(lab, CONFIG, "broken.toml:5:", config=broken)
    broken.write_text(lab.sender.read_text().replace("every =", "evry ="))
    failed(lab, CONFIG, "broken.toml:", "evry", "`every`", config=broken)
    broken.write_text(lab.sender.read_text().replace("hv-1.crt", "hv-7.crt"))
    failed(lab, CONFIG, "hv-7.crt", config=broken)
    lab.run("serve", "-c", broken, code=CONFIG)
    assert "web-9" in lab.run("sync", "web-9", "-c", lab.sender, code=CONFIG).stderr
    assert "web-9" in lab.run("points", "web-9", "-c", lab.receiver, code=CONFIG).stderr


def test_keys_that_are_lost(pair: Lab, image: Path, tmp_path: Path) -> None:
    """The state is there, the data key is not: no new key is made behind the operator's back."""
    shutil.move(tmp_path / "keys", tmp_path / "escrow")
    scribble(image, 7, 10)
    done = pair.run("sync", "web-1", "-c", pair.sender, code=DAMAGE)
    assert "key" in done.stderr
    assert str(tmp_path / "keys") in done.stderr
    shutil.rmtree(tmp_path / "keys", ignore_errors=True)
    shutil.move(tmp_path / "escrow", tmp_path / "keys")
    assert pair.sync()["point"] == 2
    assert digest(pair.restore(tmp_path / "out")["os"]) == digest(image)


def test_restore_never_overwrites(pair: Lab, tmp_path: Path) -> None:
    target = tmp_path / "out"
    pair.restore(target)
    (target / "os.raw").write_text("mine")
    done = pair.run("restore", "web-1", "--to", target, "-c", pair.receiver, code=TARGET_EXISTS)
    assert str(target / "os.raw") in done.stderr
    assert (target / "os.raw").read_text() == "mine"
    assert [p.name for p in target.iterdir()] == ["os.raw"]
    assert "point 9" in pair.run("restore", "web-1", "--point", 9, "--to", target, "-c", pair.receiver, code=12).stderr
    assert "ca.crt" in pair.run("pki", "init", tmp_path / "pki", code=TARGET_EXISTS).stderr
    assert "hv-1" in pair.run("pki", "issue", tmp_path / "pki", "hv-1", code=TARGET_EXISTS).stderr


def test_a_rotten_head_is_found(pair: Lab, tmp_path: Path) -> None:
    (directory,) = pair.replica_directories()
    head = directory / "head" / "os.img"
    with head.open("r+b") as file:
        file.seek(2_000_000)
        file.write(b"rot")
    verdict = pair.json("verify", "web-1", "-c", pair.receiver, code=DAMAGE)
    assert verdict["ok"] is False
    (found,) = verdict["disks"]["os"]["mismatches"]
    assert found["offset"] <= 2_000_000 < found["offset"] + found["length"]
    done = pair.run("restore", "web-1", "--to", tmp_path / "out", "-c", pair.receiver, code=DAMAGE)
    assert "os" in done.stderr
    assert not (tmp_path / "out").exists()
