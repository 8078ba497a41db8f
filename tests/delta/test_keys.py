"""The directory of data keys: private, durable, never overwritten."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from replica.delta import DataKey, Keyring
from replica.durable import FileSystem
from replica.errors import ConflictError, FormatError, KeyMissingError
from replica.model import KeyId, random_id


@pytest.fixture
def keyring(fs: FileSystem, tmp_path: Path) -> Keyring:
    return Keyring(fs, tmp_path / "keys")


def test_starts_empty(keyring: Keyring) -> None:
    assert keyring.newest is None
    assert keyring.ids == ()
    with pytest.raises(KeyMissingError):
        keyring.get(KeyId(random_id()))


def test_keeps_what_was_added(keyring: Keyring, fs: FileSystem) -> None:
    old, new = DataKey(KeyId(random_id()), bytes(32), 1), DataKey(KeyId(random_id()), bytes(32), 2)
    keyring.add(new)
    keyring.add(old)
    again = Keyring(fs, keyring.directory)
    assert again.ids == (old.id, new.id)
    assert again.newest == new
    assert again.get(old.id) == old


def test_is_private(keyring: Keyring) -> None:
    keyring.add(DataKey.generate())
    (file,) = keyring.directory.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(keyring.directory.stat().st_mode) == 0o700


def test_never_replaces_a_key(keyring: Keyring) -> None:
    key = DataKey.generate()
    keyring.add(key)
    keyring.add(key)
    with pytest.raises(ConflictError):
        keyring.add(DataKey(key.id, bytes(32)))
    assert keyring.get(key.id) == key


def test_names_a_damaged_key(keyring: Keyring) -> None:
    key = DataKey.generate()
    keyring.add(key)
    (file,) = keyring.directory.iterdir()
    file.write_bytes(file.read_bytes().replace(b"{", b"[", 1))
    with pytest.raises(FormatError, match=file.name):
        keyring.get(key.id)
    other = keyring.directory / f"{random_id()}.key"
    keyring.directory.joinpath(file.name).unlink()
    keyring.add(key)
    file.rename(other)
    with pytest.raises(FormatError, match="another key"):
        keyring.newest  # noqa: B018
