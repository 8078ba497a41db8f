"""A server that lies: a clear error each time, in bounded time and memory, and no byte where none was asked for."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nbd_servers import STATUS, ScriptedServer, block_sizes, chunk, data_chunk, export_info, extents_chunk
from nbd_servers import option_reply as reply

from replica import images
from replica.errors import ImageError
from replica.images import nbd_client

MiB = 1 << 20


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[ScriptedServer]:
    with ScriptedServer(tmp_path) as made:
        yield made


@pytest.fixture(autouse=True)
def little_memory_and_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(nbd_client, "CONNECT_SECONDS", 2.0)
    monkeypatch.setattr(nbd_client.NbdConnection.__init__, "__kwdefaults__", {"answer_seconds": 2.0})
    began = time.monotonic()
    tracemalloc.start()
    yield
    assert tracemalloc.get_traced_memory()[1] < 32 * MiB
    tracemalloc.stop()
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("infos", "match"),
    [
        ([export_info(1 << 63)], r"more than .* \(64 TiB"),
        ([export_info((1 << 64) - 1)], "64 TiB"),
        ([block_sizes(1, MiB)], "does not tell the export's size"),
        ([b"", b"\0", export_info(512)[:-1]], "does not tell the export's size"),
        ([export_info(MiB), block_sizes(0, MiB)], "blocks of 0 bytes"),
        ([export_info(MiB), block_sizes(3, MiB)], "blocks of 3 bytes"),
        ([export_info(MiB), block_sizes(1 << 31, MiB)], "breaks the protocol: blocks"),
        ([export_info(MiB + 1), block_sizes(512, MiB)], "blocks of 512 bytes in an export of"),
        ([export_info(MiB), block_sizes(1, 0)], "requests of 0 bytes"),
        ([export_info(MiB)] * 100, "do not end"),
        ([bytes(65537)], "a reply to an option is none"),
    ],
)
def test_lies_about_the_export(scripted: ScriptedServer, infos: list[bytes], match: str) -> None:
    scripted.infos = tuple(infos)
    with pytest.raises(ImageError, match=match):
        images.open(scripted.uri)


@pytest.mark.parametrize(
    ("greeting", "option", "match"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", None, "no NBD server with the fixed newstyle"),
        (b"NBDMAGIC" + bytes.fromhex("00420281861253") + bytes(200), None, "no NBD server with the fixed newstyle"),
        (b"NBDM", None, "did not answer in time"),
        (ScriptedServer.greeting, bytes(20), "a reply to an option is none"),
        (ScriptedServer.greeting, reply(99, 1), "a reply to an option is none"),
        (ScriptedServer.greeting, struct.pack(">QIII", 0x3E889045565A9, 8, 3, 1 << 31), "a reply to an option is none"),
        (
            ScriptedServer.greeting,
            reply(8, (1 << 31) + 5, b"\x1b[2Jno\nway"),
            r"it demands TLS \(\s?\[2Jno way\).*nbds",
        ),
    ],
)
def test_handshakes_that_are_none(scripted: ScriptedServer, greeting: bytes, option: bytes | None, match: str) -> None:
    scripted.greeting, scripted.option_reply = greeting, option
    with pytest.raises(ImageError, match=match):
        images.open(scripted.uri)


def whole(cookie: int, offset: int, length: int) -> bytes:
    return data_chunk(cookie, offset, b"x" * length)


LIES = {
    "of another request": lambda c, o, n: whole(c + 1, o, n),
    "beside": lambda c, o, n: data_chunk(c, o + 4096, b"x" * n),
    "before": lambda c, o, n: data_chunk(c, o - 1, b"x" * n),
    "huge": lambda c, o, n: struct.pack(">IHHQI", 0x668E33EF, 1, 1, c, 0xFFFFFFFF),
    "half": lambda c, o, n: data_chunk(c, o, b"x" * (n // 2)),
    "twice the same half": lambda c, o, n: data_chunk(c, o, b"x" * (n // 2), 0) + data_chunk(c, o, b"x" * (n // 2)),
    "more than all": lambda c, o, n: data_chunk(c, o, b"x" * n, 0) + data_chunk(c, o, b"x"),
    "nothing": lambda c, o, n: chunk(c, 0),
    "nothing, without end": lambda c, o, n: chunk(c, 0, done=0),
    "bytes, without end": lambda c, o, n: b"".join(data_chunk(c, o + i, b"x", 0) for i in range(4096)),
    "a hole too far": lambda c, o, n: chunk(c, 2, struct.pack(">QI", o, n + 1)),
    "a hole of nothing": lambda c, o, n: chunk(c, 2, struct.pack(">QI", o, 0)),
    "extents": lambda c, o, n: extents_chunk(c, (n, 0)),
    "an unknown kind": lambda c, o, n: chunk(c, 77, bytes(8)),
    "an error too long": lambda c, o, n: struct.pack(">IHHQI", 0x668E33EF, 1, 32769, c, 1 << 30),
    "an error too short": lambda c, o, n: chunk(c, 32769, b"\0"),
    "noise": lambda c, o, n: os.urandom(64),
    "a simple reply": lambda c, o, n: struct.pack(">IIQ", 0x67446698, 0, c) + bytes(n),
    "silence": lambda c, o, n: b"",
    "an end": lambda c, o, n: None,
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_lies_in_a_read(scripted: ScriptedServer, lie) -> None:  # type: ignore[no-untyped-def]
    scripted.answer = lambda command, cookie, offset, length: lie(cookie, offset, length)
    memory = bytearray(b"." * 3 * 65536)
    with images.open(scripted.uri) as image:
        with pytest.raises(ImageError, match="breaks the protocol|in time|closed the connection"):
            image.read_into(65536, memoryview(memory)[65536:131072])
        assert memory[:65536] == memory[131072:] == b"." * 65536
        with pytest.raises(ImageError, match="the connection broke before"):
            image.read_into(0, bytearray(512))


def test_errors_in_due_form_leave_the_connection(scripted: ScriptedServer) -> None:
    def answer(command: int, cookie: int, offset: int, length: int) -> bytes:
        if offset:
            return data_chunk(cookie, offset, b"x" * length)
        return chunk(cookie, 32770, struct.pack(">IH", 5, 3) + b"bad" + bytes(8), 0) + chunk(cookie, 0)

    scripted.answer = answer
    buffer = bytearray(512)
    with images.open(scripted.uri) as image:
        with pytest.raises(ImageError, match=r"failed to read export 'x' at .*byte 0: Input/output error \(bad\)"):
            image.read_into(0, buffer)
        image.read_into(512, buffer)
        assert buffer == b"x" * 512


STATUS_LIES = {
    "of another context": lambda c, n: extents_chunk(c, (n, 0), context=8),
    "none": lambda c, n: extents_chunk(c),
    "of no length": lambda c, n: extents_chunk(c, (0, 0), (n, 0)),
    "cut": lambda c, n: chunk(c, 5, bytes(17)),
    "huge": lambda c, n: struct.pack(">IHHQI", 0x668E33EF, 1, 5, c, 0xFFFFFFFC),
    "twice": lambda c, n: chunk(c, 5, struct.pack(">III", 7, n, 0), 0) + extents_chunk(c, (n, 0)),
    "nothing": lambda c, n: chunk(c, 0),
    "data": lambda c, n: data_chunk(c, 0, bytes(n)),
}


@pytest.mark.parametrize("lie", STATUS_LIES.values(), ids=STATUS_LIES)
def test_lies_about_extents(scripted: ScriptedServer, lie) -> None:  # type: ignore[no-untyped-def]
    scripted.answer = lambda command, cookie, offset, length: lie(cookie, length)
    with images.open(scripted.uri) as image, pytest.raises(ImageError, match="breaks the protocol"):
        list(image.allocated(0, MiB))


def test_extents_of_one_byte_count_as_data_and_are_not_asked_for_ever(scripted: ScriptedServer) -> None:
    asked: list[int] = []

    def answer(command: int, cookie: int, offset: int, length: int) -> bytes:
        asked.append(offset)
        return extents_chunk(cookie, (1, 3))

    scripted.size, scripted.answer = 64 * MiB, answer
    with images.open(scripted.uri) as image:
        assert list(image.allocated(0, 64 * MiB)) == [(0, 64 * MiB)]
    assert len(asked) == 64


@given(st.lists(st.tuples(st.integers(1, 400), st.integers(0, 3)), min_size=1, max_size=30), st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_extents_become_ranges(tmp_path_factory: pytest.TempPathFactory, extents: list, data: st.DataObject) -> None:  # type: ignore[type-arg]
    lengths = [(length << 14, flags) for length, flags in extents]
    size = sum(length for length, _ in lengths)
    zero = b"".join((b"\1" if flags & 2 else b"\0") * (length >> 14) for length, flags in lengths)
    start, stop = sorted((data.draw(st.integers(0, size)), data.draw(st.integers(0, size))))

    def answer(command: int, cookie: int, offset: int, length: int) -> bytes:
        assert command == STATUS
        place, rest = 0, []
        for count, flags in lengths:
            if place + count > offset:
                rest.append((place + count - max(place, offset), flags))
            place += count
        return extents_chunk(cookie, *rest)

    with ScriptedServer(tmp_path_factory.mktemp("s"), answer) as server:
        server.size = size
        with images.open(server.uri) as image:
            found = list(image.allocated(start, stop))
    expected = [n for n in range(start, stop) if not zero[n >> 14]] if stop - start < 4096 else None
    assert all(start <= low < high <= stop for low, high in found)
    assert all(before[1] < after[0] for before, after in pairwise(found))
    if expected is not None:
        assert [n for low, high in found for n in range(low, high)] == expected
    covered = bytearray(zero)
    for low, high in found:
        for cell in range(low >> 14, (high + 16383) >> 14):
            covered[cell] = 2
    for cell in range((start + 16383) >> 14, stop >> 14):
        assert covered[cell] != 0, "data that is left out"
