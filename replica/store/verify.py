"""verify: is the head what its Merkle tree says, and the tree what the state says?

Every leaf that the image or the tree says is not zero is read and hashed. A
commit may be under way in another process, so a difference counts only after
the leaf was looked at again under the head's lock, when image, tree and state
belong together. The tree's inner nodes are not trusted either: the root is
computed again from the leaves and compared with the committed state's.

Where they differ, it is the image that counts as damaged, leaf by leaf, unless
its own leaves give the committed root: then all that is damaged is the tree
(`tree_unfit`), which the next commit makes anew, and every byte is there.

It goes window by window and may be cut: what is known so far is in a `DiskMark`
(`verdicts`), handed out after every window, from which a later run goes on.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

import msgspec
import numpy as np

from replica.durable import File, FileSystem
from replica.errors import BusyError
from replica.images.flat import FlatImage
from replica.merkle import FileNodes, MemoryNodes, MerkleTree, leaf_digests, leaf_windows, root_of_content
from replica.model import Disk, DiskState
from replica.pipeline import Bytes, aligned, in_order
from replica.progress import Progress, silent
from replica.store.courtesy import Courtesy
from replica.store.layout import HeadFormat, Layout, StoreState, load_state, read_identity
from replica.store.pace import Pace
from replica.store.verdicts import DiskMark, Ranges, bounded, outside

WINDOW_BYTES = 4 << 20
THREADS = 4
"""More than there are cores where those are few: one that waits for the device lets the others hash."""
TREE_LEAVES = 4096
"""That are looked at together."""
SETTLE_TRIES = 100
SETTLE_SECONDS = 0.1
"""A commit that is at work has the head's lock most of the time; these bridge the moments before and after."""


Indices = np.ndarray[tuple[int], np.dtype[np.int64]]
Damaged = Callable[[Disk, Ranges], None]


@dataclass(frozen=True, slots=True)
class DiskVerdict:
    """What was found: `mismatches` are (offset, length) in bytes, leaf by leaf, neighbours joined.

    `tree_unfit`: the image is good, and its tree is not what the committed root says.
    """

    disk: Disk
    checked_bytes: int
    mismatches: tuple[tuple[int, int], ...]
    tree_unfit: bool = False

    @property
    def ok(self) -> bool:
        return not self.mismatches and not self.tree_unfit


def verify_head(
    fs: FileSystem,
    layout: Layout,
    progress: Progress = silent,
    *,
    pace: Pace | None = None,
    marks: Sequence[DiskMark] = (),
    note: Callable[[DiskMark], None] = lambda _mark: None,
    damaged: Damaged = lambda _disk, _ranges: None,
) -> list[DiskVerdict]:
    """Check every disk of the head, or what `marks` leave of it. `note` is told how far it is.

    `damaged` is told (offset, length) of the rotten leaves of a window as soon as they are, while the head is still.
    Raises StorageError if something cannot be read at all, BusyError if a commit was cut and nobody finishes it.
    """
    head_format = read_identity(fs, layout).head_format
    head = load_state(fs, layout).head
    total = sum(entry.disk.size_bytes for entry in head.disks)
    known = {mark.disk: mark for mark in marks}
    pace = pace or Pace()
    verdicts: list[DiskVerdict] = []
    done = 0
    for entry in head.disks:
        mark = known.get(entry.disk, DiskMark(entry.disk))
        if not mark.done:
            with _Checker(fs, layout, head_format, entry.disk, damaged) as checker:
                mark = checker.run(mark, pace, note, _from(progress, done, total))
        verdicts.append(DiskVerdict(entry.disk, mark.checked_bytes, mark.found, mark.tree_unfit))
        done += entry.disk.size_bytes
    return verdicts


def _from(progress: Progress, base: int, total: int) -> Callable[[int], None]:
    return lambda done: progress(base + done, total)


class _Checker:
    """One disk's check."""

    def __init__(self, fs: FileSystem, layout: Layout, head_format: HeadFormat, disk: Disk, damaged: Damaged) -> None:
        self._fs = fs
        self._damaged = damaged
        self._layout = layout
        self._disk = disk
        self._head_format: HeadFormat = head_format
        self._courtesy = Courtesy(fs, layout)
        self._resources = ExitStack()
        try:
            self._open()
        except BaseException:
            self._resources.close()
            raise

    def _open(self) -> None:
        disk = self._disk
        image = FlatImage.open(self._fs, self._layout.image(disk.id), self._head_format, size_bytes=disk.size_bytes)
        self._image = self._resources.enter_context(image)
        self._image.read_from_device()  # that is what counts
        self._tree_file: File = self._fs.open(self._layout.tree(disk.id))
        self._resources.callback(self._tree_file.close)
        self._tree = MerkleTree(FileNodes(self._tree_file), disk.leaf_bytes)

    def __enter__(self) -> _Checker:
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def run(
        self, mark: DiskMark, pace: Pace, note: Callable[[DiskMark], None], progress: Callable[[int], None]
    ) -> DiskMark:
        disk, leaf = self._disk, self._disk.leaf_bytes
        with closing(self._compared(mark.position, pace.ahead(WINDOW_BYTES, THREADS))) as compared:
            for offset, length, differing in compared:
                end = offset + length
                found = outside(mark.found, mark.position, end)
                found += self._confirm((offset // leaf + differing).tolist()) if len(differing) else []
                mark = msgspec.structs.replace(
                    mark, position=end, checked_bytes=mark.checked_bytes + length, found=bounded(found)
                )
                note(mark)
                progress(end)
                pace.take(length)
        found = outside(
            mark.found, mark.position, disk.size_bytes
        )  # what is behind it is zero in image and tree by now
        unfit = self._only_the_tree(pace) if found else not self._tree_is_whole()
        mark = msgspec.structs.replace(
            mark, position=disk.size_bytes, found=() if unfit else bounded(found), tree_unfit=unfit, done=True
        )
        note(mark)
        progress(disk.size_bytes)
        return mark

    def _compared(self, reached: int, threads: int) -> Generator[tuple[int, int, Indices]]:
        """What is to be read from `reached` on, and which leaves of it differ; anew when there are other files."""

        def compare(window: tuple[int, int], memory: Bytes) -> tuple[int, int, Indices]:
            self._courtesy.wait()
            offset, length = window
            return offset, length, self._differing(offset, memory[:length])

        disk = self._disk
        while True:
            tree = self._tree
            windows = leaf_windows(self._ranges(reached), disk.size_bytes, disk.leaf_bytes, WINDOW_BYTES, start=reached)
            with closing(in_order(compare, windows, WINDOW_BYTES, threads)) as compared:
                for offset, length, differing in compared:
                    reached = offset + length
                    yield offset, length, differing
                    if self._tree is not tree:
                        break  # what is under way was read from files that are nobody's any more
                else:
                    return

    def _ranges(self, start: int) -> Iterator[tuple[int, int]]:
        """Where image or tree are not zero, in bytes."""
        return _merged(self._image.allocated(start, self._disk.size_bytes), self._tree_ranges())

    def _tree_ranges(self) -> Iterator[tuple[int, int]]:
        leaf = self._disk.leaf_bytes
        for first, stop in self._tree.stored_leaves(self._disk.count_leaves):
            for begin in range(first, stop, TREE_LEAVES):
                digests = self._tree.leaves(begin, min(TREE_LEAVES, stop - begin))
                edges = np.flatnonzero(np.diff(digests.view(np.uint64).any(axis=1), prepend=False, append=False))
                for low, high in edges.reshape(-1, 2).tolist():
                    yield (begin + low) * leaf, min((begin + high) * leaf, self._disk.size_bytes)

    def _differing(self, offset: int, buffer: Bytes) -> Indices:
        """Read leaves into the buffer; which are not what the tree says, counted from the first. Thread-safe."""
        leaf = self._disk.leaf_bytes
        self._image.read_into(offset, buffer.data)
        found = leaf_digests(buffer.data, offset // leaf, leaf)
        stored = self._tree.leaves(offset // leaf, len(found))
        return np.flatnonzero((found != stored).any(axis=1))

    def _confirm(self, suspects: list[int]) -> list[tuple[int, int]]:
        """Look again while no commit can be in the way. BusyError if one was cut and nobody finishes it."""
        disk, leaf = self._disk, self._disk.leaf_bytes
        wrong: list[tuple[int, int]] = []
        memory = aligned(leaf)
        with self._settled() as state:
            committed = state.head.disk(disk.id)
            if committed is None or committed.disk != disk:
                return []  # removed or resized meanwhile: what was read is not what is to be checked
            for index in suspects:
                offset = index * leaf
                length = min(leaf, disk.size_bytes - offset)
                if len(self._differing(offset, memory[:length])):
                    wrong.append((offset, length))
            if wrong:
                self._damaged(disk, bounded(wrong))  # before a commit may replace them, which takes the marks away
        return wrong

    def _tree_is_whole(self) -> bool:
        with self._settled() as state:
            committed = state.head.disk(self._disk.id)
            return committed is None or committed.disk != self._disk or self._tree_fits(committed)

    def _only_the_tree(self, pace: Pace) -> bool:
        """Whether leaves differ because the tree is rotten: the image as it is read has the committed root.

        It is read without a lock: a commit that comes meanwhile gives another root, and so proves nothing.
        """
        disk = self._disk
        with self._settled() as state:
            committed = state.head.disk(disk.id)
            if committed is None or committed.disk != disk or self._tree_fits(committed):
                return False

        def read(offset: int, buffer: memoryview) -> None:
            self._image.read_into(offset, buffer)
            pace.take(len(buffer))

        allocated = self._image.allocated(0, disk.size_bytes)
        update = MerkleTree(MemoryNodes(), disk.leaf_bytes).update(write=False)
        return root_of_content(disk.size_bytes, update, allocated, read) == committed.root

    @contextmanager
    def _settled(self) -> Iterator[StoreState]:
        """Hold the head still, between two commits, and look at the files that are its own now.

        A tree that was made anew has the old one's name, and a disk that was removed and came again has other files:
        what was opened before is nobody's any more, and would differ with every commit.
        """
        for _ in range(SETTLE_TRIES):
            with self._fs.lock(self._layout.head_lock, shared=True, wait=True):
                state = load_state(self._fs, self._layout)
                if state.applying is None:
                    self._open_again(state)
                    yield state
                    return
            time.sleep(SETTLE_SECONDS)
        raise BusyError(
            f"the head in {self._layout.root} is in the middle of a commit that nobody goes on with",
            hint="start 'replica serve', which finishes it, and verify again; every point can be restored meanwhile",
        )

    def _open_again(self, state: StoreState) -> None:
        entry = state.head.disk(self._disk.id)
        if entry is None or entry.disk != self._disk:
            return
        if not (self._image.has_name() and self._tree_file.has_name()):
            self._open()

    def _tree_fits(self, committed: DiskState) -> bool:
        """Whether the stored leaves and the stored root both give the committed root."""
        if self._tree.root(self._disk.size_bytes) != committed.root:
            return False
        update = MerkleTree(MemoryNodes(), self._disk.leaf_bytes).update(write=False)
        for first, stop in self._tree.stored_leaves(self._disk.count_leaves):
            for begin in range(first, stop, TREE_LEAVES):
                update.put(begin, self._tree.leaves(begin, min(TREE_LEAVES, stop - begin)))
        return update.root(self._disk.size_bytes) == committed.root


def _merged(a: Iterator[tuple[int, int]], b: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Two ascending streams of ranges as one; ranges may overlap afterwards."""
    return heapq.merge(a, b)
