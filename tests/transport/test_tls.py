"""Who is let in at the door, and whether the one who is not can tell why."""

from __future__ import annotations

import logging
import socket
import ssl
import subprocess
import threading
from contextlib import closing, suppress
from pathlib import Path

import pytest

from replica.durable import FileSystem
from replica.errors import ConfigError, ForbiddenError, ReplicaError, TransportError
from replica.model import DeltaId, ReplicaId, random_id
from replica.receiver.site import Site
from replica.transport import pki as pki_module
from replica.transport.client import HttpReceiver
from replica.transport.tls import TlsFiles, client_context, identity_of, server_context
from tests.receiver.loopback import Loopback, Pki, site_spec
from tests.receiver.memory_stores import MemoryStores


def refused(url: str, files: TlsFiles) -> ReplicaError:
    receiver = HttpReceiver(url, files)
    with pytest.raises(ReplicaError) as caught:
        receiver.replicas()
    receiver.close()
    assert "\n" not in str(caught.value)
    return caught.value


def serving(storage: Path, files: TlsFiles) -> Loopback:
    spec = site_spec(storage, files)
    return Loopback(spec, lambda: Site(FileSystem(), spec, stores=MemoryStores()))


def expired(directory: Path, name: str, monkeypatch: pytest.MonkeyPatch, hosts: tuple[str, ...] = ()) -> TlsFiles:
    with monkeypatch.context() as patched:
        patched.setattr(pki_module, "LEAF_DAYS", -0.01)
        return pki_module.issue(directory, name, hosts)


def test_a_certificate_of_the_ca_is_let_in(server: Loopback, pki: Pki) -> None:
    with closing(server.client(pki.files("hv-1"))) as receiver:
        assert receiver.replicas() == []


def test_the_sender_refuses_a_receiver_of_another_ca(server: Loopback, tmp_path: Path) -> None:
    stranger = Pki(tmp_path / "pki").files("hv-1")
    error = refused(server.url, stranger)
    assert type(error) is ForbiddenError
    assert server.url in str(error)
    assert str(stranger.ca) in str(error)


def test_the_receiver_refuses_a_sender_of_another_ca_and_says_so(
    server: Loopback, pki: Pki, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = Pki(tmp_path / "pki").files("hv-1")
    mixed = TlsFiles(pki.files("hv-1").ca, other.cert, other.key)
    with caplog.at_level(logging.WARNING, logger="replica"):
        error = refused(server.url, mixed)
    assert type(error) is ForbiddenError
    assert f"{server.url} refused this side's certificate: {other.cert} is not signed by the CA" in str(error)
    assert "unable to get local issuer certificate" in caplog.text


def test_a_large_first_request_is_refused_with_the_same_words(server: Loopback, pki: Pki, tmp_path: Path) -> None:
    other = Pki(tmp_path / "pki").files("hv-1")
    receiver = HttpReceiver(server.url, TlsFiles(pki.files("hv-1").ca, other.cert, other.key))
    blob = bytes(12 << 20)
    with pytest.raises(ForbiddenError, match="refused this side's certificate"):
        receiver.put_segment(ReplicaId(random_id()), DeltaId(random_id()), 0, 160, bytes(32), blob)


def test_an_expired_sender_is_told_so(server: Loopback, pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    old = expired(pki.directory, "hv-old", monkeypatch)
    error = refused(server.url, old)
    assert type(error) is ForbiddenError
    assert f"{old.cert} has expired" in str(error)


def test_an_expired_receiver_is_refused(tmp_path: Path, pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    old = expired(pki.directory, "dr-old", monkeypatch, ("localhost",))
    with serving(tmp_path, old) as server:
        error = refused(server.url, pki.files("hv-1"))
    assert type(error) is ForbiddenError
    assert "has expired" in str(error)


def test_a_receiver_under_another_name_is_refused(tmp_path: Path, pki: Pki) -> None:
    with serving(tmp_path, pki.files("dr-2", ("elsewhere.example.org",))) as server:
        for host in ("localhost", "127.0.0.1"):
            error = refused(f"https://{host}:{server.port}", pki.files("hv-1"))
            assert type(error) is ForbiddenError
            assert "is for other host names" in str(error)


def test_a_client_without_a_certificate_is_refused(server: Loopback, pki: Pki) -> None:
    context = ssl.create_default_context(cafile=pki.files("hv-1").ca)
    raw = socket.create_connection(("localhost", server.port), 5)
    with context.wrap_socket(raw, server_hostname="localhost") as connection, pytest.raises(ssl.SSLError) as caught:
        connection.sendall(b"GET /v1/replicas HTTP/1.1\r\nHost: x\r\n\r\n")
        connection.recv(1)
    assert caught.value.reason == "TLSV13_ALERT_CERTIFICATE_REQUIRED"


def test_curl_without_and_with_a_certificate(server: Loopback, pki: Pki) -> None:
    files = pki.files("hv-1")
    command = ["curl", "-sS", "--max-time", "10", "--cacert", str(files.ca), f"{server.url}/v1/replicas"]
    without = subprocess.run(command, capture_output=True, text=True, check=False)
    assert without.returncode != 0
    assert "certificate required" in without.stderr
    own = ["--cert", str(files.cert), "--key", str(files.key)]
    assert subprocess.run([*command, *own], capture_output=True, text=True, check=True).stdout == "[]"


@pytest.mark.parametrize(("version", "good"), [("-tls1_2", False), ("-tls1_3", True)])
def test_only_tls_1_3_is_spoken(server: Loopback, pki: Pki, version: str, good: bool) -> None:
    files = pki.files("hv-1")
    command = ["openssl", "s_client", version, "-connect", f"localhost:{server.port}", "-verify_return_error"]
    command += ["-CAfile", str(files.ca), "-cert", str(files.cert), "-key", str(files.key)]
    done = subprocess.run(command, input="Q\n", capture_output=True, text=True, check=False, timeout=20)
    assert ("New, TLSv1.3" in done.stdout) is good
    assert ("alert protocol version" in done.stderr) is not good


def test_a_failed_handshake_does_not_stay_open(tmp_path: Path, pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    """Garbage instead of TLS is closed at the handshake's time limit at the latest; so is silence."""
    monkeypatch.setattr("replica.receiver.listener.HANDSHAKE_SECONDS", 0.5)
    with serving(tmp_path, pki.files("dr-1", ("localhost", "127.0.0.1"))) as server:
        for garbage in (b"GET / HTTP/1.1\r\n\r\n", b""):
            with socket.create_connection(("localhost", server.port), 5) as raw:
                raw.sendall(garbage)
                while raw.recv(4096):
                    pass


def test_what_is_no_tls_at_all_is_named(pki: Pki) -> None:
    with socket.create_server(("localhost", 0)) as listener:

        def answer() -> None:
            peer, _ = listener.accept()
            with peer, suppress(ConnectionError):
                peer.recv(4096)
                peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                peer.recv(4096)

        thread = threading.Thread(target=answer)
        thread.start()
        error = refused(f"https://localhost:{listener.getsockname()[1]}", pki.files("hv-1"))
        thread.join()
    assert type(error) is TransportError
    assert "no TLS 1.3 with" in str(error)


@pytest.mark.parametrize("make", [client_context, server_context])
@pytest.mark.parametrize(
    ("which", "content", "words"),
    [
        ("ca", None, "cannot read"),
        ("cert", None, "cannot read"),
        ("key", None, "cannot read"),
        ("ca", b"nonsense", "holds no certificate"),
        ("cert", b"nonsense", "PEM"),
        ("key", b"nonsense", "PEM"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(
    make: object, which: str, content: bytes | None, words: str, pki: Pki, tmp_path: Path
) -> None:
    good = pki.files("hv-1")
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    files = TlsFiles(**{name: path if name == which else getattr(good, name) for name in ("ca", "cert", "key")})
    assert callable(make)
    with pytest.raises(ConfigError, match=words) as caught:
        make(files)
    assert str(path) in str(caught.value)


def test_a_key_of_another_certificate_is_named(pki: Pki) -> None:
    files = TlsFiles(pki.files("hv-1").ca, pki.files("hv-1").cert, pki.files("hv-2").key)
    with pytest.raises(ConfigError, match="is not the key of"):
        client_context(files)


def test_an_encrypted_key_is_an_error_and_no_prompt(pki: Pki, tmp_path: Path) -> None:
    files = pki.files("hv-1")
    locked = tmp_path / "locked.key"
    command = ["openssl", "pkcs8", "-topk8", "-in", str(files.key), "-out", str(locked), "-passout", "pass:secret"]
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(ConfigError, match="unencrypted"):
        client_context(TlsFiles(files.ca, files.cert, locked))


def test_contexts_speak_tls_1_3_and_ask_for_certificates(pki: Pki) -> None:
    for context in (client_context(pki.files("hv-1")), server_context(pki.files("dr-1"))):
        assert context.minimum_version == context.maximum_version == ssl.TLSVersion.TLSv1_3
        assert context.verify_mode == ssl.CERT_REQUIRED
    assert client_context(pki.files("hv-1")).check_hostname
    assert server_context(pki.files("dr-1")).num_tickets == 0


CN = (("commonName", "hv-1"),)


@pytest.mark.parametrize(
    "certificate",
    [None, {}, {"subject": ()}, {"subject": ((("organizationName", "hv-1"),),)}, {"subject": (CN, CN)},
     {"subject": ((("commonName", ""),),)}, {"subject": ((("commonName", "hv-1\nERROR forged"),),)},
     {"subject": ((("commonName", "hv-1\u200b"),),)}, {"subject": ((("commonName", "hv-1\0.evil"),),)}],
)  # fmt: skip
def test_an_identity_is_exactly_one_common_name(certificate: dict[str, object] | None) -> None:
    with pytest.raises(ForbiddenError):
        identity_of(certificate)
    assert identity_of({"subject": ((("countryName", "CH"),), CN)}) == "hv-1"
