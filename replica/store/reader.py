"""Reading a replica from any process, beside the writer and without its lock.

    reader = ReplicaReader(fs, directory)
    for info in reader.points(): ...
    with reader.open_point(3) as point:
        point.read_into(disk_id, offset, buffer)

A point is read through the chain of inverses down to the head (`ChainReader`).
The head may be rewritten meanwhile, so the order matters: first the head's
bytes, then a look for inverses that appeared since. An inverse gets its name
before the first byte of the head changes; so what the head gave is either
untouched or covered by an inverse that is seen now, and that one wins. An inverse
may be gone again by then, where its commit was undone meanwhile; but each of these
steps replaces the state document first, with a higher serial number. So if there is
no inverse to be seen and the number is another one, the head is read once more.

A pin keeps the point from being rotated out while it is open (`pins`).
`ReplicaReader` is not thread-safe; a `PointReader`'s `read_into` is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from replica.delta import ChainReader, Keyring
from replica.delta.ranges import Range, union
from replica.delta.read import ALLOCATED_BYTES
from replica.durable import File, FileSystem
from replica.errors import DamageError, LostError, PointGoneError, StorageError
from replica.images.flat import FlatImage
from replica.model import NEVER, DeltaId, Disk, DiskId, Epoch, State
from replica.progress import Progress, silent
from replica.store import damage, incoming
from replica.store.courtesy import Courtesy
from replica.store.damage import Marks
from replica.store.layers import InverseLayer, LayerFiles, MovedError
from replica.store.layout import HeadFormat, Layout, StoreState, load_state, read_identity
from replica.store.lost import Found, Losses, losses
from replica.store.marked import MarkedLeaves
from replica.store.pins import pin
from replica.store.points import LOOKS, Chain, Link, LostRange, PointIndex, PointInfo
from replica.store.receipts import ReceiptFiles
from replica.store.verify import DiskVerdict, verify_head
from replica.store.verify_round import known_damage, with_damage

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAX_LOST_RANGES = 64
"""How many lost ranges of a point are listed."""

NAMED_FILES = 3
"""How many damaged files an error names."""


class ReplicaReader:
    """Looks at one replica's directory; every call looks anew."""

    def __init__(self, fs: FileSystem, directory: Path) -> None:
        """Raises StorageError or FormatError if there is no replica there."""
        self._fs = fs
        self.layout = Layout(directory)
        self.identity = read_identity(fs, self.layout)
        self._keyring = Keyring(fs, self.layout.keys)
        self._index = PointIndex(fs, self.layout, self._keyring)

    @property
    def state(self) -> StoreState:
        return load_state(self._fs, self.layout)

    @property
    def head(self) -> State:
        return self.state.head

    @property
    def epoch(self) -> Epoch:
        return self.state.epoch

    @property
    def applying(self) -> DeltaId | None:
        return self.state.applying

    @property
    def received(self) -> DeltaId | None:
        """See `incoming.received`."""
        return incoming.received(self._fs, self.layout)

    @property
    def receiving(self) -> DeltaId | None:
        """See `incoming.receiving`."""
        return incoming.receiving(self._fs, self.layout)

    def points(self) -> list[PointInfo]:
        """Every point, oldest first. What cannot be restored any more is listed as such, never left out."""
        while True:
            chain, readable = self._look()
            try:
                lost = losses(self._fs, self._keyring, chain, self.marks)
                break
            except MovedError:  # an inverse went just now, or its name is another one's
                self._index = PointIndex(self._fs, self.layout, self._keyring)
        head = chain.state.head
        infos = [
            PointInfo(link.result, link.stored_bytes, link.result.delta_id in readable, link.committed)
            for link in chain.links
            if link.result.is_point and link.result != head
        ]
        if head.is_point:
            infos.append(PointInfo(head, self._head_bytes(head), head.delta_id in readable, chain.state.committed))
        infos = [info if info.restorable else replace(info, reason=_not_readable(chain)) for info in infos]
        infos = [_with_lost(info, lost[info.state.delta_id]) for info in infos]
        infos += _cut_off(chain, {info.state.delta_id for info in infos})
        infos.sort(key=lambda info: info.state.point)
        return with_damage(infos, known_damage(self._fs, self.layout, self._keyring, chain))

    @property
    def marks(self) -> Marks:
        """What is known to be damaged in the head (`damage`)."""
        return damage.load(self._fs, self.layout)

    @property
    def damaged(self) -> list[Path]:
        """Files in `points/` that are no readable inverse, as of the last look: which point they led to is unknown."""
        return self._index.damaged

    def _head_bytes(self, head: State) -> int:
        total = 0
        for entry in head.disks:
            try:
                with self._fs.open(self.layout.image(entry.disk.id)) as file:
                    total += file.allocated_bytes()
            except StorageError:
                continue
        return total

    def _look(self) -> tuple[Chain, set[DeltaId]]:
        """The chain, and the states on it that can be read as far as the head has the images that they need."""
        for _ in range(LOOKS):
            chain = self._index.chain()
            needed = chain.from_head
            images = frozenset[DiskId]().union(*needed.values())
            missing = {disk_id for disk_id in images if not self._fs.exists(self.layout.image(disk_id))}
            if not missing or load_state(self._fs, self.layout) == chain.state:
                break  # else a disk was removed just now, and its image with it
        readable = {delta_id for delta_id, disks in needed.items() if not disks & missing}
        return chain, set() if chain.torn else readable

    def open_point(self, number: int | None = None) -> PointReader:
        """Open a point (the newest without a number), pinned. PointGoneError if it is not listed."""
        while True:
            state, _ = self._find(self._index.chain(), number)
            lock = pin(self._fs, self.layout, state.delta_id)
            with ExitStack() as undo:
                undo.callback(lock.release)
                chain = self._index.chain()
                if chain.to(state.point) is None and number is None:
                    continue
                state, links = self._find(chain, state.point)
                try:
                    reader = PointReader(
                        self._fs,
                        self.layout,
                        self._keyring,
                        self.identity.head_format,
                        state,
                        links,
                        chain.state.serial,
                        self._index.copy(),
                    )
                except MovedError:
                    continue
                undo.pop_all()
            reader.on_close(lock.release)
            return reader

    def receipt(self, number: int) -> bytes:
        """The signed receipt of a point, as it lies there. PointGoneError: no such point, or none was issued yet."""
        state, _ = self._find(self._index.chain(), number)
        files = ReceiptFiles(self._fs, self.layout)
        if not files.has(state.delta_id):
            raise PointGoneError(
                f"point {number} of machine {self.identity.machine!r} has no receipt yet",
                hint="the receiver issues it with its next commit or start; its log says what is in the way",
            )
        return files.read(state.delta_id).data

    def verify(self, progress: Progress = silent) -> list[DiskVerdict]:
        """Check the head against its tree and the tree against the committed state (see `verify`)."""
        return verify_head(self._fs, self.layout, progress)

    def _find(self, chain: Chain, number: int | None) -> tuple[State, tuple[Link, ...]]:
        found = chain.to(number)
        if found is not None:
            _refuse_torn(chain, self.layout)
            return found
        machine = self.identity.machine
        numbers = [state.point for state in chain.points]
        if not numbers:
            raise PointGoneError(f"machine {machine!r} has no point yet", hint="its first copy is not complete")
        unreadable = ", ".join(path.name for path in self.damaged[:NAMED_FILES]) or "a file is missing"
        if any(info.state.point == number for info in _cut_off(chain, {state.delta_id for state in chain.points})):
            raise PointGoneError(
                f"point {number} of machine {machine!r} cannot be restored: an inverse between it and the head is "
                f"damaged or missing in {self.layout.points} ({unreadable})",
                hint="put that file back if there is a copy of it, or choose a newer point",
            )
        hint = f"its points are {min(numbers)} to {max(numbers)}"
        if self.damaged and number is not None and number < min(numbers):
            hint += f"; older ones may be behind what is damaged in {self.layout.points} ({unreadable})"
        raise PointGoneError(f"machine {machine!r} has no point {number}", hint=hint)


def _not_readable(chain: Chain) -> str:
    """Why a point on the way cannot be read, whatever is in the inverses that lead to it."""
    if chain.torn:
        return "a commit was cut and its inverse is damaged or missing: the head may be half written"
    return "an image that it needs is missing in head/"


def _cut_off(chain: Chain, listed: set[DeltaId]) -> list[PointInfo]:
    """The points that only inverses name which cannot be reached: another one is damaged or missing.

    Of a point whose own inverse is that one nothing else is known: not what it takes, and not when it was committed.
    """
    reason = "an inverse between it and the head is damaged or missing"
    own = {s.result.delta_id: PointInfo(s.result, s.stored_bytes, False, s.committed, (), reason) for s in chain.strays}
    named = {s.base.delta_id: PointInfo(s.base, 0, False, NEVER, (), reason) for s in chain.strays}
    newest = chain.state.head.point
    return [
        info
        for info in {**named, **own}.values()
        if info.state.is_point and info.state.point < newest and info.state.delta_id not in listed
    ]


def _with_lost(info: PointInfo, found: Found) -> PointInfo:
    """The point with what of it is lost: in an inverse on the way to it, or in the head."""
    if not found:
        return info
    ranges: list[LostRange] = []
    for entry in info.state.disks:
        ranges += [LostRange(entry.disk.name, a, b - a) for a, b in found.get(entry.disk.id, Losses()).gone]
    reason = info.reason
    for entry in info.state.disks:
        unreadable = found.get(entry.disk.id, Losses()).unreadable
        if unreadable and not reason and not ranges:
            start, stop = unreadable[0]
            reason = f"disk {entry.disk.name!r}, bytes {start} to {stop - 1}, damaged in an inverse of points/"
    return replace(info, restorable=False, lost=tuple(ranges[:MAX_LOST_RANGES]), reason=reason)


def _refuse_torn(chain: Chain, layout: Layout) -> None:
    if chain.torn:
        raise DamageError(
            f"the head in {layout.root} may be half written: a commit was cut, and {layout.points} does not hold "
            "a readable inverse of it",
            hint="start 'replica serve', which finishes the commit if the delta is still there",
        )


class PointReader:
    """One point, open for reading and pinned until `close`."""

    def __init__(
        self,
        fs: FileSystem,
        layout: Layout,
        keyring: Keyring,
        head_format: HeadFormat,
        state: State,
        links: tuple[Link, ...],
        serial: int,
        index: PointIndex,
    ) -> None:
        self._fs = fs
        self._layout = layout
        self._keyring = keyring
        self._head_format = head_format
        self.state = state
        self._index = index
        self._files = LayerFiles(fs, keyring)
        self._mutex = threading.Lock()
        self._resources = ExitStack()
        self._resources.callback(self._files.close)
        self._settled: File | None = None
        self._resources.callback(self._close_document)
        self._images: dict[DiskId, FlatImage] = {}
        self._images_of: dict[DiskId, Disk] = {}
        self._marked = MarkedLeaves(fs, layout)
        self._resources.callback(self._marked.close)
        self._undone = 0
        """How often the head may have been rewritten and no inverse of it is seen."""
        try:
            self._chain = self._connect(links, serial)
        except BaseException:
            self.close()
            raise

    def courtesy(self) -> Courtesy:
        """For whoever reads all of it: what lets short commits go first."""
        return Courtesy(self._fs, self._layout)

    def _connect(self, links: tuple[Link, ...], serial: int) -> ChainReader:
        """Open what lies between the point and the head, as it was found with the state of that number.

        What was open before stays open until `close`.
        """
        self._serial, self._connection = serial, object()
        layers = [self._files.layer(link) for link in links]
        self._has_lost = any(link.lost for link in links)
        self._top = links[-1].base if links else self.state
        self._open_images(links)
        return ChainReader(
            self._top, layers, self._read_head, partial(self._newer, self._connection), self._head_ranges
        )

    def on_close(self, callback: Callable[[], None]) -> None:
        self._resources.callback(callback)

    def close(self) -> None:
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def disks(self) -> tuple[Disk, ...]:
        return tuple(entry.disk for entry in self.state.disks)

    @property
    def depth(self) -> int:
        """How many inverses lie between the point and the head, as far as this reader has seen."""
        return self._chain.depth

    def read_into(self, disk_id: DiskId, offset: int, buffer: Buffer, *, missing: list[Range] | None = None) -> None:
        """Fill `buffer` from the disk as it was at this point. Thread-safe.

        Raises LostError (a range of it is lost), DamageError (an inverse is damaged), StorageError, ValueError
        (outside the disk). With `missing`, what is lost or damaged becomes zeros, and its ranges are added there.
        """
        while True:
            chain, undone = self._chain, self._undone
            found: list[Range] | None = None if missing is None else []
            try:
                chain.read_into(disk_id, offset, buffer, missing=found)
            except MovedError:
                self._connect_again(chain)
                continue
            except LostError:
                if undone == self._undone:
                    raise
                continue
            if undone == self._undone:
                if missing is not None:
                    missing += found or ()
                return

    def read_ahead(self, disk_id: DiskId, offset: int, length: int) -> None:
        """Ask for what the head has there, so that a read of it that comes soon need not wait. Thread-safe."""
        image = self._images.get(disk_id)
        if image is not None and offset < image.size_bytes:
            image.read_ahead(offset, min(length, image.size_bytes - offset))

    def clone_into(self, disk_id: DiskId, image: FlatImage) -> bool:
        """Let a new image share what the head's has, if that is this point as far as is known and the files can.

        It may be something else all the same: a commit that comes meanwhile, or damage. Only its root tells.
        """
        of_head = self._images.get(disk_id)
        if self.depth or of_head is None or of_head.size_bytes != image.size_bytes:
            return False
        return image.clone_from(of_head)

    def lost(self, disk_id: DiskId) -> list[tuple[int, int]]:
        """Half-open ranges of the disk's bytes that cannot be had at this point, ascending. Thread-safe.

        Nobody has them any more, or they are read from a leaf of the head that is damaged: that one the next sync may
        repair. Every marked leaf that the point reads is looked at for it (`marked`).
        """
        entry = self.state.disk(disk_id)
        if entry is None:
            raise ValueError(f"state {self.state.delta_id} has no disk {disk_id}")
        while True:
            chain = self._chain
            depth = chain.depth
            try:
                gone = list(chain.lost(disk_id, 0, entry.disk.size_bytes)) if self._has_lost else []
                damaged = list(self._damaged_in_head(chain, depth, entry.disk))
                if damaged and chain.grew(depth):
                    continue  # what is being rewritten is not what the tree says, and not what this point reads
                return list(union(gone, damaged))
            except MovedError:
                self._connect_again(chain)

    @property
    def rotten_in_head(self) -> bool:
        """Whether some of what cannot be had is in leaves of the head that rotted, which the next sync may repair."""
        chain = self._chain
        with suppress(MovedError):
            return any(True for disk in self.disks for _ in self._damaged_in_head(chain, chain.depth, disk))
        return False

    def _damaged_in_head(self, chain: ChainReader, depth: int, disk: Disk) -> Iterator[tuple[int, int]]:
        """Bytes of rotten leaves of the head that this point reads."""
        of_head = self._images_of.get(disk.id)
        if of_head is None:
            return
        self._marked.load()
        for start, stop in self._marked.ranges(of_head, 0, min(disk.size_bytes, of_head.size_bytes)):
            for run in chain.runs(disk.id, start, stop):
                if run.layer == depth:
                    yield from self._marked.rotten(of_head, self._images[disk.id], run.start, run.stop)

    def allocated(self, disk_id: DiskId, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Half-open ranges (start, stop) that may hold anything but zeros, ascending; they may touch."""
        for begin in range(start, stop, ALLOCATED_BYTES):
            while True:
                chain, undone = self._chain, self._undone
                try:
                    ranges = list(chain.allocated(disk_id, begin, min(begin + ALLOCATED_BYTES, stop)))
                except MovedError:
                    self._connect_again(chain)
                    continue
                if undone == self._undone:
                    break
            yield from ranges

    def changes(self, disk_id: DiskId, newer: State, start: int, stop: int) -> list[tuple[int, int]]:
        """Half-open ranges of [start, stop) in which the disk may differ from what it is in a newer state.

        See `ChainReader.changes`. The newer state is a point between this one and the head.
        """
        while True:
            chain = self._chain
            try:
                return list(chain.changes(disk_id, newer, start, stop))
            except MovedError:
                self._connect_again(chain)

    def _connect_again(self, seen: ChainReader) -> None:
        with self._mutex:
            if self._chain is not seen:
                return
            self._index = PointIndex(self._fs, self._layout, self._keyring)  # a name may belong to another file by now
            chain = self._index.chain()
            _refuse_torn(chain, self._layout)
            found = chain.to(self.state.point)
            if found is None or found[0] != self.state:
                raise PointGoneError(f"point {self.state.point} is not there any more", hint="choose another point")
            self._close_document()
            self._settled = None
            with suppress(MovedError):  # once more: whoever asked tries the chain of before, which says so again
                self._chain = self._connect(found[1], chain.state.serial)

    def _head_ranges(self, disk_id: DiskId, start: int, stop: int) -> Iterator[tuple[int, int]]:
        image = self._images.get(disk_id)
        return image.allocated(start, stop) if image is not None else iter(())

    def _open_images(self, links: tuple[Link, ...]) -> None:
        """The head's disks as they were when the layers were opened; later changes of size come as layers.

        Only those that are there all the way from the head to the point: others are not read, and one that was added
        since may not be made yet. MovedError if one was removed just now.
        """
        there = {entry.disk.id for entry in self.state.disks}
        for link in links:
            there &= {entry.disk.id for entry in link.base.disks}
        for entry in self._top.disks:
            if entry.disk.id not in there:
                continue
            disk, path = entry.disk, self._layout.image(entry.disk.id)
            try:
                image = FlatImage.open(self._fs, path, self._head_format, size_bytes=disk.size_bytes, unique_id=disk.id)
            except StorageError:
                if not self._fs.exists(path) and load_state(self._fs, self._layout).serial != self._serial:
                    raise MovedError from None
                raise
            self._images_of[disk.id] = disk
            self._images[disk.id] = self._resources.enter_context(image)

    def _read_head(self, disk_id: DiskId, offset: int, buffer: memoryview) -> None:
        self._refuse_damaged(disk_id, offset, offset + len(buffer))
        self._images[disk_id].read_into(offset, buffer)

    def _refuse_damaged(self, disk_id: DiskId, start: int, stop: int) -> None:
        """LostError if the head is damaged there: a leaf is marked, and not good after all."""
        disk = self._images_of[disk_id]
        if not self._marked.ranges(disk, start, stop):
            return
        self._marked.load()
        for first, last in self._marked.rotten(disk, self._images[disk_id], start, stop):
            raise LostError(
                f"disk {disk.name!r} of the head is damaged: {last - first} bytes at {first}",
                hint="the next sync of the machine repairs it; points that do not read them can be restored",
                disk=disk.name,
                offset=first,
                length=last - first,
            )

    def _newer(self, connection: object) -> list[InverseLayer]:
        """Layers for what was applied since the last look, nearest the point first.

        A commit replaces the state document before its inverse gets a name, and both before it changes the head. So
        while that document is the very file that the last look was made with, there is nothing newer. MovedError, too,
        if whoever asks reads through what was connected before.
        """
        with self._mutex:
            if connection is not self._connection:
                raise MovedError
            if self._settled is not None and self._settled.has_name():
                return []
            document = self._fs.open(self._layout.state) if self._fs.exists(self._layout.state) else None
            try:
                chain = self._index.chain()
                _refuse_torn(chain, self._layout)
                links = chain.since(self._top)
                if links is None:
                    raise MovedError
                layers = [self._files.layer(link) for link in links]
                self._has_lost |= any(link.lost for link in links)
                self._top = chain.top
                if chain.state.serial != self._serial:
                    self._serial = chain.state.serial
                    self._undone += not layers
                between = chain.state.applying is not None and chain.undoing is None
                if document is not None and document.has_name() and not between:
                    document, self._settled = self._settled, document
            finally:
                if document is not None:
                    document.close()
            return layers

    def _close_document(self) -> None:
        if self._settled is not None:
            self._settled.close()
