"""The head on disk: one flat image and one Merkle tree per disk.

Only a commit or its recovery writes here, under the replica's lock. Everything
a redo may repeat is idempotent: adding a disk starts it from nothing, resizing
sets a size, names are made anew.

Not thread-safe, but for `read_into` (positioned reads).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Self

from replica.durable import File, FileSystem
from replica.errors import DamageError
from replica.images.flat import FlatImage
from replica.merkle import FileNodes, MerkleTree, root_of_content
from replica.model import Disk, DiskId, State
from replica.store.layout import HeadFormat, Layout

if TYPE_CHECKING:
    from typing_extensions import Buffer


class FileHead:
    """Implements `replica.delta.head.Head` over `head/`."""

    def __init__(self, fs: FileSystem, layout: Layout, state: State, head_format: HeadFormat) -> None:
        """Opens the images and trees of the committed `state`. Raises StorageError, ImageError."""
        self._fs = fs
        self._layout = layout
        self._format = head_format
        self._state = state
        self._disks: dict[DiskId, Disk] = {}
        self._images: dict[DiskId, FlatImage] = {}
        self._trees: dict[DiskId, tuple[File, MerkleTree]] = {}

    @classmethod
    def open(cls, fs: FileSystem, layout: Layout, state: State, head_format: HeadFormat) -> FileHead:
        """The head as a finished commit left it. Raises StorageError, ImageError."""
        head = cls(fs, layout, state, head_format)
        with ExitStack() as undo:
            undo.callback(head.close)
            for entry in state.disks:
                head._attach(entry.disk)
            undo.pop_all()
        return head

    @classmethod
    def open_interrupted(
        cls, fs: FileSystem, layout: Layout, state: State, other: State, head_format: HeadFormat
    ) -> FileHead:
        """The head as a commit that led from `state` to `other` may have left it, at whatever step it was cut.

        A disk whose size was to change is cut to the smaller of both sizes:
        below that nothing but the delta's extents was touched, and everything
        above comes from the delta (or from its inverse) anyway. A disk that
        only `other` has is made anew if it is to be: all of it comes from the
        delta, and a sync of its name may have failed, which no later one mends.

        Of a disk that both have nothing is removed, whatever is missing: its
        tree is made anew from the image, and what the commit wrote in there
        enters it as in any other (`settle`). Without an image, DamageError.
        """
        head = cls(fs, layout, state, head_format)
        with ExitStack() as undo:
            undo.callback(head.close)
            for entry in (*state.disks, *(d for d in other.disks if state.disk(d.disk.id) is None)):
                disk, target = entry.disk, other.disk(entry.disk.id)
                kept = target is not None and state.disk(disk.id) is not None
                if target is not None and kept and not fs.exists(layout.tree(disk.id)):
                    head._make_tree(disk, min(disk.size_bytes, target.disk.size_bytes))
                present = fs.exists(layout.image(disk.id)) and fs.exists(layout.tree(disk.id))
                if not kept and (not present or state.disk(disk.id) is None):
                    fs.unlink(layout.image(disk.id))
                    fs.unlink(layout.tree(disk.id))
                    continue
                head._attach(disk)
                if target is not None and target.disk.size_bytes != disk.size_bytes:
                    smaller = min(disk, target.disk, key=lambda d: d.size_bytes)
                    head._images[disk.id].resize(smaller.size_bytes)
                    head._disks[disk.id] = smaller
            undo.pop_all()
        return head

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        for disk_id in list(self._images):
            self._detach(disk_id)

    def _make_tree(self, disk: Disk, size_bytes: int) -> None:
        """A tree of what the image holds now, up to `size_bytes`, where there is none. DamageError without an image."""
        path = self._layout.image(disk.id)
        if not self._fs.exists(path):
            raise DamageError(
                f"{path} and its tree are gone, in the middle of a commit",
                hint="put them back, if they were moved away; every other file of the replica is kept as it is",
            )
        temporary = path.with_name(f".{disk.id}.tree.tmp")
        self._fs.unlink(temporary)
        with (
            FlatImage.open(self._fs, path, self._format, size_bytes=disk.size_bytes, unique_id=disk.id) as image,
            self._fs.create(temporary) as file,
        ):
            tree = MerkleTree(FileNodes(file), disk.leaf_bytes)
            root_of_content(size_bytes, tree.update(write=True), image.allocated(0, size_bytes), image.read_into)
            file.sync()
        self._fs.publish(temporary, self._layout.tree(disk.id))

    def _attach(self, disk: Disk) -> None:
        image_path, tree_path = self._layout.image(disk.id), self._layout.tree(disk.id)
        with ExitStack() as undo:
            image = FlatImage.open(
                self._fs, image_path, self._format, size_bytes=disk.size_bytes, unique_id=disk.id, write=True
            )
            undo.callback(image.close)
            tree = self._fs.open(tree_path, write=True)
            undo.pop_all()
        self._disks[disk.id] = disk
        self._images[disk.id] = image
        self._trees[disk.id] = (tree, MerkleTree(FileNodes(tree), disk.leaf_bytes))

    def _detach(self, disk_id: DiskId) -> None:
        self._disks.pop(disk_id)
        self._images.pop(disk_id).close()
        self._trees.pop(disk_id)[0].close()

    # --- what the delta's operations need (replica.delta.head.Head) ---

    @property
    def disks(self) -> tuple[Disk, ...]:
        return tuple(sorted(self._disks.values(), key=lambda d: d.id.bytes))

    @property
    def state(self) -> State:
        return self._state

    def read_into(self, disk_id: DiskId, offset: int, buffer: Buffer) -> None:
        self._images[disk_id].read_into(offset, buffer)

    def read_ranges(self, disk_id: DiskId, ranges: Sequence[tuple[int, int]], buffer: Buffer) -> None:
        self._images[disk_id].read_ranges(ranges, buffer)

    def write(self, disk_id: DiskId, offset: int, data: Buffer) -> None:
        self._images[disk_id].write(offset, data)

    def write_ranges(self, disk_id: DiskId, ranges: Sequence[tuple[int, int]], data: Buffer) -> None:
        self._images[disk_id].write_ranges(ranges, data)

    def zero(self, disk_id: DiskId, offset: int, length: int) -> None:
        self._images[disk_id].zero(offset, length)

    def tree(self, disk_id: DiskId) -> MerkleTree:
        return self._trees[disk_id][1]

    def allocated(self, disk_id: DiskId) -> Iterator[tuple[int, int]]:
        """Half-open ranges of bytes of the image that are no hole, ascending."""
        return self._images[disk_id].allocated(0, self._disks[disk_id].size_bytes)

    def reopen_tree(self, disk_id: DiskId) -> None:
        """Another file has taken the tree's place."""
        tree = self._fs.open(self._layout.tree(disk_id), write=True)
        self._trees.pop(disk_id)[0].close()
        self._trees[disk_id] = (tree, MerkleTree(FileNodes(tree), self._disks[disk_id].leaf_bytes))

    def set_disks(self, disks: Sequence[Disk]) -> None:
        """Make the head hold exactly these disks: new ones empty, others cut or grown with zeros."""
        wanted = {disk.id: disk for disk in disks}
        for disk_id in [i for i in self._disks if i not in wanted]:
            self._detach(disk_id)
            self._fs.unlink(self._layout.image(disk_id))
            self._fs.unlink(self._layout.tree(disk_id))
        for disk in wanted.values():
            if disk.id not in self._disks:
                self._create(disk)
            elif self._disks[disk.id].size_bytes != disk.size_bytes:
                self._images[disk.id].resize(disk.size_bytes)
            self._disks[disk.id] = disk
        self._make_links()

    def _create(self, disk: Disk) -> None:
        """A new disk, all zeros, whatever a commit that was cut may have left under its id."""
        for path in (self._layout.image(disk.id), self._layout.tree(disk.id)):
            self._fs.unlink(path)
        FlatImage.create(self._fs, self._layout.image(disk.id), self._format, disk.size_bytes, disk.id).close()
        self._fs.create(self._layout.tree(disk.id)).close()
        self._fs.sync_directory(self._layout.head)
        self._attach(disk)

    def _make_links(self) -> None:
        wanted = {f"{disk.name}.img": f"{disk.id}.img" for disk in self._disks.values()}
        self._fs.set_links(self._layout.head, wanted)

    def drop_cache(self, disk_id: DiskId, offset: int, length: int) -> None:
        """What is read there next comes from the device, unless it was not written there yet."""
        self._images[disk_id].drop_cache(offset, length)

    def flush(self) -> None:
        """Everything written so far is durable, names included, and what is read next comes from the device."""
        self.sync()
        for image in self._images.values():
            image.drop_cache()

    # --- what a commit needs besides ---

    def sync(self) -> None:
        """Images and trees are durable, and so are their names."""
        for disk_id, image in self._images.items():
            image.sync()
            self._trees[disk_id][0].sync()
        self._fs.sync_directory(self._layout.head)


def remove_leftovers(fs: FileSystem, layout: Layout) -> None:
    """Clear the head of a replica that is empty, has no point and applies nothing: an adoption was cut there."""
    fs.set_links(layout.head, {})
    for name in fs.list_names(layout.head):
        fs.unlink(layout.head / name)
