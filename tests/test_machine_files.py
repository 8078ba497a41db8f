"""The archive of a machine's files: exact, and strict about what it is given back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replica.errors import FormatError
from replica.machine_files import (
    FILES_DISK_BYTES,
    MAX_FILE_BYTES,
    MAX_FILES,
    MAX_FILES_BYTES,
    MAX_PATH_BYTES,
    check_path,
    decode,
    encode,
)

FILES = {"etc/libvirt/qemu/web-1.xml": b"<domain/>", "etc/empty": b"", "a b/ü.conf": bytes(range(256))}
part = st.text(st.characters(categories=("L", "N")), min_size=1, max_size=8)
files = st.dictionaries(st.lists(part, min_size=1, max_size=3).map("/".join), st.binary(max_size=50), max_size=6)


@given(files)
def test_what_is_packed_is_unpacked(found: dict[str, bytes]) -> None:
    try:
        archive = encode(found)
    except ValueError as error:
        assert "in a file of the same name" in str(error)
        return
    assert decode(archive + bytes(4096)) == found
    assert encode(dict(reversed(found.items()))) == archive


@given(st.integers(0, len(encode(FILES)) - 1), st.integers(1, 255))
def test_any_changed_byte_is_refused(at: int, mask: int) -> None:
    damaged = bytearray(encode(FILES))
    damaged[at] ^= mask
    with pytest.raises(FormatError):
        decode(bytes(damaged))


@pytest.mark.parametrize("cut", [0, 7, 23, 24, 27, 60])
def test_a_cut_archive_is_refused(cut: int) -> None:
    with pytest.raises(FormatError):
        decode(encode(FILES)[:cut])


def test_something_behind_the_archive_is_refused() -> None:
    with pytest.raises(FormatError, match="length"):
        decode(encode(FILES) + b"\0\1")


BAD = [
    "",
    "/etc/x",
    "../x",
    "a/../b",
    "a/./b",
    "a//b",
    "a/",
    "a\0b",
    "a\nb",
    "a\\b",
    "x" * 256,
    "a/" * 600 + "b",
    "\ud800",
]


@pytest.mark.parametrize("path", BAD)
def test_paths_that_lead_elsewhere_are_refused(path: str) -> None:
    with pytest.raises(ValueError):
        check_path(path)
    with pytest.raises(ValueError):
        encode({path: b""})


@pytest.mark.parametrize("path", [p for p in BAD if p.isascii()])
def test_a_sender_that_lies_about_a_path_is_refused(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from replica import machine_files

    monkeypatch.setattr(machine_files, "_check", lambda _files: None)
    archive = encode({path: b"evil"})
    monkeypatch.undo()
    with pytest.raises(FormatError):
        decode(archive)


def test_bounds() -> None:
    encode({"x": bytes(MAX_FILE_BYTES)})
    for bad in (
        {"x": bytes(MAX_FILE_BYTES + 1)},
        {str(n): b"" for n in range(MAX_FILES + 1)},
        {str(n): bytes(MAX_FILE_BYTES) for n in range(MAX_FILES_BYTES // MAX_FILE_BYTES + 1)},
        {"a": b"", "a/b": b""},
    ):
        with pytest.raises(ValueError):
            encode(bad)
    largest = {f"{n:03d}".ljust(250, "x") + "/y" * ((MAX_PATH_BYTES - 250) // 2): b"" for n in range(MAX_FILES)}
    contents = {str(n): bytes(MAX_FILE_BYTES) for n in range(8)}
    assert len(encode({**dict(list(largest.items())[:248]), **contents})) < FILES_DISK_BYTES
