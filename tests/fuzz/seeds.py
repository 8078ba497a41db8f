"""What a fuzzer begins with: small images of every kind, made from the specifications by the makers of tests/images."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import UUID

sys.path.insert(0, str(Path(__file__).parents[1] / "images"))

import vhd_maker
import vhdx_interrupted
import vhdx_maker
from vhd_maker import DIFFERENCING, Vhd
from vhdx_maker import MIB, Vhdx

from tests.fuzz.sparse import Case, Sparse

_FILL = b"\xee" * 64


def room_cases(format: str) -> tuple[Case, Case]:
    """The base in the permitted folder, and the one outside that is not to be read."""
    if format == "vhd":
        base = Vhd(40960, blocks={0: b"base", 3: b"more"}, unique_id=b"B" * 16)
        return _case(base.build()), _case(replace(base, unique_id=b"S" * 16).build())
    whole = Vhdx(4 * MIB, blocks={0: b"base", 3: b"more"})
    secret = replace(whole, headers=(vhdx_maker.header(1, data_write=UUID(int=5)),) * 2)
    return _case(whole.build()), _case(secret.build())


def seeds(format: str) -> Iterator[Case]:
    """The first corpus."""
    yield from _vhd_seeds() if format == "vhd" else _vhdx_seeds()


def _case(*files: bytes) -> Case:
    return Case([Sparse.of(data.replace(_FILL, bytes(64))) for data in files])


def _vhd_child(name: str, parent_id: bytes, **fields: object) -> Vhd:
    child = Vhd(40960, kind=DIFFERENCING, parent_id=parent_id, parent_name=name.encode("utf-16-be"))
    return replace(child, blocks={0: b"child", 2: b"two"}, bitmaps={0: b"\x80", 2: b"\x11\x00"}, **fields)  # type: ignore[arg-type]


def _vhd_seeds() -> Iterator[Case]:
    yield _case(b"fixed".ljust(8192, b"\0") + vhd_maker.footer(8192))
    yield _case(b"old".ljust(8192, b"\0") + vhd_maker.footer(8192)[:511])
    dynamic = Vhd(40960, blocks={3: b"three", 0: b"zero"})
    yield _case(dynamic.build())
    yield _case(replace(dynamic, block_bytes=512 << 4, gap=3, creator=b"qemu").build())
    yield _case(replace(dynamic, tail=b"", creator=b"vpc ").build())
    yield _case(replace(dynamic, size=2040 << 30, block_bytes=2 << 20, blocks={}, table={}).footer())
    own = _vhd_child("1.vhd", b"P" * 16)
    yield _case(own.build(), replace(dynamic, unique_id=b"P" * 16).build())
    middle = replace(_vhd_child("2.vhd", b"Q" * 16), unique_id=b"P" * 16)
    yield _case(own.build(), middle.build(), replace(dynamic, unique_id=b"Q" * 16).build())
    for parent in ("base.vhd", "../outside/secret.vhd", "link.vhd", "0.vhd", "../parents/base.vhd"):
        windows = parent.replace("/", "\\").encode("utf-16-le")
        locators = ((b"W2ru", windows), (b"W2ku", b"C\0:\0\\\0" + windows), (b"MacX", f"file://{parent}".encode()))
        for unique_id in (b"B" * 16, b"S" * 16):
            yield _case(_vhd_child(parent, unique_id, locators=locators).build())


def _vhdx_seeds() -> Iterator[Case]:
    small = Vhdx(4 * MIB, blocks={2: b"two", 0: b"zero"}, states={1: 2, 3: 3})
    yield _case(small.build())
    yield _case(replace(small, sector=4096, block_bytes=2 * MIB, blocks={1: b"one"}, states={}, flags=1).build())
    yield _case(replace(small, size=1 << 40, block_bytes=256 * MIB, blocks={}, states={}).build())
    child = Vhdx(
        4 * MIB, blocks={0: b"child", 2: b"two"}, present={0: {0, 5, 2047}}, parent=vhdx_maker.linked("1.vhdx")
    )
    yield _case(child.build(), small.build())
    identity = UUID(int=77)
    middle = replace(child, parent=vhdx_maker.linked("2.vhdx"))
    middle = replace(middle, headers=(vhdx_maker.header(1, data_write=identity),) * 2)
    yield _case(replace(child, parent=vhdx_maker.linked("1.vhdx", identity)).build(), middle.build(), small.build())
    for name in ("base.vhdx", "..\\outside\\secret.vhdx", "link.vhdx", "0.vhdx", "..\\parents\\base.vhdx"):
        for linkage in (vhdx_maker.DATA_WRITE, UUID(int=5)):
            pairs = vhdx_maker.linked(name, linkage) | {"absolute_win32_path": f"C:\\{name}", "volume_path": name}
            yield _case(replace(child, parent=pairs).build())
    for lag, first in ((1, 0), (3, 250), (4, 3)):
        crash = vhdx_interrupted.Interrupted(Vhdx(4 * MIB, states={3: 2}), lag=lag, first_sector=first)
        for change in (
            vhdx_interrupted.allocate(1, b"\xee"),
            vhdx_interrupted.state(2, 3),
            vhdx_interrupted.allocate(3, b"\xee"),
            vhdx_interrupted.grow(8 * MIB),
        ):
            crash.step(change)
            yield _case(bytes(crash.file))
            yield _case(crash.half_applied(lag))
