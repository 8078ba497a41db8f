"""The corpus of the fuzzers (`tools/fuzz.py`), read again: every case that covers something, and every case found."""

import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz import reading
from tests.fuzz.mutate import mutated
from tests.fuzz.reading import Finding, Room, read_case
from tests.fuzz.seeds import room_cases, seeds
from tests.fuzz.sparse import Case, Sparse
from tests.fuzz.structures import STRUCTURES

CORPUS = Path(__file__).parent / "corpus"


@pytest.fixture(params=["vhd", "vhdx"])
def room(request: pytest.FixtureRequest, tmp_path: Path) -> Room:
    made = Room(tmp_path, request.param)
    made.furnish(*room_cases(request.param))
    return made


def kept(format: str) -> Iterator[tuple[str, Case]]:
    """What is no case any more is passed over, as by the fuzzer."""
    with zipfile.ZipFile(CORPUS / f"{format}.zip") as packed:
        inputs = {name: packed.read(name) for name in packed.namelist()}
    inputs |= {path.name: path.read_bytes() for path in sorted((CORPUS / "found").glob(f"{format}-*"))}
    for name, data in inputs.items():
        try:
            yield name, Case.decode(data)
        except ValueError:
            continue


def test_everything_found_so_far(room: Room) -> None:
    told = {}
    for name, case in kept(room.format):
        told[name] = read_case(room, case)
    assert len(told) > 50
    assert "read" in told.values(), "some can be read whole"
    assert len(set(told.values())) > 30, "and others fail in many ways"


def test_the_seeds_are_what_they_are_meant_to_be(room: Room) -> None:
    """Images that can be read, and parents that are not permitted."""
    told = [read_case(room, case) for case in seeds(room.format)]
    assert told.count("read") >= len(told) // 2
    assert sum("secret" in text and "is not in" in text for text in told) == 2


def test_mutations_have_checksums_that_fit(room: Room) -> None:
    """Most get past the checksums, so that what is behind them is reached."""
    told = []
    for number, case in enumerate(seeds(room.format)):
        for seed in range(10):
            data = mutated(case.encode(), 1 << 16, 100 * number + seed, room.format, lambda data, _: data[::-1])
            told.append(read_case(room, Case.decode(data)).replace(str(room.root), ""))
    assert sum("its checksum does not fit" in text for text in told) < len(told) // 10
    assert len(set(told)) > 20


def test_the_encoding_keeps_a_case() -> None:
    case = next(iter(seeds("vhdx")))
    again = Case.decode(case.encode())
    assert again.files[0].size == case.files[0].size
    assert again.files[0].read(0, 5 << 20) == case.files[0].read(0, 5 << 20)
    file = Sparse(100, {10: b"abcdefgh"})
    file.write(12, b"\0\0XY")
    assert file.read(8, 12) == b"\0\0ab\0\0XYgh\0\0"
    for cut in (b"", b"\1", case.encode()[:-1], bytes([9]) + case.encode()[1:]):
        with pytest.raises(ValueError):
            Case.decode(cut)


def test_what_a_reader_must_not_do_is_found(room: Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness itself: each kind of misbehaviour is noticed."""
    case = next(iter(seeds(room.format)))
    secret = tmp_path / "outside" / f"secret.{room.format}"

    def misbehave(how: str) -> str:
        if how == "opens":
            secret.read_bytes()
        elif how == "allocates":
            bytearray(20 * reading.LIMIT_BYTES)  # more than the heap of a long run may have to spare
        elif how == "loops":
            stop = time.thread_time() + 0.2
            while time.thread_time() < stop:
                pass
        return "read"

    monkeypatch.setattr(reading, "LIMIT_SECONDS", 0.1)
    for how, words in {"opens": "were opened", "allocates": "of memory", "loops": "seconds were taken"}.items():
        monkeypatch.setattr(reading, "_read", lambda _, how=how: misbehave(how))
        with pytest.raises(Finding, match=words):
            read_case(room, case)


def test_every_checksum_is_known_to_the_fixer(room: Room) -> None:
    """Fixing a sound image changes nothing in it."""
    for case in seeds(room.format):
        for file in case.files:
            before = file.read(0, 8 << 20)
            STRUCTURES[room.format].fix(file)
            assert file.read(0, 8 << 20) == before
