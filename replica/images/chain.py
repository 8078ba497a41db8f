"""Chains: a differencing image, its parent, the parent's parent, down to an image that is whole.

Who its parent is an image says itself: paths as the program that made it saw
them, and an id. The paths are an untrusted tenant's words, so they choose among
files that the operator permitted and lead nowhere else:

- permitted are regular files in the image's own folder, in the folders given
  as `folders`, and in folders below those. A path that leads out of them, by
  `..`, by being absolute or by a symbolic link, is not even looked at;
- a file counts as the parent only if it has the id that the child names;
- a file that is in the chain already is a loop.

Tried are, in this order: each path as the child names it, from the child's
folder; its last part, in the child's folder and in each permitted one (images
that moved to another host keep their names), unless nothing would show which one it is (`exact`).

    layers = open_chain(fs, path, open_layer)     # the image first, its last ancestor at the end
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from replica.durable import FileSystem
from replica.errors import ImageError, ReplicaError
from replica.images.source import Source, image_errors

MAX_DEPTH = 256
"""Files in a chain at most; each is an open file. Hypervisors make 50 or fewer."""
MAX_NAMES = 16
"""Paths of one parent that are tried at most."""
_MERGE = "or merge it with its parents in the hypervisor (delete the snapshot)"

L = TypeVar("L", bound="ChainLayer")


@dataclass(frozen=True)
class Parent(Generic[L]):
    """Whom a differencing image needs."""

    names: Sequence[str]
    """Paths as the image has them, the most telling first; of Windows (`..\\base.vhd`) or of a Unix."""
    misfit: Callable[[L], str]
    """What keeps a layer from being this parent (`has the id …, not …`); empty when it is the one."""
    exact: bool = False
    """Only at the paths that the child names: nothing would show that a file of that name elsewhere is the one."""


class ChainLayer(Protocol):
    """One file of a chain, opened without its parents."""

    @property
    def source(self) -> Source: ...

    @property
    def parent(self: L) -> Parent[L] | None:
        """None: it is whole."""
        ...


def open_chain(fs: FileSystem, path: Path, open_layer: Callable[[Source], L], folders: Sequence[Path] = ()) -> list[L]:
    """The image and its ancestors, all open; the caller closes `layer.source` of each.

    `open_layer` reads one file's structures, and raises ImageError; it need not close. ImageError also where a
    parent is missing, not permitted or another one, and for a loop. Nothing is left open then.
    """
    permitted = permitted_folders(path, folders)
    layers: list[L] = []
    try:
        layers.append(_open(Source.open(fs, path), open_layer))
        while (parent := layers[-1].parent) is not None:
            if len(layers) == MAX_DEPTH:
                raise ImageError(f"image {path} has more than {MAX_DEPTH - 1} parents", hint="merge its snapshots")
            layers.append(_find(fs, layers, parent, permitted, open_layer))
    except BaseException:
        close_all(layers)
        raise
    return layers


def close_all(layers: Sequence[L]) -> None:
    """Close every layer's file. Idempotent."""
    for layer in layers:
        layer.source.close()


def permitted_folders(path: Path, folders: Sequence[Path]) -> tuple[Path, ...]:
    """The folders that parents of the image may lie in, without symbolic links in them."""
    real = Path(os.path.realpath(path))
    own = Path(os.path.realpath(path.parent))
    return tuple(dict.fromkeys((real.parent, own, *(Path(os.path.realpath(folder)) for folder in folders))))


def candidates(child: Path, names: Sequence[str], permitted: Sequence[Path], *, exact: bool = False) -> Iterator[Path]:
    """Where the parent may be: lexically inside what is permitted, each place once, the most likely first."""
    home = Path(os.path.realpath(child)).parent
    names = [name for name in names if name and "\0" not in name][:MAX_NAMES]
    paths = names if exact else [name.replace("\\", "/") for name in names]
    tries = [home / path for path in paths]
    tries += (
        []
        if exact
        else [folder / path.rstrip("/").rpartition("/")[2] for path in paths for folder in (home, *permitted)]
    )
    for place in dict.fromkeys(Path(os.path.normpath(place)) for place in tries):
        if _inside(place, permitted) and _can_be(place):
            yield place


def _inside(place: Path, folders: Sequence[Path]) -> bool:
    return any(folder in place.parents for folder in folders)


def _can_be(place: Path) -> bool:
    """Whether Linux has names and paths of that length."""
    return max(map(len, map(os.fsencode, place.parts))) <= 255 and len(os.fsencode(place)) < 4096


def _find(
    fs: FileSystem,
    layers: Sequence[L],
    parent: Parent[L],
    permitted: Sequence[Path],
    open_layer: Callable[[Source], L],
) -> L:
    """The parent of the last layer."""
    child = layers[-1].source.path
    known = {layer.source.file[1:] for layer in layers}
    problems: list[str] = []
    for place in candidates(child, parent.names, permitted, exact=parent.exact):
        real = Path(os.path.realpath(place))
        if not _inside(real, permitted) or not _is_file(fs, real):
            continue
        source = Source.open(fs, real)
        if Path(os.path.realpath(real)) != real or source.file[1:] in known:
            source.close()
            problems.append(f"{place} is part of the chain already")
            continue
        try:
            layer = _open(source, open_layer)
        except ReplicaError as error:
            problems.append(error.message)
            continue
        if not (misfit := parent.misfit(layer)):
            return layer
        source.close()
        problems.append(f"{place} {misfit}")
    named = next(filter(None, parent.names), "without a name")
    if problems:
        raise ImageError(
            f"image {child} is a differencing image whose parent ({named}) cannot be used: {'; '.join(problems)}",
            hint=f"put the parent that belongs to it there, {_MERGE}",
        )
    raise ImageError(
        f"image {child} is a differencing image whose parent ({named}) is not in {', '.join(map(str, permitted))}",
        hint=f"put the parent beside it, name its folder with `parents`, {_MERGE}",
    )


def _open(source: Source, open_layer: Callable[[Source], L]) -> L:
    try:
        return open_layer(source)
    except BaseException:
        source.close()
        raise


def _is_file(fs: FileSystem, path: Path) -> bool:
    with image_errors(path):
        return fs.exists(path) and stat.S_ISREG(fs.stat(path).st_mode)
