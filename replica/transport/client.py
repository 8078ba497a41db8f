"""The sender's end of the wire: `api.Receiver` over HTTPS, synchronous, on one connection.

    receiver = HttpReceiver("https://dr-1.example.org:8443", tls)
    receiver.replicas("web-1")

Each call is one request (see `connection` for repeats and time limits). Not
thread-safe: one `HttpReceiver` per thread; several of them may work on the
same delta.
"""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote

from replica.model import DeltaId, DiskId, Epoch, Frozen, ReplicaId
from replica.transport import wire
from replica.transport.connection import ANSWER_SECONDS, Connection
from replica.transport.tls import TlsFiles
from replica.transport.wire import (
    Adopt,
    Begin,
    Begun,
    Enrol,
    GrainQuery,
    PointSummary,
    ReplicaInfo,
    StillDamaged,
    TreeQuery,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

T = TypeVar("T")


class HttpReceiver:
    """A replica site at `url` (https://host[:port][/path]). Implements `Receiver` and `PointSource`."""

    def __init__(self, url: str, tls: TlsFiles, *, answer_seconds: float = ANSWER_SECONDS) -> None:
        """`answer_seconds`: how long the other side may be silent. Connects at the first call."""
        self.url = url.rstrip("/")
        self._tls = tls
        self._answer_seconds = answer_seconds
        self._connection = Connection(url, tls, answer_seconds)
        self._bytes_of_reads = 0

    @property
    def bytes_sent(self) -> int:
        """HTTP bytes written so far, before TLS, request lines and headers and repeats included."""
        return self._connection.bytes_sent + self._bytes_of_reads

    def close(self) -> None:
        """Close the connection; the next call opens a new one."""
        self._connection.close()

    def abort(self) -> None:
        """Thread-safe: the call that another thread is in fails now."""
        self._connection.abort()

    # --- Receiver ---

    def replicas(self, machine: str = "") -> list[ReplicaInfo]:
        query = f"?machine={quote(machine, safe='')}" if machine else ""
        return self._ask("GET", f"/v1/replicas{query}", list[ReplicaInfo])

    def replica(self, replica_id: ReplicaId) -> ReplicaInfo:
        return self._ask("GET", f"/v1/replicas/{replica_id}", ReplicaInfo)

    def enrol(self, replica_id: ReplicaId, enrol: Enrol) -> ReplicaInfo:
        return self._ask("PUT", f"/v1/replicas/{replica_id}", ReplicaInfo, enrol)

    def adopt(self, replica_id: ReplicaId, adopt: Adopt) -> ReplicaInfo:
        return self._ask("POST", f"/v1/replicas/{replica_id}/adopt", ReplicaInfo, adopt)

    def begin(self, replica_id: ReplicaId, delta_id: DeltaId, begin: Begin) -> Begun:
        return self._ask("PUT", _delta(replica_id, delta_id), Begun, begin)

    def put_segment(
        self, replica_id: ReplicaId, delta_id: DeltaId, number: int, offset: int, digest: bytes, blob: Buffer
    ) -> None:
        body = (wire.encode_frame(number, offset, digest, blob), blob)
        self._connection.exchange("PUT", f"{_delta(replica_id, delta_id)}/segments/{number}", body)

    def commit(
        self, replica_id: ReplicaId, delta_id: DeltaId, tail: bytes, tail_offset: int, wait_seconds: float
    ) -> ReplicaInfo | None:
        body = (wire.encode_frame(wire.TAIL_NUMBER, tail_offset, wire.digest_of(tail), tail), tail)
        wait = min(max(0, round(wait_seconds)), wire.MAX_WAIT_SECONDS)
        path = f"{_delta(replica_id, delta_id)}/commit"
        status, answer = self._connection.exchange("POST", path, body, {"Prefer": f"wait={wait}"}, wait)
        return None if status == http.client.ACCEPTED else wire.decode(answer, ReplicaInfo, f"the answer of {self.url}")

    def discard(self, replica_id: ReplicaId, delta_id: DeltaId) -> None:
        self._connection.exchange("DELETE", _delta(replica_id, delta_id))

    def repair(
        self, replica_id: ReplicaId, disk_id: DiskId, first: int, epoch: Epoch, digest: bytes, content: Buffer
    ) -> StillDamaged:
        body = (wire.encode_frame(first, 0, digest, content), content)
        query = f"epoch={epoch.counter}&holder={epoch.holder}"
        path = f"/v1/replicas/{replica_id}/disks/{disk_id}/leaves/{first}?{query}"
        return wire.decode(self._connection.exchange("PUT", path, body)[1], StillDamaged, f"the answer of {self.url}")

    def nodes(self, replica_id: ReplicaId, disk_id: DiskId, query: TreeQuery) -> bytes:
        return self._bytes("POST", f"/v1/replicas/{replica_id}/disks/{disk_id}/tree", query)

    def grains(self, replica_id: ReplicaId, disk_id: DiskId, query: GrainQuery) -> bytes:
        return self._bytes("POST", f"/v1/replicas/{replica_id}/disks/{disk_id}/grains", query)

    # --- PointSource ---

    def points(self, replica_id: ReplicaId) -> list[PointSummary]:
        return self._ask("GET", f"/v1/replicas/{replica_id}/points", list[PointSummary])

    def read(
        self, replica_id: ReplicaId, point: int, disk_id: DiskId, offset: int = 0, length: int | None = None
    ) -> Iterator[bytes]:
        """On a connection of its own, which ends with the iterator; other calls may go on meanwhile."""
        if length == 0:
            return
        end = "" if length is None else str(offset + length - 1)
        other = Connection(self.url, self._tls, self._answer_seconds)
        path = f"/v1/replicas/{replica_id}/points/{point}/disks/{disk_id}"
        try:
            yield from other.stream(path, f"bytes={offset}-{end}")
        finally:
            other.close()
            self._bytes_of_reads += other.bytes_sent

    def receipt(self, replica_id: ReplicaId, point: int) -> bytes:
        return self._connection.exchange("GET", f"/v1/replicas/{replica_id}/points/{point}/receipt")[1]

    def tree(self, replica_id: ReplicaId, disk_id: DiskId, level: int, first: int, count: int) -> bytes:
        query = f"level={level}&first={first}&count={count}"
        return self._connection.exchange("GET", f"/v1/replicas/{replica_id}/disks/{disk_id}/tree?{query}")[1]

    def _ask(self, method: str, path: str, kind: type[T], document: Frozen | None = None) -> T:
        body = () if document is None else (wire.encode(document),)
        headers = {} if document is None else {"Content-Type": wire.DOCUMENT_TYPE}
        return wire.decode(self._connection.exchange(method, path, body, headers)[1], kind, f"the answer of {self.url}")

    def _bytes(self, method: str, path: str, document: Frozen) -> bytes:
        body = (wire.encode(document),)
        return self._connection.exchange(method, path, body, {"Content-Type": wire.DOCUMENT_TYPE})[1]


def _delta(replica_id: ReplicaId, delta_id: DeltaId) -> str:
    return f"/v1/replicas/{replica_id}/deltas/{delta_id}"
