"""A point's machine files: taken out of the disk that holds them, and written back as files.

The archive is read whole (at most 16 MiB), its Merkle root compared with the
point's, and unpacked strictly (`machine_files`): its paths came from a sender
and are no more trusted than that. All files are written and synced in a new
directory under a temporary name, private to their owner; then it gets its name,
`files/`, in one step. Nothing that exists is written to or followed.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from replica.durable import FileSystem
from replica.errors import DamageError, StorageError, TargetExistsError
from replica.machine_files import FILES_DISK_BYTES, decode
from replica.merkle import MemoryNodes, MerkleTree, leaf_digests
from replica.store.reader import PointReader

DIRECTORY = "files"
_WITHOUT = "`restore --allow-lost` restores the disks without them"


def read_files(point: PointReader) -> dict[str, bytes]:
    """Path -> content of the machine's files at this point; empty if it has none. DamageError, StorageError."""
    state = point.state.disk(point.state.files) if point.state.files is not None else None
    if state is None:
        return {}
    disk = state.disk
    if disk.size_bytes > FILES_DISK_BYTES:
        raise DamageError(
            f"the machine's files are on a disk of {disk.size_bytes} bytes, which none has", hint=_WITHOUT
        )
    data = bytearray(disk.size_bytes)
    point.read_into(disk.id, 0, data)
    tree = MerkleTree(MemoryNodes(), disk.leaf_bytes).update(write=False)
    tree.put(0, leaf_digests(data, 0, disk.leaf_bytes))
    if tree.root(disk.size_bytes) != state.root:
        raise DamageError(
            "the machine's files do not have the Merkle root that the point was committed with", hint=_WITHOUT
        )
    return decode(bytes(data))


def prepare_files(fs: FileSystem, files: dict[str, bytes], target: Path, name: str = DIRECTORY) -> Path | None:
    """Write the files into a new directory in `target` under a temporary name; None if there are none.

    Raises TargetExistsError if `target` has that `name` already, StorageError (nothing is left behind).
    """
    if not files:
        return None
    if fs.is_taken(target / name):
        raise TargetExistsError(f"{target / name} already exists", hint="choose another directory or move it away")
    temporary = target / f".{DIRECTORY}.{os.urandom(4).hex()}.partial"
    try:
        fs.make_directory(temporary, private=True)
        for path, content in files.items():
            place = temporary / path
            fs.make_directory(place.parent, private=True)
            with fs.create(place, private=True) as file:
                file.write(0, content)
                file.sync()
            fs.sync_directory(place.parent)
    except BaseException:
        discard_files(fs, temporary)
        raise
    return temporary


def publish_files(fs: FileSystem, temporary: Path | None, name: str = DIRECTORY) -> None:
    """Give the directory its name, another one than usual for one of several points."""
    if temporary is not None:
        fs.publish(temporary, temporary.parent / name)


def discard_files(fs: FileSystem, temporary: Path | None) -> None:
    """Remove what `prepare_files` wrote; what cannot be removed is left under its temporary name."""
    if temporary is not None:
        with suppress(StorageError):
            if fs.exists(temporary):
                fs.remove_tree(temporary)
