"""Delta files on disk: written in one go, read at random, refused when not complete."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest

from replica.delta import (
    ChainReader,
    DataKey,
    DeltaFileReader,
    DeltaSealer,
    DeltaWriter,
    Keyring,
    MemoryDelta,
    MemoryKeys,
    Segment,
    SegmentEntry,
    Table,
    Trailer,
    diff,
    rows_of,
)
from replica.delta.manifest import encode_manifest
from replica.delta.seal import Kind
from replica.durable import FileSystem
from replica.errors import DamageError, FormatError, KeyMissingError, StorageError
from replica.model import DeltaId, Disk, DiskId, KeyId, random_id
from tests.laws.files import open_file
from tests.laws.machines import EPOCH, REPLICA, head_of

KEY = DataKey.generate()
DISK = Disk(DiskId(random_id()), "os", 20 << 20)
CONTENT = os.urandom(20 << 20)


@pytest.fixture
def keyring(fs: FileSystem, tmp_path: Path) -> Keyring:
    keyring = Keyring(fs, tmp_path / "keys")
    keyring.add(KEY)
    return keyring


@pytest.fixture(scope="module")
def delta() -> MemoryDelta:
    return diff(head_of({DISK: bytes(20 << 20)}, 0), head_of({DISK: CONTENT}, 1))


def write_file(fs: FileSystem, path: Path, delta: MemoryDelta) -> Path:
    with DeltaWriter(fs, path, KEY, REPLICA, delta.delta_id, EPOCH) as writer:
        for segment in delta.segments():
            writer.add(segment)
        writer.finish(delta.base, delta.result)
    assert writer.stored_bytes == path.stat().st_size
    return path


def test_reads_what_was_written(fs: FileSystem, tmp_path: Path, keyring: Keyring, delta: MemoryDelta) -> None:
    path = write_file(fs, tmp_path / "delta", delta)
    with DeltaFileReader(fs.open(path), keyring) as reader:
        assert len(reader) == 5
        assert reader.stored_bytes == path.stat().st_size
        assert MemoryDelta.of(reader) == delta
        seen: list[tuple[int, int]] = []
        reader.verify(lambda done, total: seen.append((done, total)))
        assert len(seen) == 5
        assert list(reader.overlapping(0, 0, 1)) == [0]
        assert list(reader.overlapping(0, 1023, 1025)) == [0, 1]
        assert list(reader.overlapping(0, 5000, 5120)) == [4]
        assert list(reader.overlapping(0, 5120, 6000)) == list(reader.overlapping(1, 0, 9)) == []


def test_nothing_of_the_content_can_be_seen(fs: FileSystem, tmp_path: Path) -> None:
    text = b"a secret that must not be read " * 4096
    disk = Disk(DiskId(random_id()), "secret-disk-name", len(text))
    made = diff(head_of({disk: bytes(len(text))}, 0), head_of({disk: text}, 1))
    data = write_file(fs, tmp_path / "delta", made).read_bytes()
    for word in (b"secret", b"must not", disk.id.bytes, str(disk.id).encode(), KEY.secret):
        assert word not in data


def test_an_unfinished_file_is_refused(fs: FileSystem, tmp_path: Path, keyring: Keyring, delta: MemoryDelta) -> None:
    path = tmp_path / "delta"
    with DeltaWriter(fs, path, KEY, REPLICA, delta.delta_id, EPOCH) as writer:
        for segment in delta.segments():
            writer.add(segment)
    with pytest.raises(FormatError, match="delta"):
        DeltaFileReader(fs.open(path), keyring)


def test_a_file_is_never_written_over(fs: FileSystem, tmp_path: Path, delta: MemoryDelta) -> None:
    path = write_file(fs, tmp_path / "delta", delta)
    with pytest.raises(StorageError):
        DeltaWriter(fs, path, KEY, REPLICA, delta.delta_id, EPOCH)


def test_a_missing_key_is_named(fs: FileSystem, tmp_path: Path, delta: MemoryDelta) -> None:
    path = write_file(fs, tmp_path / "delta", delta)
    with pytest.raises(KeyMissingError, match=str(KEY.id)):
        DeltaFileReader(fs.open(path), Keyring(fs, tmp_path / "none"))


def test_another_secret_under_the_id_is_noticed(fs: FileSystem, tmp_path: Path, delta: MemoryDelta) -> None:
    path = write_file(fs, tmp_path / "delta", delta)
    other = Keyring(fs, tmp_path / "other")
    other.add(DataKey(KeyId(KEY.id), os.urandom(32)))
    with pytest.raises(KeyMissingError):
        DeltaFileReader(fs.open(path), other)


def test_damage_names_the_file_and_segment(
    fs: FileSystem, tmp_path: Path, keyring: Keyring, delta: MemoryDelta
) -> None:
    path = write_file(fs, tmp_path / "delta", delta)
    with DeltaFileReader(fs.open(path), keyring) as reader:
        entry = reader.manifest.entry(3)
        with fs.open(path, write=True) as file:
            file.write(entry.offset + entry.length - 1, bytes([file.read(entry.offset + entry.length - 1, 1)[0] ^ 1]))
        for number in (0, 1, 2, 4):
            reader.segment(number)
        with pytest.raises(DamageError, match=r"segment 3 of .*delta"):
            reader.verify()


def test_a_random_read_opens_the_tables_once_and_one_chunk(
    fs: FileSystem, tmp_path: Path, keyring: Keyring, delta: MemoryDelta
) -> None:
    path = write_file(fs, tmp_path / "delta", delta)
    opened: list[tuple[int, int | None]] = []

    class Counted(DeltaFileReader):
        def table(self, number: int) -> Table:
            opened.append((number, None))
            return super().table(number)

        def chunk(self, table: Table, index: int) -> bytes:
            opened.append((table.number, index))
            return super().chunk(table, index)

        def segment(self, number: int) -> Segment:
            raise AssertionError

    def nothing_below(disk_id: DiskId, offset: int, buffer: memoryview) -> None:
        raise AssertionError

    with Counted(fs.open(path), keyring) as reader:
        chain = ChainReader(delta.base, [reader], nothing_below)
        for _ in range(2):
            buffer = bytearray(4096)
            chain.read_into(DISK.id, 9 << 20, buffer)
            assert buffer == CONTENT[9 << 20 : (9 << 20) + 4096]
        assert opened == [*((number, None) for number in range(len(reader))), (2, (1 << 20) // (32 << 10))]


def test_walking_a_file_needs_a_few_segments_of_memory(fs: FileSystem, tmp_path: Path, keyring: Keyring) -> None:
    path, count = tmp_path / "delta", 24
    disk = Disk(DISK.id, "os", count * (4 << 20))
    states = [head_of({disk: bytes(disk.size_bytes)}, i).state for i in (0, 1)]
    with DeltaWriter(fs, path, KEY, REPLICA, DeltaId(random_id()), EPOCH) as writer:
        for number in range(count):
            writer.add(Segment(0, rows_of([(number * 1024, 1024, 1)]), os.urandom(4 << 20)))
        writer.finish(*states)
    with DeltaFileReader(fs.open(path), keyring) as reader:
        tracemalloc.start()
        for _ in reader.segments():
            pass
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 48 << 20


def forged(delta: MemoryDelta, padding: bytes = b"", **changes: object) -> bytes:
    """A file by somebody with the key: the first segment alone, `padding` behind it, its entry changed."""
    sealer = DeltaSealer(KEY, REPLICA, delta.delta_id, EPOCH)
    sealed = sealer.seal(delta.parts[0])
    entry = SegmentEntry.of(sealed, 160)._replace(**changes)  # type: ignore[arg-type]
    if not padding:
        tail = sealer.tail([entry], delta.base, delta.result)
    else:
        plain = encode_manifest(delta.delta_id, delta.base, delta.result, [entry])
        manifest = sealer._sealer.seal(Kind.MANIFEST, 0, 0, plain, len(plain))
        tail = manifest + Trailer(160 + entry.length + len(padding), len(manifest)).raw
    return sealer.header + sealed.blob + padding + tail


@pytest.mark.parametrize(
    ("padding", "changes", "message"),
    [
        (b"", {"digest": bytes(32)}, "not the one its manifest names"),
        (b"", {"first": 1}, "something else than its manifest says"),
        (b"", {"last": 1000}, "something else than its manifest says"),
        (b"unaccounted", {}, "without gaps"),
    ],
)
def test_a_file_that_contradicts_its_manifest_is_refused(
    delta: MemoryDelta, padding: bytes, changes: dict[str, object], message: str
) -> None:
    """All of it sealed with the right key, and in the right place."""
    with (
        pytest.raises(FormatError, match=message),
        open_file(forged(delta, padding, **changes), MemoryKeys(KEY)) as reader,
    ):
        reader.verify()


def test_the_forgery_itself_is_sound(delta: MemoryDelta) -> None:
    with open_file(forged(delta), MemoryKeys(KEY)) as reader:
        reader.verify()
