"""Damage at the replica, told and repaired by the commands an operator has."""

from __future__ import annotations

from pathlib import Path

from lab import Lab

from tests.damage.damage_lab import flip

GiB, MiB = 1 << 30, 1 << 20


def test_a_flipped_sector_in_a_4_gib_head_is_found_and_repaired_for_under_a_mib(lab: Lab, tmp_path: Path) -> None:
    image = tmp_path / "os.raw"
    with image.open("wb") as file:
        file.truncate(4 * GiB)
        for at in range(0, 4 * GiB, 512 * MiB):
            file.seek(at + 12345)
            file.write(b"content" * 50000)
    lab.machine("web-1", {"os": image})
    lab.serve()
    lab.sync()
    (directory,) = lab.replica_directories()
    flip(directory / "head" / "os.img", 1536 * MiB + 12345 + 70000, 512)

    found = lab.json("verify", "web-1", "-c", lab.receiver, code=11)
    (mismatch,) = found["disks"]["os"]["mismatches"]
    assert mismatch["length"] <= 32 << 10
    (status,) = lab.json("status", "-c", lab.receiver)
    assert 1 <= status["damaged_leaves"] <= 2
    assert [point["restorable"] for point in lab.points()] == [False]

    entry = lab.sync()
    assert entry["bytes_wire"] < MiB
    assert lab.json("verify", "web-1", "-c", lab.receiver)["ok"]
    assert [point["restorable"] for point in lab.points()] == [True, True]
    with image.open("rb") as source, (directory / "head" / "os.img").open("rb") as head:
        for file in (source, head):
            file.seek(1536 * MiB)
        assert source.read(MiB) == head.read(MiB)
    assert lab.stop() == 0
