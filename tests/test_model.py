"""model: a value that exists is a value that is valid, however it came to be."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import msgspec
import pytest

from replica import errors
from replica.model import (
    EMPTY_DELTA_ID,
    MAX_DISK_BYTES,
    MAX_DISKS,
    Consistency,
    DeltaId,
    Disk,
    DiskId,
    DiskState,
    Epoch,
    ReplicaId,
    State,
    check_name,
    random_id,
    rfc3339,
)

ROOT = bytes(range(32))


def disk(number: int = 1, **fields: Any) -> Disk:
    values: dict[str, Any] = {"id": DiskId(UUID(int=number)), "name": f"disk-{number}", "size_bytes": 1 << 30}
    return Disk(**(values | fields))


def state(*disks: Disk, **fields: Any) -> State:
    values: dict[str, Any] = {
        "replica_id": ReplicaId(UUID(int=7)),
        "delta_id": DeltaId(UUID(int=8)),
        "point": 3,
        "epoch": Epoch(1, UUID(int=9)),
        "frozen_at_ns": 1_790_000_000_123_456_789,
        "consistency": Consistency.CRASH,
        "disks": tuple(DiskState(d, ROOT) for d in disks),
    }
    return State(**(values | fields))


def test_a_state_returns_from_json() -> None:
    whole = state(disk(1), disk(2, sector_bytes=4096, grain_bytes=65536, leaf_bytes=1 << 20))
    assert msgspec.json.decode(msgspec.json.encode(whole), type=State) == whole
    with pytest.raises(AttributeError):
        whole.point = 4  # type: ignore[misc]
    assert len({whole, state(disk(1)), whole}) == 2


@pytest.mark.parametrize("name", ["os", "web-1", "Data_2 old.img", "ä", "a" * 128])
def test_names_that_are_allowed(name: str) -> None:
    assert check_name(name, "machine name") == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "a/b", "a\\b", "a\0b", "a\n", " a", "a ", "a" * 129, "ä" * 65, "a:b", "\u202ea"]
)
def test_names_that_would_be_no_file_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="machine name"):
        check_name(name, "machine name")
    with pytest.raises(ValueError, match="disk name"):
        disk(name=name)


@pytest.mark.parametrize(
    "fields",
    [
        {"size_bytes": -1},
        {"size_bytes": MAX_DISK_BYTES + 1},
        {"sector_bytes": 1024},
        {"grain_bytes": 256},
        {"grain_bytes": 4097},
        {"grain_bytes": 1 << 17, "leaf_bytes": 1 << 17},
        {"leaf_bytes": 2048},
        {"leaf_bytes": 3 * 4096},
        {"leaf_bytes": 2 << 20},
        {"grain_bytes": 512, "leaf_bytes": 512, "size_bytes": (512 << 32) + 1},
    ],
)
def test_impossible_disks_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"disk|sector|grain|leaf"):
        disk(**fields)


@pytest.mark.parametrize(
    ("size", "grains", "leaves"),
    [
        (0, 0, 0),
        (1, 1, 1),
        (4096, 1, 1),
        (4097, 2, 1),
        (16384, 4, 1),
        (16385, 5, 2),
        (MAX_DISK_BYTES, 1 << 34, 1 << 32),
    ],
)
def test_the_last_grain_and_leaf_may_be_short(size: int, grains: int, leaves: int) -> None:
    made = disk(size_bytes=size)
    assert (made.count_grains, made.count_leaves, made.grains_per_leaf) == (grains, leaves, 4)


@pytest.mark.parametrize("root", [b"", bytes(31), bytes(33)])
def test_a_root_has_32_bytes(root: bytes) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        DiskState(disk(), root)


def test_disks_are_sorted_once_each_and_not_too_many() -> None:
    state(*(disk(i) for i in range(MAX_DISKS)))
    for disks in ([disk(2), disk(1)], [disk(1), disk(1, name="other")], [disk(i) for i in range(MAX_DISKS + 1)]):
        with pytest.raises(ValueError, match="sorted by id"):
            state(*disks)
    with pytest.raises(ValueError, match="same name"):
        state(disk(1, name="os"), disk(2, name="os"))


@pytest.mark.parametrize("fields", [{"point": -1}, {"point": 1 << 48}, {"frozen_at_ns": -1}, {"frozen_at_ns": 1 << 63}])
def test_numbers_out_of_range_are_refused_also_when_decoded(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="out of range"):
        state(**fields)
    document = msgspec.json.decode(msgspec.json.encode(state())) | fields
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(msgspec.json.encode(document), type=State)


@pytest.mark.parametrize("counter", [-1, 1 << 63])
def test_an_epoch_counts_in_63_bits(counter: int) -> None:
    with pytest.raises(ValueError, match="epoch"):
        Epoch(counter, random_id())


def test_unknown_fields_are_refused() -> None:
    document = msgspec.json.decode(msgspec.json.encode(Epoch(1, random_id()))) | {"extra": 1}
    with pytest.raises(msgspec.ValidationError, match="extra"):
        msgspec.json.decode(msgspec.json.encode(document), type=Epoch)


def test_the_empty_state_is_empty() -> None:
    empty = State.empty(ReplicaId(random_id()), Epoch(0, random_id()))
    assert empty.is_empty
    assert (empty.delta_id, empty.point, empty.disks, empty.roots) == (EMPTY_DELTA_ID, 0, (), {})
    assert not state().is_empty


def test_a_state_finds_its_disks_and_shows_their_roots() -> None:
    whole = state(disk(1), disk(2))
    found = whole.disk(DiskId(UUID(int=2)))
    assert found is not None
    assert found.disk.name == "disk-2"
    assert whole.disk(DiskId(UUID(int=3))) is None
    assert whole.roots == {"disk-1": ROOT.hex(), "disk-2": ROOT.hex()}


@pytest.mark.parametrize(
    ("time_ns", "text"),
    [
        (0, "1970-01-01T00:00:00.000000Z"),
        (1_790_000_000_123_456_789, "2026-09-21T14:13:20.123456Z"),
        (999_999_999, "1970-01-01T00:00:00.999999Z"),
    ],
)
def test_times_are_rfc_3339_in_utc(time_ns: int, text: str) -> None:
    assert rfc3339(time_ns) == text


def test_random_ids_differ() -> None:
    assert len({random_id() for _ in range(1000)}) == 1000


def test_every_error_says_what_it_is() -> None:
    """Codes are the wire's names: one class each, and all of them complete."""
    assert errors.BY_CODE["internal"] is errors.ReplicaError
    for code, kind in errors.BY_CODE.items():
        assert kind.code == code
        assert 0 < kind.exit_code < 128
        assert kind.exit_code != 2, "2 is wrong usage"
        assert 400 <= kind.status < 600
    every = [kind for kind in errors._subclasses(errors.ReplicaError) if kind.__module__ == errors.__name__]
    assert len(every) == len(errors.BY_CODE), "two classes share a code"
    assert str(errors.ConfigError("it broke", hint="mend it")) == "it broke; mend it"
    assert str(errors.ConfigError("it broke")) == "it broke"
