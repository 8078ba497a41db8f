"""Commit and recovery: the protocol that makes an acknowledged point impossible to lose.

Each arrow is a durability barrier:

    incoming/<delta>, synced                                                 -> received
    one pass (`prepare`): old leaves read and checked, the resulting roots
    computed, the inverse sealed into a temporary file, synced
    roots equal to the manifest's? else refused, the head untouched
    state.applying = delta                                                   ->
    inverse renamed to points/<delta>                                        ->
    head written (`write`), synced, page cache dropped, changed leaves read
    back (`settle`), tree written, roots compared, tree synced               ->
    state: head = result, applying = none                                    -> committed
    receipt written (`receipts`; by recovery if it is missing), incoming removed

Recovery, whenever a replica is opened or a commit failed in the middle:

- `applying` set, its inverse in place: the head may be half written. The writes
  are done again from incoming (they are idempotent) and that inverse is kept;
  one is never derived from a half-written head. If the redo cannot succeed, the
  inverse is applied instead, and is garbage only when the head is the old state
  again, durably; it is removed before `applying` is cleared.
- `applying` set, no inverse: the head is untouched; `applying` is cleared.
- An inverse with LOST extents cannot undo: what it would have to write nobody has.
  If the redo cannot succeed either, the replica stays as it is, with every byte.
- Images and trees of the head that are gone are made anew, to be repaired (`repair`).

What recovery relies on is synced again before it acts, because a file seen
after a crash may so far be in the page cache only; the inverse gets its name
anew, because after a sync that failed a further one says nothing. A crash during
recovery is a crash like any other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import msgspec
import numpy as np

from replica.delta import (
    Delta,
    DeltaFileReader,
    DeltaWriter,
    DiskChange,
    Keyring,
    RottenLeavesError,
    Rows,
    Segment,
    prepare,
    settle,
    write,
)
from replica.durable import FileSystem
from replica.errors import (
    BaseMismatchError,
    DamageError,
    ImageError,
    LostError,
    ProtocolError,
    ReplicaError,
    RootMismatchError,
    StorageError,
)
from replica.images.flat import FlatImage
from replica.model import NEVER, DamagedLeaves, DeltaId, Epoch, Stamp, State, random_id
from replica.progress import Progress, silent
from replica.store import damage
from replica.store.head import FileHead
from replica.store.incoming import final_path
from replica.store.layout import HeadFormat, Layout, StoreState, save_state
from replica.store.receipts import ReceiptBook
from replica.store.repair import HeadRepair, make_missing


class Committer:
    """Drives commits of one replica. Not thread-safe: its owner runs one commit at a time.

    `state` is what the `state` file says; only after a failed write of that
    file may it be older, and its owner then reads the file again.
    """

    def __init__(
        self,
        fs: FileSystem,
        layout: Layout,
        keyring: Keyring,
        head_format: HeadFormat,
        state: StoreState,
        receipts: ReceiptBook,
        now: Callable[[], Stamp] = lambda: NEVER,
        named: Callable[[], Iterable[State]] = tuple,
    ) -> None:
        """`now` is the receiver's time, which a new head is stamped with; `named` every state that an inverse names."""
        self._fs = fs
        self._now = now
        self._named = named
        self._receipts = receipts
        self._layout = layout
        self._keyring = keyring
        self._head_format = head_format
        self.state = state

    def commit(self, delta_id: DeltaId, progress: Progress = silent) -> State:
        """Apply the received delta; when this returns, its point is durable and listed.

        Raises BaseMismatchError, RootMismatchError, DamageError or
        ProtocolError (the delta is refused, the head untouched) or
        StorageError. If `state.applying` is set afterwards the head may be half
        written: `recover` before anything else.
        """
        with self._open(final_path(self._layout, delta_id)) as delta:
            self._check_acceptable(delta)
            with FileHead.open(self._fs, self._layout, self.state.head, self._head_format) as head:
                temporary = self._layout.points / f".{delta_id}.{os.urandom(4).hex()}.tmp"
                try:
                    self._check_writable(delta)
                    self._seal_inverse_healing(head, delta, temporary, progress)
                except BaseException:
                    self._fs.unlink(temporary)
                    raise
                self._set_state(self.state.head, applying=delta_id)
                try:
                    self._fs.publish(temporary, self._layout.point(delta_id))
                except StorageError:
                    self._take_back(delta_id)
                    raise
                with self._open(self._layout.point(delta_id)) as inverse:
                    self._rewrite(head, delta, inverse)
            self._clear_replaced(delta)
        self._receipts.committed(self.state.head, self.state.committed)
        self._fs.unlink(final_path(self._layout, delta_id))
        return self.state.head

    def _clear_replaced(self, delta: DeltaFileReader) -> None:
        """Marks of leaves that this delta wrote, and of disks that it cut or removed, say nothing any more."""
        marks = damage.load(self._fs, self._layout)
        gone: list[DamagedLeaves] = []
        for index, change in enumerate(delta.disks):
            count, per_leaf = change.after.count_leaves if change.after else 0, change.disk.grains_per_leaf
            for marked in marks.of(change.disk_id):
                if count < marked.stop:
                    gone.append(DamagedLeaves(change.disk_id, max(marked.first, count), marked.stop))
                for number in delta.overlapping(index, marked.first * per_leaf, marked.stop * per_leaf):
                    rows = delta.table(number).extents
                    low = np.maximum(rows["first"] // per_leaf, marked.first)
                    high = np.minimum(-(-(rows["first"] + rows["count"]).astype(np.int64) // per_leaf), marked.stop)
                    touched = low.astype(np.int64) < high
                    runs = zip(low[touched].tolist(), high[touched].tolist(), strict=True)
                    gone += [DamagedLeaves(change.disk_id, a, b) for a, b in runs]
        damage.clear(self._fs, self._layout, gone)

    def recover(self) -> None:
        """Finish or undo what was being applied; afterwards `state.applying` is none.

        Raises DamageError if neither is possible: nothing is deleted then.
        """
        applying = self.state.applying
        if applying is not None:
            for directory in (self._layout.points, self._layout.incoming, self._layout.root):
                self._fs.sync_directory(directory)
            if not self._fs.exists(self._layout.point(applying)):
                self._set_state(self.state.head)
            else:
                self._name_again(self._layout.point(applying))
                self._finish_or_undo(applying)
        make_missing(self._fs, self._layout, self.state.head, self._head_format)
        self._remove_temporary()
        if self._fs.exists(final_path(self._layout, self.state.head.delta_id)):
            self._fs.unlink(final_path(self._layout, self.state.head.delta_id))
        self._receipts.committed(self.state.head, self.state.committed)

    def _name_again(self, inverse: Path) -> None:
        """Make the name of an inverse durable that is only seen so far.

        Where a sync of its directory had failed, a later one says nothing about it, and without it a crash in the
        middle of the redo would leave a head that is half written and taken for untouched. A copy gets a name anew.
        """
        temporary = inverse.with_name(f".{inverse.name}.{os.urandom(4).hex()}.tmp")
        try:
            self._fs.copy(inverse, temporary)
            self._fs.publish(temporary, inverse)
        except StorageError:
            with suppress(StorageError):
                self._fs.unlink(temporary)
            raise

    def _remove_temporary(self) -> None:
        """What a process that was killed had not named yet. In the root only what nobody but the writer writes."""
        layout = self._layout
        documents = (layout.state, layout.state_copy, layout.identity, layout.identity_copy)
        of_writer = tuple(f".{path.name}." for path in documents)
        for directory, starts in (
            (self._layout.points, "."),
            (self._layout.head, "."),
            (self._layout.root, of_writer),
        ):
            for name in self._fs.list_names(directory):
                if name.startswith(starts):
                    self._fs.unlink(directory / name)
        for document, lock in ((layout.retention, layout.marks_lock), (layout.damage, layout.damage_lock)):
            names = [n for n in self._fs.list_names(layout.marks) if n.startswith(f".{document.name}.")]
            if names:  # other processes write these, too: nobody does while the lock is held
                with self._fs.lock(lock, wait=True):
                    for name in names:
                        self._fs.unlink(layout.marks / name)

    def set_epoch(self, epoch: Epoch) -> None:
        """Change the fencing token, durably."""
        state = msgspec.structs.replace(self.state, epoch=epoch, serial=self.state.serial + 1)
        save_state(self._fs, self._layout, state)
        self.state = state

    # --- the steps ---

    def _open(self, path: Path) -> DeltaFileReader:
        return DeltaFileReader(self._fs.open(path), self._keyring)

    def _check_acceptable(self, delta: DeltaFileReader) -> None:
        """What the delta's own consistency does not say: that it is meant for this head, now."""
        head, base, result = self.state.head, delta.base, delta.result
        if base != head:
            raise BaseMismatchError(
                f"delta {delta.delta_id} starts from state {base.delta_id}, but the replica's head is {head.delta_id}",
                head=head.delta_id,
            )
        if result.delta_id != delta.delta_id or result.replica_id != head.replica_id:
            raise ProtocolError(f"delta {delta.delta_id} does not lead to a state of this replica named after it")
        if result.is_empty or any(state.delta_id == delta.delta_id for state in self._named()):
            # Files, pins, locks and receipts go by that id: two states of one name would take each other's place.
            raise ProtocolError(
                f"delta {delta.delta_id} is named like a state that the replica has had",
                hint="every delta has an id of its own; update the sender",
            )
        if result.epoch != self.state.epoch or delta.header.epoch != self.state.epoch:
            raise ProtocolError(f"delta {delta.delta_id} is of epoch {result.epoch}, not {self.state.epoch}")
        if result.point != head.point + (0 if result.partial else 1):
            what = "a part of a copy numbered" if result.partial else "point"
            raise ProtocolError(f"delta {delta.delta_id} makes {what} {result.point} after point {head.point}")

    def _check_writable(self, delta: DeltaFileReader) -> None:
        """A disk that this storage cannot hold is refused while nothing has changed (ImageError, StorageError)."""
        for change in delta.disks:
            if change.after is None or (change.before and change.before.size_bytes >= change.after.size_bytes):
                continue
            probe = self._layout.head / f".{os.urandom(4).hex()}.probe"
            try:
                size, disk_id = change.after.size_bytes, change.disk_id
                FlatImage.create(self._fs, probe, self._head_format, size, disk_id).close()
            finally:
                self._fs.unlink(probe)

    def _take_back(self, applying: DeltaId) -> None:
        """The inverse's name may not be durable, and after a failed sync nobody can make sure: the head is untouched
        yet, so `applying` is cleared, and only then the inverse goes."""
        self._set_state(self.state.head)
        self._fs.unlink(self._layout.point(applying))

    def _seal_inverse_healing(
        self, head: FileHead, delta: DeltaFileReader, temporary: Path, progress: Progress
    ) -> None:
        """Pass 1; once more if what stood in its way was damage that the replica can repair by itself.

        Damage that it cannot is marked, and the delta refused: its sender can repair it, or replace it (`damage`).
        """
        repair = HeadRepair(self._fs, self._layout, head)
        marks = damage.load(self._fs, self._layout)
        if marks.trees:
            repair.heal(marks.leaves)
        try:
            return self._seal_inverse(head, delta, temporary, progress)
        except RottenLeavesError as error:
            damage.note(self._fs, self._layout, error.leaves, error.trees)
            if not repair.heal(error.leaves, error.trees):
                raise
        except RootMismatchError:
            # A tree that rotted where the old leaves' proof does not lead gives a wrong root as well.
            changed = [change.disk_id for change in delta.disks if change.before is not None]
            if not all(repair.rebuild_tree(disk_id) for disk_id in changed):
                raise
        self._fs.unlink(temporary)
        try:
            self._seal_inverse(head, delta, temporary, progress)
        except RottenLeavesError as error:
            damage.note(self._fs, self._layout, error.leaves, error.trees)
            raise

    def _seal_inverse(self, head: FileHead, delta: DeltaFileReader, temporary: Path, progress: Progress) -> None:
        """Pass 1. Afterwards `temporary` is a complete, synced inverse and the resulting roots are proven."""
        state = self.state
        key = self._keyring.get(delta.header.key_id)
        inverse_id = DeltaId(random_id())
        with DeltaWriter(self._fs, temporary, key, state.head.replica_id, inverse_id, state.epoch) as writer:
            rotten = damage.load(self._fs, self._layout).leaves
            prepare(head, delta, writer.add, progress, rotten=rotten)
            writer.finish(base=delta.result, result=delta.base, committed=state.committed)

    def _rewrite(self, head: FileHead, delta: Delta, inverse: Delta, *, garbage: Path | None = None) -> None:
        """Passes 2 and 3 and the state: what follows once the inverse is in place. Idempotent.

        `garbage` is a file that nobody needs once the head is durable. It goes before `applying` is cleared: without
        it, a set `applying` means an untouched head, which is what the head is again.
        RootMismatchError if what was read back is not what the delta names.
        """
        with self._fs.lock(self._layout.head_lock, wait=True):
            write(head, delta)
            head.flush()
            settle(head, delta, inverse)
            head.sync()
            if garbage is not None:
                self._fs.unlink(garbage)
            self._set_state(delta.result)

    def _finish_or_undo(self, applying: DeltaId) -> None:
        """The inverse of `applying` is in place: redo from incoming, else roll back by the inverse."""
        with ExitStack() as opened:
            delta, inverse = (
                self._open_checked(path, opened)
                for path in (final_path(self._layout, applying), self._layout.point(applying))
            )
            if delta is not None and delta.base == self.state.head and self._try_redo(delta, inverse):
                self._clear_replaced(delta)
            elif inverse is not None and inverse.marks_lost:
                raise LostError(
                    f"the commit of delta {applying} in {self._layout.root} was cut, the delta cannot be read any "
                    "more, and undoing it needs content that damage had taken before",
                    hint="keep the directory as it is; all points can be restored, but for what was damaged in them",
                )
            elif inverse is not None and inverse.result == self.state.head and inverse.base.delta_id == applying:
                with self._interrupted_head(inverse.base) as head:
                    self._rewrite(head, inverse, _AllData(inverse), garbage=self._layout.point(applying))
            else:
                raise DamageError(
                    f"the commit of delta {applying} in {self._layout.root} was cut, and neither the delta nor its "
                    "inverse can be read any more",
                    hint="keep the directory as it is; points older than the newest can still be restored",
                )
        self._fs.unlink(final_path(self._layout, applying))

    def _open_checked(self, path: Path, opened: ExitStack) -> DeltaFileReader | None:
        """A delta file that is durable and whole to the last bit; None if it is damaged or not there."""
        if not self._fs.exists(path):
            return None
        with self._fs.open(path, write=True) as file:
            file.sync()
        try:
            reader = opened.enter_context(self._open(path))
            reader.verify()
        except DamageError:
            return None
        return reader

    def _try_redo(self, delta: DeltaFileReader, inverse: DeltaFileReader | None) -> bool:
        """Do the writes again; False if what is read back afterwards is not what the delta names."""
        with self._interrupted_head(delta.result) as head:
            try:
                self._rewrite(head, delta, inverse if inverse is not None else _AllData(delta))
            except (DamageError, ImageError):
                return False
        return True

    def _interrupted_head(self, other: State) -> FileHead:
        return FileHead.open_interrupted(self._fs, self._layout, self.state.head, other, self._head_format)

    def _set_state(self, head: State, *, applying: DeltaId | None = None) -> None:
        committed = self.state.committed if head == self.state.head else self._now()
        state = msgspec.structs.replace(
            self.state, head=head, applying=applying, committed=committed, serial=self.state.serial + 1
        )
        save_state(self._fs, self._layout, state)
        self.state = state


class _AllData:
    """The extents of a delta as if all of them held data.

    `settle` re-reads what the other direction wrote; where that delta can't be
    read any more, everything the present one covers may have been written.
    """

    def __init__(self, delta: Delta) -> None:
        self._delta = delta
        self.delta_id = delta.delta_id
        self.base = delta.result
        self.result = delta.base
        self.disks: tuple[DiskChange, ...] = delta.disks
        self.marks_lost = False

    def segments(self) -> Iterator[Segment]:
        raise ReplicaError("only the extents of this delta are known")

    def extents(self) -> Iterator[tuple[int, Rows]]:
        for disk, rows in self._delta.extents():
            marked = rows.copy()
            marked["data"] = 1
            yield disk, marked


__all__ = ["Committer"]
