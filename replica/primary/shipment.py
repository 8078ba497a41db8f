"""A delta on its way: begun, its segments sent by a thread of its own, committed.

    with Shipment(fs, directory, receiver, sealer, …) as shipment:
        shipment.begin()                     # refused? then nothing was frozen yet
        shipment.put(sealed) …               # from the reader, which never waits for the link (see `spool`)
        shipment.wait_sent()
        info = shipment.commit(result)

After a cut the delta is begun again under the same id: the receiver answers what
it has, and only what is missing is sent again, from the very bytes that were
sealed. If it has lost what it had acknowledged, those bytes are gone and the
delta is given up; the next one has another id and another key.

Leaving never waits for the link: a call that does not end by itself is aborted,
and whatever happens the spool is closed when nobody uses it any more, by the
sending thread itself if it must be.

Left before `commit` was asked for, the delta is discarded at the receiver (it
would otherwise go with the next one). Once it was asked for, nobody here can
know what became of it, and nothing is discarded: the next contact decides.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from replica.delta import HEADER_BYTES, DeltaSealer, SealedSegment, SegmentEntry
from replica.durable import FileSystem
from replica.errors import BusyError, ProtocolError, ReplicaError, StorageError, TransportError
from replica.model import DeltaId, Epoch, State
from replica.primary.retry import Patience, Stopped
from replica.primary.spool import Spool
from replica.transport.api import Receiver
from replica.transport.wire import Begin, ReplicaInfo

COMMIT_WAIT_SECONDS = 5.0
"""How long one commit call may block: also the longest a stop has to wait here."""
FIRST_POLL_SECONDS, LAST_POLL_SECONDS = 0.2, 5.0
"""Pauses between two looks at whether the receiver is done."""
_GRACE_SECONDS = 0.5
"""What the call that the sending thread is in may take to end by itself when the shipment is left."""
_JOIN_SECONDS = 5.0


class Shipment:
    """One delta and the thread that sends it. `receiver` is used by that thread from `begin` until `wait_sent`."""

    def __init__(
        self,
        fs: FileSystem,
        directory: Path,
        receiver: Receiver,
        sealer: DeltaSealer,
        delta_id: DeltaId,
        base: State,
        epoch: Epoch,
        patience: Patience,
    ) -> None:
        self.delta_id = delta_id
        self._receiver, self._sealer, self._patience = receiver, sealer, patience
        self._base, self._replica_id = base, base.replica_id
        self._begin = Begin(base.delta_id, epoch, sealer.header)
        self._spool = Spool(fs, directory)
        self._entries: list[SegmentEntry] = []
        self._offset = HEADER_BYTES
        self._arrived = 0
        self._sender: threading.Thread | None = None
        self._begun = self._commit_asked = False
        self._leaving = threading.Lock()
        self._sending = self._abandoned = False

    def begin(self) -> None:
        """Open the delta at the receiver and start sending whatever is put from now on."""
        self._patience.call(self._begin_again)
        self._begun = self._sending = True
        self._sender = threading.Thread(target=self._send, name=f"send-{self.delta_id}", daemon=True)
        self._sender.start()

    def put(self, sealed: SealedSegment) -> None:
        """The next segment, in number order; its place in the file is behind the one before.

        Waits only while the spool is full. Raises what ended the sending.
        """
        entry = SegmentEntry.of(sealed, self._offset)
        self._entries.append(entry)
        self._offset += entry.length
        self._spool.put(sealed, entry.offset)

    @property
    def waiting_bytes(self) -> int:
        """Sealed, but not yet at the receiver."""
        return self._spool.waiting_bytes

    def check(self) -> None:
        """Cheap: raise what ended the sending, if it has ended early."""
        self._spool.check()

    def wait_sent(self, watch: Callable[[], None] = lambda: None) -> None:
        """Everything was put: wait until the receiver has it all, calling `watch` now and then."""
        assert self._sender is not None
        self._spool.end()
        while self._sender.is_alive():
            self._sender.join(0.1)
            watch()
        self._spool.check()

    def commit(self, result: State, limit_seconds: float) -> ReplicaInfo:
        """Ask for the commit and wait until it is done. Raises what the receiver says, or TransportError.

        The manifest goes along only when the commit is asked for, and that is done again only when the receiver is
        not at it and has not done it. BusyError if it still is after `limit_seconds`. Whatever is raised: the
        receiver may have committed.
        """
        tail = self._sealer.tail(self._entries, self._base, result)
        deadline = time.monotonic() + limit_seconds
        delay = FIRST_POLL_SECONDS
        self._commit_asked = True
        self._patience.check()
        while True:
            info = self._patience.call(lambda: self._ask_commit(tail))
            applying = True
            while info is None and applying:
                if time.monotonic() + delay > deadline:
                    raise BusyError(
                        f"the receiver still applies delta {self.delta_id} after {limit_seconds:g} s",
                        hint="look at the receiver's disks; the next sync goes on from whatever comes of it",
                    )
                self._patience.pause(delay)
                delay = min(2 * delay, LAST_POLL_SECONDS)
                seen = self._patience.call(lambda: self._receiver.replica(self._replica_id))
                applying = seen.applying == self.delta_id
                if not applying and seen.head.delta_id == self.delta_id:
                    info = seen
            if info is not None:
                return info

    def _ask_commit(self, tail: bytes) -> ReplicaInfo | None:
        return self._receiver.commit(
            self._replica_id, self.delta_id, tail, self._offset, wait_seconds=COMMIT_WAIT_SECONDS
        )

    # --- the sending thread ---

    def _send(self) -> None:
        """Send all that is put; after a cut begin again. Only a segment that arrived counts as success."""
        begun = True
        try:
            while True:
                self._arrived = 0
                try:
                    if not begun:
                        self._spool.check()
                        self._begin_again()
                    self._send_held()
                    return
                except (TransportError, BusyError) as error:
                    self._patience.failed(error)
                except ProtocolError:
                    if begun and not self._arrived:  # begun just now, and not known all the same
                        raise
                begun = False
        except BaseException as error:  # noqa: BLE001 - raised again by whoever puts, checks or waits
            self._spool.fail(error)
        finally:
            with self._leaving:
                self._sending = False
                if self._abandoned:
                    self._spool.close()

    def _send_held(self) -> None:
        for held in self._spool:
            self._patience.check()
            blob = self._spool.blob(held)
            self._receiver.put_segment(self._replica_id, self.delta_id, held.number, held.offset, held.digest, blob)
            self._spool.drop(held.number)
            self._patience.succeeded()
            self._arrived += 1

    def _begin_again(self) -> None:
        """Begin, and take the receiver's word for what it has; what it has lost, nobody has."""
        begun = self._receiver.begin(self._replica_id, self.delta_id, self._begin)
        lost = self._spool.acknowledge(begun.received)
        if lost:
            raise StorageError(
                f"the receiver lost {lost} segments of delta {self.delta_id} that it had acknowledged",
                hint="nothing was committed; the next sync ships what changed in a new delta",
            )

    # --- leaving ---

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._spool.fail(error or Stopped())
        answers = self._end_sending() and not isinstance(error, TransportError)
        if self._begun and not self._commit_asked and answers:
            with suppress(ReplicaError):
                self._receiver.discard(self._replica_id, self.delta_id)

    def _end_sending(self) -> bool:
        """End the sending thread and close the spool. False if the receiver had to be cut off for that."""
        if self._sender is None:
            self._spool.close()
            return True
        self._sender.join(_GRACE_SECONDS)
        in_time = not self._sender.is_alive()
        deadline = time.monotonic() + _JOIN_SECONDS
        while self._sender.is_alive() and time.monotonic() < deadline:
            self._receiver.abort()
            self._sender.join(_GRACE_SECONDS)
        with self._leaving:
            self._abandoned = self._sending
            if not self._abandoned:
                self._spool.close()
        return in_time
