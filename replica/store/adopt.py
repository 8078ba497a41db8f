"""Adopting existing images: an old copy or a restored backup becomes the head of a replica that is still empty.

    adopt_images(fs, directory, {"os": Path("os.vhd")})

Whatever copied the machine before, its bytes need not cross the wire again: the
next sync compares them with the source by the Merkle walk and ships what
differs, and that is the first point. Until then the head is a *partial* state:
what is in it was never proven to be one instant of the machine.

    images read once, copied thin into head/ under temporary names, trees computed       synced
    renamed                                                                              head/ synced
    state: head = the partial state

Until the state names them the replica is empty, and files in its head/ are
left-overs that the next start removes (`head.remove_leftovers`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from replica.durable import FileSystem
from replica.errors import BusyError, ConfigError, ConflictError
from replica.images import Image
from replica.images import open as open_image
from replica.images.copying import write_nonzero
from replica.images.flat import FlatImage
from replica.machine_files import FILES_DISK_NAME
from replica.merkle import FileNodes, MerkleTree, leaf_digests
from replica.model import (
    MAX_DISKS,
    Consistency,
    DeltaId,
    Disk,
    DiskId,
    DiskState,
    State,
    check_name,
    random_id,
)
from replica.progress import Progress, silent
from replica.store.head import remove_leftovers
from replica.store.layout import HeadFormat, Layout, StoreState, load_state, save_state
from replica.store.replica import ReplicaStore

WINDOW_BYTES = 4 << 20


def adopt_images(
    fs: FileSystem,
    directory: Path,
    images: Mapping[str, Path],
    progress: Progress = silent,
    *,
    parents: Sequence[Path] = (),
) -> State:
    """Make these images (disk name -> file) the head of the empty replica in `directory`; durable when this returns.

    `parents`: folders, besides an image's own, that parents of differencing images may lie in.

    ConfigError for names that no machine's disks can have, BusyError if a receiver has the replica open,
    ConflictError if it is not empty, ImageError for an image that cannot be read; the replica is as it was then.
    """
    _check_names(images)
    try:
        store = ReplicaStore.open(fs, directory)
    except BusyError as error:
        raise BusyError(error.message, hint="stop `replica serve`, adopt, and start it again") from error
    with ExitStack() as stack:
        stack.callback(store.close)
        if store.stopped is not None:
            raise store.stopped
        if not store.head.is_empty:
            raise ConflictError(
                f"the replica of machine {store.identity.machine!r} has a head already (point {store.head.point})",
                hint="only an empty one can adopt images; remove the replica, or let `replica resync` compare it",
            )
        if store.receiving is not None:
            store.discard(store.receiving)
        layout = Layout(directory)
        remove_leftovers(fs, layout)
        sources = {name: stack.enter_context(open_image(path, fs=fs, parents=parents)) for name, path in images.items()}
        total = sum(stop - start for image in sources.values() for start, stop in image.allocated(0, image.size_bytes))
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress(done, total)

        states = [
            _copy(fs, layout, store.identity.head_format, name, image, advance) for name, image in sources.items()
        ]
        fs.sync_directory(layout.head)
        head = State(
            store.identity.replica_id,
            DeltaId(random_id()),
            0,
            store.epoch,
            time.time_ns(),
            Consistency.CRASH,
            tuple(sorted(states, key=lambda state: state.disk.id.bytes)),
            partial=True,
        )
        fs.set_links(layout.head, {f"{s.disk.name}.img": f"{s.disk.id}.img" for s in states})
        before = load_state(fs, layout)
        save_state(fs, layout, StoreState(head, before.epoch, serial=before.serial + 1, marks=before.marks))
        return head


def _check_names(names: Collection[str]) -> None:
    """Before anything is copied: names become file names, and a state has so many disks."""
    if len(names) > MAX_DISKS:
        raise ConfigError(f"{len(names)} images; a machine has at most {MAX_DISKS} disks", hint="adopt fewer")
    for name in names:
        try:
            check_name(name, "disk name")
        except ValueError as error:
            raise ConfigError(str(error), hint="give the disk the name that it has at the primary") from error
        if name == FILES_DISK_NAME:
            raise ConfigError(f"disk name {name!r} is taken by the machine's files", hint="they are not adopted")


def _copy(
    fs: FileSystem,
    layout: Layout,
    head_format: HeadFormat,
    name: str,
    source: Image,
    advance: Callable[[int], None],
) -> DiskState:
    """One image into the head, under its final names and synced; the directory is not."""
    disk = Disk(DiskId(random_id()), check_name(name, "disk name"), source.size_bytes, source.sector_bytes)
    image_path, tree_path = layout.image(disk.id), layout.tree(disk.id)
    temporary = [path.with_name(f".{path.name}.tmp") for path in (image_path, tree_path)]
    with ExitStack() as stack:
        image = stack.enter_context(FlatImage.create(fs, temporary[0], head_format, disk.size_bytes, disk.id))
        file = stack.enter_context(fs.create(temporary[1]))
        update = MerkleTree(FileNodes(file), disk.leaf_bytes).update(write=True)
        reached = 0
        for start, stop in source.allocated(0, disk.size_bytes):
            first = max(reached, start - start % WINDOW_BYTES)
            for offset in range(first, stop, WINDOW_BYTES):
                length = min(WINDOW_BYTES, disk.size_bytes - offset)
                buffer = np.empty(length, np.uint8)
                source.read_into(offset, buffer.data)
                write_nonzero(image, offset, buffer)
                update.put(offset // disk.leaf_bytes, leaf_digests(buffer.data, offset // disk.leaf_bytes))
                reached = offset + WINDOW_BYTES
            advance(stop - start)
        root = update.root(disk.size_bytes)
        image.sync()
        file.sync()
    for path, final in zip(temporary, (image_path, tree_path), strict=True):
        fs.publish(path, final)
    return DiskState(disk, root)
