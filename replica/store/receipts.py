"""The receipts of one replica: issued after commits, chained, kept as long as their points.

    receipts/<delta id>          the receipt of the point that this delta made
    receipts/<delta id>.links    body digests of the receipts before it that went with their points, 32 bytes each

A receipt is issued when the commit is behind it: changed leaves read back, state
durable. If a crash or a missing key comes in between, it is issued later: at
the next start, or after the next commit. The points that lack one get theirs
oldest first, the head's last; so a head with a receipt means that no older
point waits for one, and nobody has to look. A commit never fails for want of a
receipt: `trouble` says why one could not be issued.

Order, so that a crash anywhere leaves a chain that can be checked: a receipt
gets its name when its bytes are durable. When receipts go (`forget`), the
`.links` of the next one that stays are replaced first; they may then name
receipts that are still there, and a check uses as many as it needs. The oldest
listed point needs no links. So what is kept is bounded by the listed points and
32 bytes for each commit since the oldest of them.

A receipt that is there is never replaced. One that is damaged stays as it is and
is named; what is issued next names no predecessor, and a check says so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable
from enum import StrEnum
from pathlib import Path
from uuid import UUID

import msgspec

from replica.durable import FileSystem
from replica.errors import FormatError, ReplicaError
from replica.model import DIGEST_BYTES, DeltaId, Stamp, State
from replica.receipt import MAX_RECEIPT_BYTES, NO_LINK, Receipt, SignedReceipt, parse
from replica.signing import key_id_of, sign
from replica.store.layout import Layout
from replica.store.receipt_key import ReceiptKey

LINKS = ".links"
MAX_LINKS_BYTES = 1 << 30
log = logging.getLogger(__name__)


class ReceiptWord(StrEnum):
    """What there is of a point, in a word."""

    PROVEN = "proven"  # signed, and every leaf was read at this very point
    SIGNED = "signed"
    MISSING = "missing"  # not issued yet
    DAMAGED = "damaged"  # the file is no receipt, or of another state


class ReceiptFiles:
    """Reads `receipts/`, from any process. Thread-safe."""

    def __init__(self, fs: FileSystem, layout: Layout) -> None:
        self._fs = fs
        self._layout = layout

    def names(self) -> list[DeltaId]:
        return [found for name in self._fs.list_names(self._layout.receipts) if (found := _id(name)) is not None]

    def has(self, delta_id: DeltaId) -> bool:
        return self._fs.exists(self._layout.receipt(delta_id))

    def read(self, delta_id: DeltaId) -> SignedReceipt:
        """FormatError if the file is none, or of another point; StorageError if it is not there."""
        path = self._layout.receipt(delta_id)
        signed = parse(self._fs.read_bytes(path, MAX_RECEIPT_BYTES), str(path))
        if signed.receipt.delta_id != delta_id:
            raise FormatError(f"{path} is the receipt of another point")
        return signed

    def links(self, delta_id: DeltaId) -> bytes:
        path = self._links_path(delta_id)
        return self._fs.read_bytes(path, MAX_LINKS_BYTES) if self._fs.exists(path) else b""

    def all(self) -> list[SignedReceipt]:
        """Those that can be read, in the order of their numbers."""
        return self.look()[0]

    def look(self) -> tuple[list[SignedReceipt], list[Path]]:
        """Those that can be read, in the order of their numbers; and the files that are damaged."""
        found, damaged = [], []
        for delta_id in self.names():
            try:
                found.append(self.read(delta_id))
            except FormatError as error:
                log.warning("%s", error)
                damaged.append(self._layout.receipt(delta_id))
        return sorted(found, key=lambda signed: signed.receipt.serial), sorted(damaged)

    def word(self, state: State) -> ReceiptWord:
        """What there is of a point."""
        if not self.has(state.delta_id):
            return ReceiptWord.MISSING
        try:
            receipt = self.read(state.delta_id).receipt
        except FormatError:
            return ReceiptWord.DAMAGED
        if not receipt.describes(state):
            return ReceiptWord.DAMAGED
        return ReceiptWord.PROVEN if receipt.proven else ReceiptWord.SIGNED

    def _links_path(self, delta_id: DeltaId) -> Path:
        path = self._layout.receipt(delta_id)
        return path.with_name(path.name + LINKS)


class ReceiptBook(ReceiptFiles):
    """Issues and drops the receipts of one replica. Its owner lets one thread in at a time.

    `points` lists the replica's points, oldest first, and when they were committed; asked only when the head's
    receipt is missing.
    """

    def __init__(
        self,
        fs: FileSystem,
        layout: Layout,
        key: ReceiptKey,
        machine: str,
        points: Callable[[], Iterable[tuple[State, Stamp]]],
    ) -> None:
        super().__init__(fs, layout)
        self._key = key
        self._machine = machine
        self._points = points
        self._newest: SignedReceipt | None = None
        self._known: dict[DeltaId, tuple[int, bytes]] | None = None
        """Number and body digest of every readable receipt, once somebody had to know."""
        self.trouble: ReplicaError | None = None

    def committed(self, head: State, at: Stamp) -> None:
        """Issue what is missing. Never raises for want of it: `trouble` says what was in the way."""
        newest = self._newest
        try:
            if newest is not None and newest.receipt.point == head.point - (not head.partial):
                if head.is_point:
                    self._issue(head, at, newest)  # the usual case: nothing before it can be missing
            elif head.point and not (head.is_point and self.has(head.delta_id)):
                self._issue_missing()
            self.trouble = None
        except ReplicaError as error:
            log.warning("no receipt for point %d of machine %r yet: %s", head.point, self._machine, error)
            self.trouble, self._newest = error, None

    def newest(self, head: State) -> SignedReceipt | None:
        """The receipt of the head, for the answer to its sender; None while there is none. Thread-safe."""
        known = self._newest
        if known is not None and known.receipt.delta_id == head.delta_id:
            return known
        try:
            return self.read(head.delta_id) if head.is_point and self.has(head.delta_id) else None
        except ReplicaError:
            return None

    def _issue_missing(self) -> None:
        """After a start, a crash or a key that was away: look at every point. What a cut left is cleared."""
        for name in self._fs.list_names(self._layout.receipts):
            if name.startswith("."):
                self._fs.unlink(self._layout.receipts / name)
        receipts, count = self.all(), len(self.names())
        last = receipts[-1] if receipts else None
        broken = False
        for state, at in self._points():
            if not self.has(state.delta_id):
                last = self._issue(state, at, last, broken_after=count if broken else 0)
            broken = self.word(state) is ReceiptWord.DAMAGED
        self._newest = last

    def _issue(self, state: State, at: Stamp, before: SignedReceipt | None, *, broken_after: int = 0) -> SignedReceipt:
        """`broken_after`: the receipt that should be named as the one before is damaged, one of so many; then the
        chain begins anew, since two receipts must not name the same predecessor."""
        key = self._key.get()
        receipt = Receipt.of(state, self._machine, key_id_of(key.public_key()), at.wall_ns or time.time_ns(), before)
        if broken_after:
            serial = receipt.serial + broken_after
            receipt = msgspec.structs.replace(receipt, serial=serial, previous=NO_LINK)
        signed = sign(receipt, key)
        self._fs.make_directory(self._layout.receipts)
        self._fs.replace_bytes(self._layout.receipt(state.delta_id), signed.data)
        self._newest = signed
        if self._known is not None:
            self._known[state.delta_id] = (receipt.serial, signed.body_digest)
        return signed

    def keep_only(self, points: Collection[DeltaId], most: int) -> bool:
        """Drop receipts that are not of one of these points, at most so many; also those that a crash left behind.
        False: there are more of them."""
        gone = [delta_id for delta_id in self.names() if delta_id not in points]
        if len(gone) > most:
            known = self._all_known()
            gone.sort(
                key=lambda delta_id: known.get(delta_id, (0, b""))[0]
            )  # the oldest first, as digests are handed on
        self.forget(gone[:most])
        return len(gone) <= most

    def forget(self, delta_ids: Collection[DeltaId]) -> None:
        """Drop the receipts of points that are gone. Again after a crash: no change. StorageError."""
        if not delta_ids:
            return
        known = self._all_known()
        gone = set(delta_ids)
        self._keep_links(gone)
        for delta_id in gone:
            self._fs.unlink(self._links_path(delta_id))
            self._fs.unlink(self._layout.receipt(delta_id))
            known.pop(delta_id, None)

    def _all_known(self) -> dict[DeltaId, tuple[int, bytes]]:
        if self._known is None:
            self._known = {s.receipt.delta_id: (s.receipt.serial, s.body_digest) for s in self.all()}
        return self._known

    def _keep_links(self, gone: set[DeltaId]) -> None:
        """Hand the digests of what goes to the next receipt that stays, if an older one stays, too."""
        known = self._all_known()
        before: int | None = None
        run: list[DeltaId] = []
        for delta_id in sorted(known, key=lambda i: known[i][0]):
            if delta_id in gone:
                run.append(delta_id)
                continue
            serial = known[delta_id][0]
            if run and before is None:
                self._fs.unlink(self._links_path(delta_id))
            elif run and before is not None:
                held, size = self.links(delta_id), (serial - before - 1) * DIGEST_BYTES
                if size > len(held):
                    digests = b"".join(self.links(other) + known[other][1] for other in run) + held
                    self._fs.replace_bytes(self._links_path(delta_id), digests[-size:])
            before, run = serial, []


def _id(name: str) -> DeltaId | None:
    try:
        found = UUID(name)
    except ValueError:
        return None
    return DeltaId(found) if str(found) == name else None
