"""The whole life of a replica on real disks: every listed point restores to the copy kept at its freeze."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from disks import digest, mounted, scribble
from guest import Guest, check_file_system, command, same
from lab import Lab
from relay import Relay

ODD_BYTES = 52_433_408
"""No multiple of a leaf, a megabyte or a VHD block; qemu-img rounds it to a disk geometry for VHDs."""


def files_in(directory: Path) -> Path:
    """What the file system starts with."""
    tree = directory / "files"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc/hostname").write_text("web-1\n")
    (tree / "notes").write_text("a line of text\n" * 4000)
    (tree / "blob").write_bytes(random.Random(1).randbytes(3_000_000))
    return tree


def change(guest: Guest, cycle: int) -> None:
    """What happens in the machine between two cycles: every kind of change once."""
    rng = random.Random(cycle)
    if cycle == 1:
        guest.write(guest.blocks_of("/blob")[5], 8192, 0x5A)
    elif cycle == 2:
        with mounted(guest) as root:
            (root / "grown").write_bytes(rng.randbytes(5_000_000))
            (root / "etc/hostname").write_text("web-one\n")
    elif cycle == 3:
        with mounted(guest) as root:
            (root / "grown").unlink()
            command("sync")
            if guest.kind == "raw":
                command("fstrim", root)
    elif cycle == 4:
        for block in rng.sample(guest.blocks_of("/blob"), 8):
            guest.write(block, 512, rng.randrange(256))
    elif cycle == 5:
        with mounted(guest) as root:
            for number in range(200):
                (root / f"etc/{number}.conf").write_text(f"setting = {rng.random()}\n" * number)
    else:
        guest.write(PARTITION_GAP, 4096, 0)


PARTITION_GAP = 65536
"""Between the partition table and the partition: nobody's, but part of the disk."""


@pytest.mark.parametrize(
    ("kind", "head"), [("dynamic", "raw"), ("fixed", "vhd"), ("raw", "vhd"), ("fixed", "raw")], ids=str
)
def test_every_point_restores_exactly(lab: Lab, tmp_path: Path, kind: str, head: str) -> None:
    lab.head = head
    guest = Guest(tmp_path, kind, ODD_BYTES, files_in(tmp_path))
    lab.machine("web-1", {"os": guest.image})
    lab.serve()
    kept: dict[int, Path] = {}
    roots: dict[int, str] = {}
    for cycle in range(7):
        if cycle:
            change(guest, cycle)
        copy = guest.keep(tmp_path / f"kept-{cycle}")
        entry = lab.sync()
        kept[entry["point"]], roots[entry["point"]] = copy, entry["roots"]["os"]
    assert list(kept) == [1, 2, 3, 4, 5, 6, 7]

    listed = lab.points()
    assert [p["point"] for p in listed] == list(kept)
    for p in listed:
        assert p["restorable"] is True
        assert p["roots"] == {"os": roots[p["point"]]}
        other = "vhd" if head == "raw" else "raw"
        form = other if p["point"] == 4 else head
        files = lab.restore(tmp_path / f"out-{p['point']}", "web-1", p["point"], "--format", form)
        assert files == {"os": tmp_path / f"out-{p['point']}" / f"os.{form}"}
        same(kept[p["point"]], guest.format, files["os"], "vpc" if form == "vhd" else "raw")
        check_file_system(files["os"])
    newest = lab.restore(tmp_path / "newest")
    assert newest["os"].suffix == f".{head}"
    same(guest.image, guest.format, newest["os"], "vpc" if head == "vhd" else "raw")
    verdict = lab.json("verify", "web-1", "-c", lab.receiver)
    assert verdict["ok"] is True
    assert verdict["disks"]["os"]["bytes"] == guest.size_bytes
    assert verdict["disks"]["os"]["mismatches"] == []

    # And the same without the receiver's process.
    assert lab.stop() == 0
    assert lab.points() == listed
    again = lab.restore(tmp_path / "offline", "web-1", 2)
    same(kept[2], guest.format, again["os"], "vpc" if head == "vhd" else "raw")
    offline = lab.json("verify", "web-1", "-c", lab.receiver)
    assert offline["ok"] is True and offline["disks"] == verdict["disks"]


def test_the_head_is_a_complete_image_as_it_lies_there(lab: Lab, tmp_path: Path) -> None:
    lab.head = "vhd"
    guest = Guest(tmp_path, "dynamic", ODD_BYTES, files_in(tmp_path))
    lab.machine("web-1", {"os": guest.image})
    lab.serve()
    lab.sync()
    (directory,) = lab.replica_directories()
    head = directory / "head" / "os.img"
    same(guest.image, "vpc", head, "vpc")


def test_two_disks_make_one_point(lab: Lab, tmp_path: Path) -> None:
    system = Guest(tmp_path, "fixed", ODD_BYTES, files_in(tmp_path), name="system")
    data = tmp_path / "data.raw"
    data.write_bytes(random.Random(2).randbytes(10_000_000 - 512))
    lab.machine("web-1", {"system": system.image, "data": data})
    lab.serve()
    kept = []
    for cycle in range(3):
        if cycle:
            scribble(data, cycle, 30)
            change(system, cycle)
        kept.append((system.keep(tmp_path / f"s{cycle}"), digest(data)))
        entry = lab.sync()
        assert entry["point"] == cycle + 1
        assert set(entry["roots"]) == {"system", "data"}
    for cycle, (copy, data_digest) in enumerate(kept):
        files = lab.restore(tmp_path / f"out-{cycle}", "web-1", cycle + 1)
        assert set(files) == {"system", "data"}
        same(copy, "vpc", files["system"], "raw")
        assert digest(files["data"]) == data_digest


def test_an_unchanged_machine_makes_points_that_cost_nothing(lab: Lab, tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(random.Random(3).randbytes(20_000_000))
    lab.machine("web-1", {"os": image})
    lab.serve()
    first = lab.sync()
    assert first["bytes_changed"] >= 20_000_000
    for number in (2, 3):
        entry = lab.sync()
        assert (entry["point"], entry["bytes_changed"], entry["roots"]) == (number, 0, first["roots"])
        assert entry["bytes_wire"] < 4096
        assert entry["frozen_at"] > first["frozen_at"]
    assert [p["point"] for p in lab.points()] == [1, 2, 3]


def test_points_rotate(lab: Lab, tmp_path: Path) -> None:
    lab.keep_last = 3
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(5_000_000))
    lab.machine("web-1", {"os": image})
    lab.serve()
    digests = {}
    for cycle in range(6):
        scribble(image, cycle, 20)
        digests[lab.sync()["point"]] = digest(image)
    listed = [p["point"] for p in lab.points()]
    assert listed == [4, 5, 6]
    for point in listed:
        assert digest(lab.restore(tmp_path / f"out-{point}", "web-1", point)["os"]) == digests[point]
    gone = lab.run("restore", "web-1", "--point", 2, "--to", tmp_path / "no", "-c", lab.receiver, code=12)
    assert "point 2" in gone.stderr
    assert not list((tmp_path / "no").glob("*"))


def test_nothing_of_the_disk_shows_on_the_way_or_at_rest(lab: Lab, tmp_path: Path) -> None:
    """A known text, compressible and not, is neither on the wire nor in incoming/ and points/."""
    text = b"attack at dawn, and bring the good coffee. "
    image = tmp_path / "disk.raw"
    noise = random.Random(4)
    pieces = [noise.randbytes(4000) + text + noise.randbytes(53) if n % 2 else text * 95 for n in range(1500)]
    image.write_bytes(b"".join(piece.ljust(4096, b"\1") for piece in pieces))
    lab.serve()
    with Relay(lab.port, record=True) as relay:
        lab.connect_port = relay.port
        lab.machine("web-1", {"os": image})
        lab.sync()
        scribble(image, 5, 400)
        lab.sync()
        # A cut in mid-delta leaves an incomplete incoming file to look into.
        scribble(image, 6, 1400)
        cuts = relay.cuts
        relay.cut_after(relay.count_bytes // 3)
        process = lab.popen("sync", "web-1", "-c", lab.sender)
        while relay.cuts == cuts and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        process.communicate()
        assert text not in relay.sent
    (directory,) = lab.replica_directories()
    looked_into = [p for part in ("incoming", "points") for p in (directory / part).rglob("*") if p.is_file()]
    assert {p.relative_to(directory).parts[0] for p in looked_into} == {"incoming", "points"}
    assert sum(p.stat().st_size for p in looked_into) > 500_000
    for path in looked_into:
        content = path.read_bytes()
        assert text not in content, path
        assert text[:16] not in content, path
    assert (directory / "head").exists()


def test_both_sides_restart(lab: Lab, tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(random.Random(7).randbytes(8_000_000))
    lab.machine("web-1", {"os": image})
    for cycle in range(3):
        lab.serve()
        scribble(image, cycle, 10)
        entry = lab.sync()
        assert entry["point"] == cycle + 1
        assert entry["bytes_changed"] <= (10 * 4096 if cycle else 1 << 30)
        assert lab.stop() == 0


def test_a_sender_that_lost_its_state_finds_its_replica_again(lab: Lab, tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(random.Random(8).randbytes(8_000_000))
    lab.machine("web-1", {"os": image})
    lab.serve()
    lab.sync()
    before = digest(image)
    shutil.rmtree(tmp_path / "state")
    scribble(image, 9, 10)
    entry = lab.sync()
    assert entry["point"] == 2
    assert len(lab.replica_directories()) == 1
    assert digest(lab.restore(tmp_path / "one", "web-1", 1)["os"]) == before
    assert digest(lab.restore(tmp_path / "two", "web-1", 2)["os"]) == digest(image)
    scribble(image, 10, 10)
    assert lab.sync()["bytes_changed"] == 10 * 4096


def test_a_schedule_runs_until_it_is_stopped(lab: Lab, tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(random.Random(11).randbytes(4_000_000))
    lab.machine("web-1", {"os": image})
    lab.machine("broken", {"os": tmp_path / "nowhere.raw"})
    lab.serve()
    process = lab.popen("run", "-c", lab.sender)
    try:
        for _ in range(100):
            if lab.run("points", "web-1", "-c", lab.receiver, code=None).stdout.count("\n") > 3:
                break
        else:
            pytest.fail("no three points within the time")
    finally:
        process.terminate()
        _, log = process.communicate(timeout=30)
    assert process.returncode == 0, log
    assert "Traceback" not in log
    assert "nowhere.raw" in log
    status = {row["machine"]: row for row in lab.json("status", "-c", lab.sender)}
    assert status["web-1"]["point"] >= 3
    there = lab.json("status", "-c", lab.receiver)
    assert [(row["machine"], row["owner"]) for row in there] == [("web-1", "hv-1")]


def test_two_primaries_with_a_machine_of_one_name(lab: Lab, tmp_path: Path) -> None:
    lab.run("pki", "issue", tmp_path / "pki", "hv-2")
    image = tmp_path / "disk.raw"
    image.write_bytes(b"first" * 100_000)
    lab.machine("web-1", {"os": image})
    lab.serve()
    lab.sync()
    image.write_bytes(b"other" * 100_000)
    second = lab.write_sender("second.toml", "hv-2", state="state-2/", keys="keys-2/")
    lab.json("sync", "web-1", "-c", second)
    confused = lab.run("points", "web-1", "-c", lab.receiver, code=3)
    assert "hv-1/web-1" in confused.stderr
    assert "hv-2/web-1" in confused.stderr
    files = lab.restore(tmp_path / "out", "hv-2/web-1")
    assert files["os"].read_bytes()[:5] == b"other"
    (row,) = [r for r in lab.json("status", "-c", lab.receiver) if r["owner"] == "hv-1"]
    files = lab.restore(tmp_path / "out-1", row["replica_id"])
    assert files["os"].read_bytes()[:5] == b"first"


def test_freeze_may_make_a_snapshot_and_name_it(lab: Lab, tmp_path: Path) -> None:
    """The image itself is written all the time; only what freeze copied is read, and thaw always runs."""
    image, log = tmp_path / "disk.raw", tmp_path / "hooks"
    image.write_bytes(random.Random(12).randbytes(1_000_000))
    lab.machine("web-1", {"os": image}, freeze=f"echo freeze >> {log}", thaw=f"echo thaw >> {log}")
    lab.serve()
    lab.sync()
    lab.sync()
    assert log.read_text().split() == ["freeze", "thaw"] * 2
    lab.machine("web-1", {"os": image}, freeze=f"echo freeze >> {log}; exit 1", thaw=f"echo thaw >> {log}")
    failed = lab.run("sync", "web-1", "-c", lab.sender, code=5)
    assert "freezing machine 'web-1' failed" in failed.stderr
    assert log.read_text().split()[-1] == "thaw"
    assert [p["point"] for p in lab.points()] == [1, 2]


def test_json_is_the_only_thing_on_standard_output(lab: Lab, tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(b"x" * 100_000)
    lab.machine("web-1", {"os": image})
    lab.machine("db-1", {"os": tmp_path / "nowhere.raw"})
    lab.serve()
    done = lab.run("sync", "--json", "-c", lab.sender, code=4)
    good, bad = json.loads(done.stdout)
    assert set(good) == {
        "machine", "point", "frozen_at", "bytes_scanned", "bytes_changed", "bytes_wire", "seconds", "roots",
        "mode", "parts", "bytes_differing", "bytes_repaired", "notices",
    }  # fmt: skip
    assert bad["machine"] == "db-1"
    assert bad["error"]["exit_code"] == 4
    assert "nowhere.raw" in bad["error"]["message"]
    assert done.stderr.startswith("replica: ")
    assert done.stderr.count("\n") == 1
    (point,) = lab.points()
    assert set(point) == {
        "point", "frozen_at", "consistency", "bytes", "roots", "restorable", "committed_at", "kept", "locked_until",
        "reason", "receipt", "lost", "notes",
    }  # fmt: skip
    assert point["frozen_at"] == good["frozen_at"]
    assert point["frozen_at"].endswith("Z")
    assert list((tmp_path / "keys").iterdir())


def test_ctrl_c_ends_a_sync_in_order(lab: Lab, tmp_path: Path) -> None:
    """The line is dead and the sync waits for it; the machine's thaw has run, and the next sync succeeds."""
    image, log = tmp_path / "disk.raw", tmp_path / "hooks"
    image.write_bytes(random.Random(13).randbytes(20_000_000))
    lab.serve()
    with Relay(lab.port) as relay:
        lab.connect_port = relay.port
        lab.machine("web-1", {"os": image}, freeze=f"echo freeze >> {log}", thaw=f"echo thaw >> {log}")
        assert lab.sync()["point"] == 1
        assert log.read_text().split() == ["freeze", "thaw"], "a first copy is frozen for its last delta only"
        log.unlink()
        image.write_bytes(random.Random(14).randbytes(20_000_000))
        relay.cut_after(3_000_000)
        process = lab.popen("sync", "web-1", "--json", "-c", lab.sender)
        while relay.cuts == 0 and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.5)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert process.returncode == 130, err
        assert time.monotonic() - started < 10
        assert err.count("\n") == 1
        assert [(e["machine"], e["error"]["code"]) for e in json.loads(out)] == [("web-1", "busy")]
        assert "interrupted" in err
        assert log.read_text().split() == ["freeze", "thaw"]
        relay.cut_after(None)
        assert lab.sync()["point"] == 2
