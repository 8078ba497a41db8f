"""The client against a server that plays by a script: what it repeats, what it counts, what it says."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress

import pytest

from replica.errors import ConfigError, ForbiddenError, ProtocolError, ReplicaError, TransportError
from replica.model import DeltaId, ReplicaId, random_id
from replica.transport import connection, wire
from replica.transport.client import HttpReceiver
from replica.transport.tls import server_context
from tests.receiver.loopback import Pki

Conversation = Callable[[ssl.SSLSocket], None]
RID, DELTA = ReplicaId(random_id()), DeltaId(random_id())


def request_of(peer: ssl.SSLSocket) -> bytes:
    """One whole request: head and the body it announces."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = peer.recv(65536)
        if not piece:
            return data
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    length = next((int(h.split(b":")[1]) for h in head.split(b"\r\n") if h.lower().startswith(b"content-length")), 0)
    while len(body) < length:
        body += peer.recv(65536)
    return head + b"\r\n\r\n" + body


def answer(status: str = "200 OK", body: bytes = b"[]", kind: str = "application/json", *more: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", f"Content-Type: {kind}", *more, "", ""]
    return "\r\n".join(lines).encode() + body


@contextmanager
def playing(pki: Pki, *conversations: Conversation) -> Iterator[str]:
    """A TLS server that has these conversations, one connection each, in order."""
    context = server_context(pki.files("dr-1", ("localhost",)))
    with socket.create_server(("localhost", 0)) as listener:
        listener.settimeout(20)

        def run() -> None:
            for conversation in conversations:
                raw, _ = listener.accept()
                with context.wrap_socket(raw, server_side=True) as peer:
                    conversation(peer)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield f"https://localhost:{listener.getsockname()[1]}"
        finally:
            thread.join(20)
            assert not thread.is_alive()


def test_the_bytes_counted_are_the_bytes_the_server_got(pki: Pki) -> None:
    got: list[bytes] = []
    blob = bytes(range(256)) * 4096

    def serve(peer: ssl.SSLSocket) -> None:
        for reply in (answer(), b"HTTP/1.1 204 No Content\r\n\r\n", answer()):
            got.append(request_of(peer))
            peer.sendall(reply)

    with playing(pki, serve) as url:
        receiver = HttpReceiver(url, pki.files("hv-1"))
        receiver.replicas("web 1")
        receiver.put_segment(RID, DELTA, 3, 160, wire.digest_of(blob), blob)
        receiver.replicas()
        receiver.close()
    assert receiver.bytes_sent == sum(map(len, got))
    assert got[0].startswith(b"GET /v1/replicas?machine=web%201 HTTP/1.1\r\n")
    head, _, body = got[1].partition(b"\r\n\r\n")
    assert head.startswith(f"PUT /v1/replicas/{RID}/deltas/{DELTA}/segments/3 HTTP/1.1".encode())
    assert [bytes(f.blob) for f in wire.decode_segments(body, 3)] == [blob]
    assert len(got[0]) < 100
    assert len(head) < 250


def test_a_small_request_is_one_tls_record(pki: Pki) -> None:
    reads: list[bytes] = []

    def serve(peer: ssl.SSLSocket) -> None:
        reads.append(peer.recv(65536))
        peer.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")

    with playing(pki, serve) as url, closing(HttpReceiver(url, pki.files("hv-1"))) as receiver:
        receiver.put_segment(RID, DELTA, 0, 160, wire.digest_of(b"abc"), b"abc")
    assert reads[0].endswith(b"abc")


def test_a_kept_connection_that_proves_dead_is_replaced_once_and_silently(pki: Pki) -> None:
    def once(peer: ssl.SSLSocket) -> None:
        request_of(peer)
        peer.sendall(answer())

    with playing(pki, once, once) as url:
        receiver = HttpReceiver(url, pki.files("hv-1"))
        assert receiver.replicas() == []
        one = receiver.bytes_sent
        assert receiver.replicas() == []
        assert receiver.bytes_sent in (2 * one, 3 * one)
        receiver.close()


def test_a_new_connection_that_breaks_is_not_tried_again(pki: Pki) -> None:
    seen: list[bytes] = []

    def hang_up(peer: ssl.SSLSocket) -> None:
        seen.append(request_of(peer))

    with playing(pki, hang_up) as url, pytest.raises(TransportError, match="broke: the other side hung up"):
        HttpReceiver(url, pki.files("hv-1")).replicas()
    assert len(seen) == 1


def test_a_replaced_connection_that_breaks_is_not_tried_a_third_time(pki: Pki) -> None:
    def good(peer: ssl.SSLSocket) -> None:
        request_of(peer)
        peer.sendall(answer())

    def hang_up(peer: ssl.SSLSocket) -> None:
        request_of(peer)

    with playing(pki, good, hang_up) as url:
        receiver = HttpReceiver(url, pki.files("hv-1"))
        receiver.replicas()
        with pytest.raises(TransportError):
            receiver.replicas()


def test_an_answer_cut_short_is_a_broken_connection(pki: Pki) -> None:
    def cut(peer: ssl.SSLSocket) -> None:
        request_of(peer)
        peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n[]")

    with playing(pki, cut) as url, pytest.raises(TransportError, match="broke"):
        HttpReceiver(url, pki.files("hv-1")).replicas()


def test_silence_ends_at_the_time_limit(pki: Pki) -> None:
    release = threading.Event()

    def silent(peer: ssl.SSLSocket) -> None:
        request_of(peer)
        release.wait(20)

    with playing(pki, silent) as url:
        with pytest.raises(TransportError, match="did not answer for"):
            HttpReceiver(url, pki.files("hv-1"), answer_seconds=0.3).replicas()
        release.set()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("at_once", "then"),
    [
        (b"HTTP/1.1 200", b" "),
        (HEAD, b"X: y\r\n"),
        (HEAD + b"Content-Length: 1000\r\n\r\n", b"["),
        (HEAD + b"Content-Length: 1000\r\nConnection: close\r\n\r\n", b"["),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n[\r\n"),
    ],
    ids=["status", "head", "body", "last", "chunked"],
)
def test_an_answer_that_trickles_ends_at_a_time_limit(
    pki: Pki, monkeypatch: pytest.MonkeyPatch, at_once: bytes, then: bytes
) -> None:
    """Each piece comes in good time, so that there is never a silence."""
    monkeypatch.setattr(connection, "MIN_RATE", 1 << 30, raising=False)
    gone = threading.Event()

    def trickle(peer: ssl.SSLSocket) -> None:
        request_of(peer)
        peer.sendall(at_once)
        with suppress(OSError):
            for _ in range(100):
                if gone.wait(0.05):
                    break
                peer.sendall(then)

    with playing(pki, trickle) as url:
        started = time.monotonic()
        try:
            with pytest.raises(TransportError, match="so slowly that its answer was given up"):
                HttpReceiver(url, pki.files("hv-1"), answer_seconds=0.6).replicas()
        finally:
            gone.set()
    assert time.monotonic() - started < 4


def test_a_body_that_is_slow_but_goes_on_has_its_time(pki: Pki) -> None:
    """At 16 KiB/s: also where the head says that the connection ends with it."""
    size = 40 << 10
    more = ["Connection: close"]

    def slow(peer: ssl.SSLSocket) -> None:
        request_of(peer)
        reply = answer("200 OK", b"[" + b" " * (size - 2) + b"]", "application/json", *more)
        for start in range(0, len(reply), size // 8):
            peer.sendall(reply[start : start + size // 8])
            time.sleep(0.15)

    with playing(pki, slow, slow) as url, closing(HttpReceiver(url, pki.files("hv-1"), answer_seconds=0.4)) as receiver:
        assert receiver.replicas() == []
        more.clear()
        assert receiver.replicas() == []


def test_an_answer_without_end_is_refused(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_RESPONSE_BYTES", 1000)

    def flood(peer: ssl.SSLSocket) -> None:
        request_of(peer)
        peer.sendall(answer(body=b"[" * 5000))

    with playing(pki, flood) as url, pytest.raises(ProtocolError, match="more than 1000 bytes"):
        HttpReceiver(url, pki.files("hv-1")).replicas()


@pytest.mark.parametrize(
    ("reply", "kind", "words"),
    [
        (answer("502 Bad Gateway", b"<html>", "text/html"), TransportError, "answered 502 Bad Gateway"),
        (answer("404 Not Found", b"<html>", "text/html"), ProtocolError, "no answer of a receiver"),
        (answer("200 OK", b"<html>"), ProtocolError, "is not valid"),
        (answer("403 Forbidden", b'{"type":"urn:replica:error:forbidden","title":"Forbidden","status":403,'
                b'"detail":"no","hint":"ask"}', wire.PROBLEM_TYPE), ForbiddenError, "no; ask"),
        (answer("500 Oops", b"{", wire.PROBLEM_TYPE), ProtocolError, "is not valid"),
        (b"SSH-2.0-OpenSSH\r\n", TransportError, "broke"),
    ],
)  # fmt: skip
def test_every_other_answer_has_its_error(pki: Pki, reply: bytes, kind: type[ReplicaError], words: str) -> None:
    def serve(peer: ssl.SSLSocket) -> None:
        request_of(peer)
        peer.sendall(reply)

    with (
        playing(pki, serve) as url,
        closing(HttpReceiver(url, pki.files("hv-1"))) as receiver,
        pytest.raises(ReplicaError, match=words) as caught,
    ):
        receiver.replicas()
    assert type(caught.value) is kind


def test_a_refusal_before_the_body_was_read_is_heard(pki: Pki) -> None:
    """The server answers and hangs up while the client still writes its body."""
    problem = wire.encode(wire.to_problem(ForbiddenError("not you")))

    def serve(peer: ssl.SSLSocket) -> None:
        peer.recv(1000)
        peer.sendall(answer("403 Forbidden", problem, wire.PROBLEM_TYPE, "Connection: close"))

    with playing(pki, serve) as url, pytest.raises(ForbiddenError, match="not you"):
        HttpReceiver(url, pki.files("hv-1")).put_segment(RID, DELTA, 0, 160, bytes(32), bytes(8 << 20))


def test_a_port_where_nobody_listens(pki: Pki) -> None:
    with socket.create_server(("localhost", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(TransportError, match=f"nobody listens at https://localhost:{port}; is the receiver running"):
        HttpReceiver(f"https://localhost:{port}", pki.files("hv-1")).replicas()


def test_a_host_that_is_not_known(pki: Pki) -> None:
    with pytest.raises(TransportError, match=r"host of https://nowhere\.invalid is not known"):
        HttpReceiver("https://nowhere.invalid", pki.files("hv-1")).replicas()


@pytest.mark.parametrize("url", ["http://x", "x:8443", "https://", "https://x:port", "https://me@x", "https://x?y"])
def test_what_is_no_receiver_s_address_is_refused_at_once(pki: Pki, url: str) -> None:
    with pytest.raises(ConfigError):
        HttpReceiver(url, pki.files("hv-1"))


def test_abort_ends_a_call_that_hangs_also_in_the_handshake(pki: Pki) -> None:
    with socket.create_server(("localhost", 0)) as listener:  # accepts in the kernel and never speaks
        url = f"https://localhost:{listener.getsockname()[1]}"
        receiver = HttpReceiver(url, pki.files("hv-1"))
        timer = threading.Timer(0.3, receiver.abort)
        timer.start()
        began = time.monotonic()
        with pytest.raises(TransportError):
            receiver.replicas()
        assert time.monotonic() - began < 3
        timer.join()
