"""Which disk is which: the machine's disks as configured, and those that are known already.

A disk is known by its id, to both sides; a configuration knows it by its name
and its image. So every cycle matches the two, before anything is read:

    1. name and image are a known disk's                 it is that one
    2. `formerly` names a known disk                     it was renamed, and its image moved
    3. the image is a known disk's                       it was renamed (also two that swapped their names)
    4. the name is a known disk's                        its image moved
    5. neither                                           it is new: a random id

The whole configuration goes through one rule before the next, and every known
disk is given away once. What nobody took was removed. To guess wrong costs
bytes and never content: whatever id a disk is given, the scan ships what differs
from the state that the replica holds under that id.

Sizes, names and sector sizes are as the images say; grain and leaf stay, for no
delta can change them. Pure: no I/O. `measure` is what looks at the images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple
from uuid import UUID

import msgspec

from replica import images
from replica.durable import FileSystem
from replica.machine_files import FILES_DISK_BYTES, FILES_DISK_NAME
from replica.model import Disk, DiskId, State, random_id
from replica.primary.files import FilesImage
from replica.primary.spec import MachineSpec

UNKNOWN_DISK_ID = DiskId(UUID(int=0))
"""The id of a disk that is so far only an image."""


class Wanted(NamedTuple):
    """A disk of the configuration. `disk` has the size its image has now, and no id yet."""

    disk: Disk
    image: str = ""
    formerly: str | None = None


class Known(NamedTuple):
    """A disk that has an id. `image`: where it was read from last, if that is known."""

    disk: Disk
    image: str = ""


def measure(fs: FileSystem, machine: MachineSpec) -> tuple[Wanted, ...]:
    """The machine's disks as their images are now, and the one for its files.

    Raises ImageError, and what reading the files raises: better now than when the machine is frozen for them. Only what
    `freeze` may stop, that they are being written, is left to the instant.
    """
    found = []
    for spec in machine.disks:
        with images.open(spec.image, spec.format, fs=fs, parents=spec.parents) as image:
            disk = Disk(UNKNOWN_DISK_ID, spec.name, image.size_bytes, image.sector_bytes)
        found.append(Wanted(disk, str(spec.image), spec.formerly))
    if machine.files:
        FilesImage(fs, machine.files, running=machine.freeze is not None)
        found.append(Wanted(Disk(UNKNOWN_DISK_ID, FILES_DISK_NAME, FILES_DISK_BYTES)))
    return tuple(found)


def known_disks(disks: Sequence[Disk], image_paths: Sequence[str], head: State | None) -> tuple[Known, ...]:
    """The sender's own disks, and those of the replica's head that it does not know (any more)."""
    paths = image_paths if len(image_paths) == len(disks) else [""] * len(disks)
    own = [Known(disk, path) for disk, path in zip(disks, paths, strict=True)]
    ids = {disk.id for disk in disks}
    others = [] if head is None else [Known(entry.disk) for entry in head.disks if entry.disk.id not in ids]
    return (*own, *others)


def match_disks(
    wanted: Iterable[Wanted],
    known: Iterable[Known],
    new_id: Callable[[], DiskId] = lambda: DiskId(random_id()),
) -> tuple[tuple[Disk, ...], tuple[str, ...]]:
    """The machine's disks sorted by id, and the image of each, by the rules above."""
    open_wishes, left = list(wanted), list(known)
    taken: list[tuple[Disk, str]] = []
    for rule in (_same, _formerly, _same_image, _same_name):
        for wish in list(open_wishes):
            match = next((candidate for candidate in left if rule(wish, candidate)), None)
            if match is not None:
                left.remove(match)
                open_wishes.remove(wish)
                taken.append((_as_now(match.disk, wish.disk), wish.image))
    taken += [(msgspec.structs.replace(wish.disk, id=new_id()), wish.image) for wish in open_wishes]
    taken.sort(key=lambda item: item[0].id.bytes)
    return tuple(disk for disk, _ in taken), tuple(image for _, image in taken)


def files_disk(disks: Iterable[Disk]) -> DiskId | None:
    """The id of the disk with the machine's files, if there is one: its name is nobody else's."""
    return next((disk.id for disk in disks if disk.name == FILES_DISK_NAME), None)


def names_of(head: State) -> set[str]:
    """The names of the machine's disks in a state, without the one for its files."""
    return {entry.disk.name for entry in head.disks if entry.disk.id != head.files}


def _same(wish: Wanted, known: Known) -> bool:
    return _same_name(wish, known) and wish.image == known.image


def _formerly(wish: Wanted, known: Known) -> bool:
    return wish.formerly is not None and wish.formerly == known.disk.name and not _is_files(known)


def _same_image(wish: Wanted, known: Known) -> bool:
    return wish.image != "" and wish.image == known.image


def _same_name(wish: Wanted, known: Known) -> bool:
    return wish.disk.name == known.disk.name


def _is_files(known: Known) -> bool:
    return known.disk.name == FILES_DISK_NAME


def _as_now(known: Disk, now: Disk) -> Disk:
    return msgspec.structs.replace(known, name=now.name, size_bytes=now.size_bytes, sector_bytes=now.sector_bytes)
