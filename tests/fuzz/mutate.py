"""Mutations that know what they change: a number, a piece, a copy of a structure, the size of a file.

After most of them every checksum is made to fit, so that what comes behind the checks is reached.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from tests.fuzz.sparse import MAX_FILE_BYTES, MAX_FILES, MAX_PIECES, Case, Sparse
from tests.fuzz.structures import STRUCTURES, Structure

Scramble = Callable[[bytes, int], bytes]
"""Some bytes changed anyhow, to so many at most: the fuzzing engine's own mutation, which knows what was compared."""

_POWERS = [1 << n for n in range(64)]
INTERESTING = sorted({n + d for n in (0, *_POWERS) for d in (-1, 0, 1) if n + d >= 0})


def mutated(data: bytes, max_size: int, seed: int, format: str, scramble: Scramble) -> bytes:
    """Another case. A pure function of its arguments, as far as `scramble` is one."""
    some, structure = random.Random(seed), STRUCTURES[format]
    try:
        case = Case.decode(data)
    except ValueError:
        return data
    for _ in range(some.choice((1, 1, 1, 2, 2, 3, 5))):
        number = some.randrange(len(case.files)) if some.random() < 0.3 else 0
        kinds = (_number, _number, _number, _number, _bytes, _bytes, _flip, _move, _twin, _size)
        some.choice(kinds)(some, structure, case.files[number], scramble)
    if some.random() < 0.05:
        _files(some, case)
    for file in case.files if some.random() < 0.95 else ():
        structure.fix(file)
    found = case.encode()
    fits = len(found) <= max_size and all(len(file.pieces) <= MAX_PIECES for file in case.files)
    return found if fits else data


def _number(some: random.Random, structure: Structure, file: Sparse, _: Scramble) -> None:
    sites = structure.sites(file)
    if not sites:
        return
    site = some.choice(sites)
    before = site.get(file)
    value = some.choice(
        (
            lambda: some.choice(INTERESTING),
            lambda: before + some.choice((-1, 1, -8, 8, -512, 512, -4096, 4096, -(1 << 20), 1 << 20)),
            lambda: before ^ 1 << some.randrange(8 * site.width),
            lambda: some.choice(sites).get(file),
            lambda: some.choice((file.size, file.size // 512, file.size >> 20 << 20, file.size - 512)),
            lambda: some.choice(list(file.pieces) or [0]),
            lambda: some.choice(list(file.pieces) or [0]) // 512,
            lambda: before << some.randrange(1, 8) if some.random() < 0.5 else before >> some.randrange(1, 8),
        )
    )()
    site.put(file, value)


def _bytes(some: random.Random, _: Structure, file: Sparse, scramble: Scramble) -> None:
    if file.pieces:
        at = some.choice(list(file.pieces))
        piece = file.pieces[at]
        first = some.randrange(len(piece))
        length = min(len(piece) - first, some.choice((1, 2, 4, 8, 16, 64, 256)))
        found = scramble(piece[first : first + length], length + 8)
        file.write(at + first, found)


def _flip(some: random.Random, _: Structure, file: Sparse, __: Scramble) -> None:
    if file.pieces:
        at = some.choice(list(file.pieces))
        bit = some.randrange(8 * len(file.pieces[at]))
        byte = file.pieces[at][bit // 8] ^ 1 << bit % 8
        file.write(at + bit // 8, bytes([byte]))


def _move(some: random.Random, _: Structure, file: Sparse, __: Scramble) -> None:
    """A piece, with what follows it, lies at another place, or at two."""
    if file.pieces:
        at = some.choice(list(file.pieces))
        data = file.read(at, some.choice((len(file.pieces[at]), 512, 4096)))
        if some.random() < 0.5:
            file.write(at, bytes(len(data)))
        step = some.choice((512, 4096, 1 << 16, 1 << 20)) * some.choice((-3, -2, -1, 1, 2, 3))
        target = some.choice((at + step, some.choice(list(file.pieces) or [0]), file.size))
        if target >= file.size:
            file.resize(min(target + len(data), MAX_FILE_BYTES))
        file.write(max(0, target), data)


def _twin(some: random.Random, structure: Structure, file: Sparse, _: Scramble) -> None:
    """Both copies of a structure say what one of them says."""
    one, other, length = some.choice(structure.twins(file))
    if some.random() < 0.5:
        one, other = other, one
    if one >= 0 and other >= 0:
        file.write(other, file.read(one, length))


def _size(some: random.Random, _: Structure, file: Sparse, __: Scramble) -> None:
    """The file is cut, or grows, with or without what stood at its end."""
    tail = file.read(max(0, file.size - 512), 512)
    step = some.choice((1, 511, 512, 4096, 1 << 20, 1 << 30)) * some.choice((-1, 1))
    size = some.choice((file.size + step, some.choice(INTERESTING), some.choice(list(file.pieces) or [0])))
    file.resize(max(0, min(size, MAX_FILE_BYTES)))
    if some.random() < 0.5 and file.size >= 512:
        file.write(file.size - 512, tail)


def _files(some: random.Random, case: Case) -> None:
    """A parent more, a parent less, or another order."""
    some.shuffle(case.files)
    if some.random() < 0.3 and len(case.files) > 1:
        case.files.pop()
    elif some.random() < 0.5 and len(case.files) < MAX_FILES:
        copied = some.choice(case.files)
        case.files.append(Sparse(copied.size, dict(copied.pieces)))
