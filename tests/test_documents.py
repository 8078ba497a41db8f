"""documents: a state file is what was saved or it is refused."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from replica import documents
from replica.durable import FileSystem
from replica.errors import FormatError, StorageError
from replica.model import Epoch, Frozen, random_id


class Note(Frozen, frozen=True):
    text: str
    number: int = 0
    epoch: Epoch | None = None


notes = st.builds(Note, st.text(), st.integers(-(1 << 62), 1 << 62), st.builds(Epoch, st.integers(0, 9), st.uuids()))


@given(note=notes)
def test_what_is_encoded_returns(note: Note) -> None:
    data = documents.encode(note)
    assert documents.decode(data, Note, "note") == note
    body, check = data.rstrip(b"\n").rsplit(b"\n", 1)
    assert msgspec.json.decode(body)["text"] == note.text
    assert check.decode() == xxhash.xxh3_64_hexdigest(body)


def test_any_flipped_bit_and_any_cut_is_refused() -> None:
    data = documents.encode(Note("text", 5))
    damaged = [data + b"\n", b"\n" + data, *(data[:length] for length in range(len(data)))]
    for place in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        damaged.append(bytes(flipped))
    for found in damaged:
        with pytest.raises(FormatError, match="machine.json is damaged"):
            documents.decode(found, Note, "machine.json")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"number":1}',
        b'{"text":1}',
        b'{"text":"a","other":1}',
        b'{"text":"a","epoch":{"counter":-1,"holder":"00000000-0000-0000-0000-000000000000"}}',
        b'{"text":"\xff"}',
    ],
)
def test_content_that_does_not_fit_the_type_is_refused(body: bytes) -> None:
    data = body + b"\n" + xxhash.xxh3_64_hexdigest(body).encode() + b"\n"
    with pytest.raises(FormatError, match="state is not valid"):
        documents.decode(data, Note, "state")


def test_saving_replaces_and_loading_names_the_file(fs: FileSystem, tmp_path: Path) -> None:
    path = tmp_path / "state"
    with pytest.raises(StorageError, match="state"):
        documents.load(fs, path, Note)
    for note in (Note("one"), Note("two", epoch=Epoch(3, random_id()))):
        documents.save(fs, path, note, private=True)
        assert documents.load(fs, path, Note) == note
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match="state is damaged"):
        documents.load(fs, path, Note)


def test_a_document_has_a_largest_size(fs: FileSystem, tmp_path: Path) -> None:
    path = tmp_path / "big"
    documents.save(fs, path, note := Note("x" * (documents.MAX_DOCUMENT_BYTES - 100)))
    with pytest.raises(StorageError, match="more than"):
        documents.save(fs, path, Note("x" * documents.MAX_DOCUMENT_BYTES))
    assert documents.load(fs, path, Note) == note, "what can be loaded was not replaced by what cannot"
    path.write_bytes(documents.encode(Note("x" * documents.MAX_DOCUMENT_BYTES)))
    with pytest.raises(FormatError, match="more than"):
        documents.load(fs, path, Note)
