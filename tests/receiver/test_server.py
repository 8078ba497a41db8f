"""The receiver over its socket: limits, problems, ranges, slow clients and an orderly end."""

from __future__ import annotations

import http.client
import json
import logging
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest

from replica.durable import FileSystem
from replica.errors import ListenError, TransportError, UnknownMachineError
from replica.model import DeltaId, DiskId, ReplicaId, random_id
from replica.receiver import bodies, http_api, listener, reading, server, workers
from replica.receiver.site import Site
from replica.transport import wire
from replica.transport.client import HttpReceiver
from replica.transport.tls import client_context
from replica.transport.wire import Enrol, digest_of
from tests.receiver.loopback import Loopback, Pki, site_spec
from tests.receiver.memory_stores import (
    DISK,
    MemoryPoint,
    MemoryReader,
    MemoryStore,
    MemoryStores,
    content,
    new_key,
    next_state,
    tail_of,
)


class Receiver:
    """A served site, one enrolled replica and a client for it."""

    def __init__(self, pki: Pki, storage: Path) -> None:
        self.pki = pki
        self.stores = MemoryStores()
        self.spec = site_spec(storage, pki.files("dr-1", ("localhost", "127.0.0.1")))
        self.loopback = Loopback(self.spec, lambda: Site(FileSystem(), self.spec, stores=self.stores))

    def start(self) -> None:
        self.loopback.__enter__()
        self.client = self.loopback.client(self.pki.files("hv-1"))
        self.id = ReplicaId(random_id())
        key = new_key()
        enrol = Enrol("web-1", key.id, key.secret, wire.Epoch(0, random_id()))
        self.client.enrol(self.id, enrol)
        self.store = self.stores.all[self.id]

    def stop(self) -> None:
        self.store.gate.set()
        self.client.close()
        self.loopback.stop()

    def connection(self) -> http.client.HTTPSConnection:
        context = client_context(self.pki.files("hv-1"))
        return http.client.HTTPSConnection("localhost", self.loopback.port, context=context, timeout=20)

    def raw(self) -> ssl.SSLSocket:
        plain = socket.create_connection(("localhost", self.loopback.port), 20)
        return client_context(self.pki.files("hv-1")).wrap_socket(plain, server_hostname="localhost")

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> http.client.HTTPResponse:
        connection = self.connection()
        with closing(connection):
            connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
            response = connection.getresponse()
            response.data = response.read()  # type: ignore[attr-defined]
        return response

    def lets_go(self) -> bool:
        """Whether every point that was read is closed, soon."""
        deadline = time.monotonic() + 10
        while self.stores.open_points and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.stores.open_points == 0

    def begin(self) -> tuple[DeltaId, wire.State]:
        state = next_state(self.store.head, self.store.epoch)
        self.client.begin(self.id, state.delta_id, wire.Begin(self.store.head.delta_id, self.store.epoch, bytes(160)))
        return state.delta_id, state

    def cycle(self) -> None:
        delta_id, state = self.begin()
        assert self.client.commit(self.id, delta_id, tail_of(state), 160, 10) is not None


@pytest.fixture
def receiver(pki: Pki, tmp_path: Path) -> Iterator[Receiver]:
    made = Receiver(pki, tmp_path)
    made.start()
    yield made
    made.stop()


def problem_of(response: http.client.HTTPResponse) -> wire.Problem:
    assert response.headers.get_content_type() == "application/problem+json"
    problem = wire.decode(response.data, wire.Problem, "it")  # type: ignore[attr-defined]
    assert problem.status == response.status
    return problem


# --- problems ---


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "protocol"),
        ("GET", "/v1/replicas/no-id", 400, "protocol"),
        ("GET", "/v1/replicas/00000000-0000-0000-0000-00000000000A", 400, "protocol"),
        ("GET", "/v1/replicas/00000000-0000-0000-0000-000000000001", 404, "unknown-machine"),
        ("PATCH", "/v1/replicas", 405, "protocol"),
        ("HEAD", "/v1/replicas", 405, None),
        ("GET", "/v1/replicas/{id}/points/1/disks/os", 404, "point-gone"),
        ("GET", "/v1/replicas/{id}/points/x/disks/os", 400, "protocol"),
        ("GET", "/v1/replicas/{id}/disks/{disk}/tree", 400, "protocol"),
        ("GET", "/v1/replicas/{id}/disks/{disk}/tree?level=0&first=0&count=-1", 400, "protocol"),
        ("DELETE", "/v1/replicas/{id}", 405, "protocol"),
    ],
)
def test_every_failure_is_a_problem_document(
    receiver: Receiver, method: str, path: str, status: int, code: str | None
) -> None:
    response = receiver.ask(method, path.format(id=receiver.id, disk=DISK.id))
    assert response.status == status
    if code is not None:
        assert problem_of(response).type == f"urn:replica:error:{code}"


def test_a_fault_in_the_engine_tells_nothing_of_its_inside(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(receiver.stores, "reader", lambda directory: 1 // 0)
    response = receiver.ask("GET", f"/v1/replicas/{receiver.id}/points")
    problem = problem_of(response)
    assert (problem.status, problem.type) == (500, "urn:replica:error:internal")
    assert "division" not in problem.detail
    assert "ZeroDivisionError" in caplog.text


def test_a_path_makes_no_lines_in_the_log(receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    forged = "2026-01-01T00:00:00Z%20ERROR%20replica%20web-1%20is%20lost"
    for path in (f"/v1/replicas/x%0a{forged}", f"/x%0d%0a{forged}", f"/v1/replicas/{receiver.id}/points/%0a{forged}"):
        receiver.ask("GET", path)
        with closing(receiver.connection()) as connection:
            connection.request("PUT", path, b"x")
            connection.getresponse().read()
    assert "%0a" in caplog.text
    assert all("\n" not in record.getMessage() for record in caplog.records)


def test_an_enrolment_leaves_room_for_its_epoch_to_grow(receiver: Receiver) -> None:
    """With the largest there is, adopting would be a fault for ever."""
    body = wire.encode(Enrol("web-2", new_key().id, bytes(32), wire.Epoch(1 << 62, random_id())))
    for counter in ((1 << 62) + 1, (1 << 63) - 1):
        path = f"/v1/replicas/{random_id()}"
        response = receiver.ask("PUT", path, body.replace(str(1 << 62).encode(), str(counter).encode()))
        assert problem_of(response).status == 400
    replica_id = ReplicaId(random_id())
    assert receiver.ask("PUT", f"/v1/replicas/{replica_id}", body).status == 200
    expected = receiver.client.replica(replica_id).epoch
    assert receiver.client.adopt(replica_id, wire.Adopt(expected, random_id())).epoch.counter == (1 << 62) + 1


def test_what_is_no_http_is_answered_with_400(receiver: Receiver) -> None:
    with receiver.raw() as raw:
        raw.sendall(b"\x00\x01\x02 nonsense\r\n\r\n")
        assert b" 400 Bad Request" in raw.recv(100)


# --- limits ---

SEGMENT = "/v1/replicas/{}/deltas/{}/segments/0"


def test_a_segment_body_has_a_limit_that_is_checked_before_it_is_read(receiver: Receiver) -> None:
    with receiver.raw() as raw:
        path = SEGMENT.format(receiver.id, random_id())
        raw.sendall(f"PUT {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {(16 << 20) + 1}\r\n\r\n".encode())
        assert raw.recv(100).startswith(b"HTTP/1.1 413")


def test_a_document_has_a_limit(receiver: Receiver) -> None:
    response = receiver.ask("PUT", f"/v1/replicas/{random_id()}", b" " * (wire.MAX_DOCUMENT_BYTES + 1))
    assert problem_of(response).status == 413


def test_a_body_needs_a_length_and_no_encoding(receiver: Receiver) -> None:
    path = SEGMENT.format(receiver.id, random_id())
    assert problem_of(receiver.ask("PUT", path, b"0\r\n\r\n", Transfer_Encoding="chunked")).status == 411
    assert problem_of(receiver.ask("PUT", path, b"x", Content_Encoding="gzip")).status == 415


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/replicas/{id}/adopt"),
        ("PUT", "/v1/replicas/{id}/deltas/{delta}"),
        ("PUT", "/v1/replicas/{id}/deltas/{delta}/segments/0"),
        ("POST", "/v1/replicas/{id}/deltas/{delta}/commit"),
    ],
)
def test_an_empty_body_is_refused(receiver: Receiver, method: str, path: str) -> None:
    response = receiver.ask(method, path.format(id=receiver.id, delta=random_id()), b"")
    assert problem_of(response).status == 400


def test_a_head_has_a_limit(receiver: Receiver) -> None:
    assert receiver.ask("GET", "/v1/replicas", None, X_Long="x" * 5000).status == 400
    assert receiver.ask("GET", "/v1/replicas?machine=" + "x" * 5000).status in (400, 414)


def test_a_body_that_comes_too_slowly_is_given_up(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "IDLE_SECONDS", 0.2)
    path = SEGMENT.format(receiver.id, random_id())
    with receiver.raw() as raw:
        raw.sendall(f"PUT {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc".encode())
        assert raw.recv(100).startswith(b"HTTP/1.1 503")


def test_a_body_that_drips_is_given_up(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "GRACE_SECONDS", 0.3)
    path = SEGMENT.format(receiver.id, random_id())
    with receiver.raw() as raw:
        raw.sendall(f"PUT {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n".encode())
        started = time.monotonic()
        raw.settimeout(0.05)
        data = b""
        while not data and time.monotonic() < started + 10:
            with suppress(TimeoutError):
                raw.sendall(b"x")
                data = raw.recv(100)
        assert data.startswith(b"HTTP/1.1 503")


def test_a_head_that_does_not_come_is_given_up(pki: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "KEEP_ALIVE_SECONDS", 0.3)
    made = Receiver(pki, tmp_path)
    made.start()
    for sent in (b"", b"GET /v1/replicas HTTP/1.1\r\nHost:"):
        with made.raw() as raw:
            raw.sendall(sent)
            with suppress(ssl.SSLEOFError, ConnectionError):
                assert raw.recv(100) == b""
    made.stop()


def is_reset(port: int) -> bool:
    """Whether one more connection is thrown out before a word of TLS; an accepted one waits for the client."""
    try:
        with socket.create_connection(("127.0.0.1", port), 20) as plain:
            plain.settimeout(0.5)
            return plain.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionResetError:
        return True


def test_connections_are_counted_before_their_handshake(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Clients that say nothing at all take places, too; one more is reset, and a place is free again when one goes."""
    monkeypatch.setattr(listener, "MAX_OF_ADDRESS", 3)
    receiver.client.replicas()
    port = receiver.loopback.port
    silent = [socket.create_connection(("127.0.0.1", port), 20) for _ in range(2)]
    assert all(is_reset(port) for _ in range(5))
    assert [r.getMessage() for r in caplog.records if "reset" in r.getMessage()] == [
        "connections are reset: 3 of 127.0.0.1 are open"
    ]
    receiver.client.replicas()
    for plain in silent:
        plain.close()
    deadline = time.monotonic() + 10
    while is_reset(port):
        assert time.monotonic() < deadline
    with closing(receiver.loopback.client(receiver.pki.files("hv-1"))) as another:
        assert len(another.replicas()) == 1


def test_all_connections_together_have_a_limit(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "MAX_CONNECTIONS", 1)
    receiver.client.replicas()
    assert is_reset(receiver.loopback.port)
    receiver.client.replicas()


@pytest.mark.parametrize(
    ("address", "key"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3::7", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_connections_are_counted_by_address_or_network(address: str, key: str) -> None:
    assert listener.address_key(address) == key


def test_a_body_of_who_may_not_send_it_is_not_read(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A certificate without an [[allow]] entry, and a replica of somebody else: no room is taken for either."""
    asked: list[str] = []
    monkeypatch.setattr(bodies.BodyBudget, "hold", lambda self, identity, count: asked.append(identity))
    path = f"/v1/replicas/{receiver.id}/deltas/{random_id()}/commit"
    for name in ("nas-1", "hv-2"):
        context = client_context(receiver.pki.files(name))
        plain = socket.create_connection(("localhost", receiver.loopback.port), 20)
        with context.wrap_socket(plain, server_hostname="localhost") as raw:
            raw.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {32 << 20}\r\n\r\nabc".encode())
            assert raw.recv(100).startswith(b"HTTP/1.1 403")
    assert asked == []


def test_a_replica_that_hangs_leaves_the_others_their_workers(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "TURN_SECONDS", 0.2)
    hangs, go_on = threading.Event(), threading.Event()
    reader = receiver.stores.reader

    def slow(directory: Path) -> MemoryReader:
        if directory.name == str(receiver.id):
            hangs.set()
            go_on.wait(30)
        return reader(directory)

    monkeypatch.setattr(receiver.stores, "reader", slow)
    path = f"/v1/replicas/{receiver.id}/points"
    asked = [threading.Thread(target=receiver.ask, args=("GET", path)) for _ in range(http_api.WORKERS + 4)]
    try:
        for thread in asked:
            thread.start()
        assert hangs.wait(10)
        time.sleep(0.5)
        assert receiver.client.replicas() != []
        assert problem_of(receiver.ask("GET", path)).type == "urn:replica:error:busy"
    finally:
        go_on.set()
        for thread in asked:
            thread.join()


def test_the_end_does_not_wait_for_storage_that_hangs(
    pki: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "END_SECONDS", 0.5)
    monkeypatch.setattr(server, "LEAST_SECONDS", 0.2)
    made = Receiver(pki, tmp_path)
    made.start()
    go_on = threading.Event()
    monkeypatch.setattr(MemoryStore, "close", lambda self: go_on.wait(30))
    started = time.monotonic()
    made.loopback.stop()
    assert time.monotonic() - started < 10
    go_on.set()
    made.client.close()


def test_many_large_bodies_at_once_stay_within_the_budget(
    pki: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve connections with 4 MiB each, and room for 8 MiB: all arrive, never more than two are here at once."""
    most = 0

    class Small(bodies.BodyBudget):
        def __init__(self) -> None:
            super().__init__(8 << 20)

        def _grant(self) -> None:
            nonlocal most
            super()._grant()
            most = max(most, self.total_bytes - self.free_bytes)

    monkeypatch.setattr(http_api, "BodyBudget", Small)
    receiver = Receiver(pki, tmp_path)
    receiver.start()
    delta_id, _ = receiver.begin()
    blob = bytes(4 << 20)
    digest = digest_of(blob)
    errors: list[BaseException] = []

    def send(number: int) -> None:
        try:
            with closing(receiver.loopback.client(receiver.pki.files("hv-1"))) as client:
                client.put_segment(receiver.id, delta_id, number, 160 + number * len(blob), digest, blob)
        except BaseException as error:  # noqa: BLE001  # handed to the test's thread
            errors.append(error)

    threads = [threading.Thread(target=send, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert sorted(receiver.store.segments) == list(range(12))
    assert 0 < most <= 8 << 20
    receiver.stop()


# --- bodies ---


def test_one_body_may_carry_several_segments(receiver: Receiver) -> None:
    delta_id, _ = receiver.begin()
    body = b"".join(wire.encode_frame(n, 160, digest_of(b), b) + b for n, b in ((3, b"three"), (4, b"four")))
    path = f"/v1/replicas/{receiver.id}/deltas/{delta_id}/segments/3"
    assert receiver.ask("PUT", path, body).status == 204
    assert receiver.store.segments == {3: b"three", 4: b"four"}
    assert problem_of(receiver.ask("PUT", path.replace("segments/3", "segments/2"), body)).status == 400


def test_a_bad_segment_in_a_body_stops_those_before_it_too(receiver: Receiver) -> None:
    delta_id, _ = receiver.begin()
    good, bad = (
        wire.encode_frame(0, 160, digest_of(b"a"), b"a") + b"a",
        wire.encode_frame(1, 161, bytes(32), b"b") + b"b",
    )
    path = f"/v1/replicas/{receiver.id}/deltas/{delta_id}/segments/0"
    problem = problem_of(receiver.ask("PUT", path, good + bad))
    assert problem.retryable
    assert receiver.store.segments == {}


# --- reading ---


def test_a_disk_is_read_whole_and_in_ranges_by_id_and_by_name(receiver: Receiver) -> None:
    receiver.cycle()
    path = f"/v1/replicas/{receiver.id}/points/1/disks"
    whole = content(1, 0, DISK.size_bytes)
    response = receiver.ask("GET", f"{path}/os")
    assert (response.status, response.data == whole) == (200, True)  # type: ignore[attr-defined]
    response = receiver.ask("GET", f"{path}/{DISK.id}", Range="bytes=1048570-1048585")
    assert (response.status, response.data) == (206, whole[1048570:1048586])  # type: ignore[attr-defined]
    assert response.headers["Content-Range"] == f"bytes 1048570-1048585/{DISK.size_bytes}"
    assert problem_of(receiver.ask("GET", f"{path}/os", Range=f"bytes={DISK.size_bytes}-")).status == 416
    assert problem_of(receiver.ask("GET", f"{path}/data")).hint == "it has os"
    assert receiver.lets_go()


def test_curl_reads_a_disk(receiver: Receiver, tmp_path: Path) -> None:
    receiver.cycle()
    files = receiver.pki.files("hv-1")
    command = ["curl", "-sSf", "--cacert", str(files.ca), "--cert", str(files.cert), "--key", str(files.key)]
    url = f"{receiver.loopback.url}/v1/replicas/{receiver.id}/points/1/disks/os"
    subprocess.run([*command, "-r", "8-1048583", "-o", str(tmp_path / "part"), url], check=True)
    assert (tmp_path / "part").read_bytes() == content(1, 8, 1 << 20)
    points = subprocess.run([*command, url.split("/disks")[0][:-2]], check=True, capture_output=True)
    assert json.loads(points.stdout)[0]["state"]["point"] == 1


def test_damage_half_way_is_a_broken_connection_and_never_a_short_disk(receiver: Receiver) -> None:
    receiver.cycle()
    receiver.stores.damage_at = 2 << 20
    got = 0
    with pytest.raises(TransportError, match="broke"):
        for piece in receiver.client.read(receiver.id, 1, DISK.id):
            got += len(piece)
    assert got < DISK.size_bytes
    assert receiver.lets_go()


def test_one_identity_has_half_of_the_places_for_readers(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    receiver.cycle()
    path = f"/v1/replicas/{receiver.id}/points/1/disks/os"
    go_on = threading.Event()
    read_into = MemoryPoint.read_into

    def slow(point: MemoryPoint, disk_id: DiskId, offset: int, buffer: bytearray) -> None:
        assert go_on.wait(30)
        read_into(point, disk_id, offset, buffer)

    monkeypatch.setattr(MemoryPoint, "read_into", slow)
    monkeypatch.setattr(workers, "SHARE", 8)
    readers = [threading.Thread(target=receiver.ask, args=("GET", path)) for _ in range(reading.MAX_OF_IDENTITY)]
    for thread in readers:
        thread.start()
    try:
        wait_for(lambda: receiver.stores.open_points == reading.MAX_OF_IDENTITY)
        assert "reads 4 points" in problem_of(receiver.ask("GET", path)).detail
        client = receiver.loopback.client(receiver.pki.files("hv-2"))
        with closing(client), pytest.raises(UnknownMachineError):  # it was let in as far as that
            next(client.read(ReplicaId(UUID(int=1)), 1, DISK.id))
    finally:
        go_on.set()
        for thread in readers:
            thread.join()
    assert receiver.lets_go()
    assert receiver.ask("GET", path).status == 200


def test_a_reader_that_goes_away_lets_its_pin_go(receiver: Receiver) -> None:
    receiver.cycle()
    for _ in range(10):
        pieces = receiver.client.read(receiver.id, 1, DISK.id)
        next(pieces)
        pieces.close()  # type: ignore[attr-defined]
    assert receiver.lets_go()


# --- who does not read ---


@contextmanager
def who_do_not_read(receiver: Receiver, count: int, times: int = 1) -> Iterator[list[ssl.SSLSocket]]:
    """Connections that each asked for the largest answer, `times` times, and read nothing. The kernel buffers one."""
    path = f"/v1/replicas/{receiver.id}/disks/{DISK.id}/tree?level=0&first=0&count=65536"
    with ExitStack() as stack:
        made = []
        for _ in range(count):
            plain = stack.enter_context(socket.socket())
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            plain.settimeout(20)
            plain.connect(("localhost", receiver.loopback.port))
            tls = client_context(receiver.pki.files("hv-1")).wrap_socket(plain, server_hostname="localhost")
            made.append(stack.enter_context(tls))
            tls.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode() * times)
        yield made


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[bodies.AnswerBudget]:
    """The budgets of the receivers that are started from here on."""
    made: list[bodies.AnswerBudget] = []

    class Seen(bodies.AnswerBudget):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    monkeypatch.setattr(http_api, "AnswerBudget", Seen)
    return made


def test_a_client_that_does_not_read_is_cut_off(
    answers: list[bodies.AnswerBudget], receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver.cycle()
    monkeypatch.setattr(bodies, "GRACE_SECONDS", 0.3)
    monkeypatch.setattr(bodies, "MIN_RATE", 1 << 30)
    with who_do_not_read(receiver, 1, times=3) as (lazy,):
        (budget,) = answers
        wait_for(lambda: budget.free_bytes < budget.total_bytes)
        wait_for(lambda: budget.free_bytes == budget.total_bytes)
        with suppress(ConnectionError, ssl.SSLError):
            while lazy.recv(1 << 16):
                pass


def test_answers_nobody_reads_are_counted_as_their_identity_s(
    answers: list[bodies.AnswerBudget], receiver: Receiver
) -> None:
    receiver.cycle()
    with who_do_not_read(receiver, 24, times=4):
        (budget,) = answers
        wait_for(lambda: budget.free_bytes == budget.total_bytes // 2)
        with closing(receiver.loopback.client(receiver.pki.files("hv-2"))) as other:
            assert other.replicas() == []
        assert receiver.client.replica(receiver.id).head.point == 1
        assert budget.free_bytes == budget.total_bytes // 2
    wait_for(lambda: budget.free_bytes == budget.total_bytes)


def test_the_end_does_not_wait_for_who_does_not_read(pki: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "END_SECONDS", 0.5)
    monkeypatch.setattr(server, "LEAST_SECONDS", 0.2)
    made = Receiver(pki, tmp_path)
    made.start()
    made.cycle()
    with who_do_not_read(made, 8, times=3):
        time.sleep(0.3)
        started = time.monotonic()
        made.loopback.stop()
        assert time.monotonic() - started < 5
    assert made.store.closed
    made.client.close()


# --- the end ---


def test_the_end_waits_for_a_commit_and_its_answer(pki: Pki, tmp_path: Path) -> None:
    made = Receiver(pki, tmp_path)
    made.start()
    delta_id, state = made.begin()
    made.store.gate.clear()
    done: list[wire.ReplicaInfo | None] = []
    waiting = threading.Thread(
        target=lambda: done.append(made.client.commit(made.id, delta_id, tail_of(state), 160, 30))
    )
    waiting.start()
    while made.store.applying is None:
        time.sleep(0.01)
    made.loopback.ask_to_stop()
    time.sleep(0.2)
    with pytest.raises(TransportError, match="nobody listens"):
        HttpReceiver(made.loopback.url, pki.files("hv-1")).replicas()
    assert not made.store.closed
    made.store.gate.set()
    waiting.join(20)
    made.loopback.stop()
    made.client.close()
    assert made.store.closed
    assert [d and d.head for d in done] == [state]


def test_a_commit_nobody_waits_for_is_202_and_the_end_lets_it_finish(pki: Pki, tmp_path: Path) -> None:
    made = Receiver(pki, tmp_path)
    made.start()
    delta_id, state = made.begin()
    made.store.gate.clear()
    for wait_seconds in (0, 1):
        assert made.client.commit(made.id, delta_id, tail_of(state), 160, wait_seconds) is None
    assert made.client.replica(made.id).applying == delta_id
    made.loopback.ask_to_stop()
    time.sleep(0.3)
    assert not made.store.closed
    made.store.gate.set()
    made.loopback.stop()
    made.client.close()
    assert made.store.closed
    assert made.store.head == state


def test_the_end_does_not_wait_for_idle_connections(pki: Pki, tmp_path: Path) -> None:
    made = Receiver(pki, tmp_path)
    made.start()
    with made.raw():
        started = time.monotonic()
        made.loopback.stop()
        assert time.monotonic() - started < 5
    made.client.close()


def test_a_port_in_use_is_named_and_nothing_is_opened(receiver: Receiver) -> None:
    opened: list[bool] = []

    def open_site() -> Site:
        opened.append(True)
        return Site(FileSystem(), receiver.spec, stores=MemoryStores())

    second = Loopback(replace(receiver.spec, listen_port=receiver.loopback.port), open_site)
    with pytest.raises(ListenError, match=f"cannot listen on 127.0.0.1:{receiver.loopback.port}: the port is in use"):
        second.__enter__()
    assert opened == []


@pytest.mark.parametrize(
    ("host", "words"), [("192.0.2.1", "no such address"), ("nowhere.invalid", "that host is not known")]
)
def test_an_address_that_cannot_be_is_named(pki: Pki, tmp_path: Path, host: str, words: str) -> None:
    spec = replace(site_spec(tmp_path, pki.files("dr-1", ("localhost", "127.0.0.1"))), listen_host=host)
    with pytest.raises(ListenError, match=words):
        Loopback(spec, lambda: Site(FileSystem(), spec, stores=MemoryStores())).__enter__()
