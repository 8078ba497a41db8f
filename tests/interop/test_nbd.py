"""NBD against independent servers, nbdkit and qemu-nbd: reading, overwriting, TLS, and what goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from replica import images
from replica.cli.app import run
from replica.durable import FileSystem
from replica.errors import ImageError, TargetExistsError
from replica.images import nbd_client
from replica.images.copying import windows
from replica.images.image import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "images"))
from nbd_servers import serving

pytestmark = pytest.mark.skipif(
    not (shutil.which("nbdkit") and shutil.which("qemu-nbd")), reason="nbdkit or qemu-utils is not installed"
)
MiB = 1 << 20
SIZE = 40 * MiB + 512
QEMU = ("qemu-nbd", "-t", "-e", 8, "-f", "raw", "-k", "{}")
NBDKIT = ("nbdkit", "-f", "-U", "{}")
SERVERS = {
    "qemu-nbd": (*QEMU, "-r"),
    "nbdkit": (*NBDKIT, "-r", "file"),
    "one connection": (*NBDKIT, "-r", "--filter=multi-conn", "file", "multi-conn-mode=disable"),
    "no extents": (*NBDKIT, "-r", "--filter=noextents", "file"),
    "old, without structured replies": (*NBDKIT, "-r", "--no-sr", "file"),
    "slow and out of order": (*NBDKIT, "-r", "--filter=delay", "file", "rdelay=10ms"),
}


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Data, holes and written zeros; its size is no multiple of a grain."""
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.write(os.urandom(3 * MiB))
        file.seek(10 * MiB)
        file.write(os.urandom(70_000) + bytes(MiB))
        file.seek(30 * MiB + 4096)
        file.write(b"x" * 8192)
        file.truncate(SIZE)
    return path


def content(image: Image, *, by_extents: bool = False) -> bytes:
    data = bytearray(image.size_bytes)
    whole = [(0, image.size_bytes)]
    for start, stop in windows(image.allocated(0, image.size_bytes) if by_extents else whole, 4 * MiB):
        image.read_into(start, memoryview(data)[start:stop])
    return bytes(data)


@pytest.mark.parametrize("server", SERVERS.values(), ids=SERVERS)
def test_read(tmp_path: Path, disk: Path, server: tuple[object, ...]) -> None:
    expected = disk.read_bytes()
    with serving(tmp_path, *server, disk) as (uri, _), images.open(images.location(uri)) as image:
        assert content(image) == content(image, by_extents=True) == expected
        for start, length in [(1, 5), (511, 2), (3 * MiB - 700, 1500), (SIZE - 3, 3)]:
            buffer = bytearray(length)
            image.read_into(start, buffer)
            assert buffer == expected[start : start + length]
        if "noextents" not in str(server) and "--no-sr" not in server:
            assert sum(stop - start for start, stop in image.allocated(0, SIZE)) < 6 * MiB
        with pytest.raises(ImageError, match="are not inside it"):
            image.read_into(SIZE, bytearray(1))


@pytest.mark.parametrize("policy", ["minimum=512", "minimum=4096", "minimum=65536 preferred=65536 maximum=1M"])
def test_block_sizes_are_kept(tmp_path: Path, policy: str) -> None:
    options = [f"blocksize-{word}" for word in policy.split()]
    disk = tmp_path / "disk.raw"
    disk.write_bytes(os.urandom(2 * MiB))
    filters = ("--filter=blocksize-policy", "file", disk, *options, "blocksize-error-policy=error")
    with serving(tmp_path, *NBDKIT, *filters) as (uri, _):
        with images.open(images.location(uri)) as image:
            for start, length in [(0, 2 * MiB), (1000, 70_000), (65535, 2)]:
                buffer = bytearray(length)
                image.read_into(start, buffer)
                assert buffer == disk.read_bytes()[start : start + length]
            assert image.sector_bytes == (512 if "512" in policy else 4096)
        with images.create(images.location(uri), "nbd", 2 * MiB - 10) as writer:
            writer.write(1000, b"a" * 100_000)
            writer.write(5, b"b")
            writer.sync()
    assert disk.read_bytes() == bytes(5) + b"b" + bytes(994) + b"a" * 100_000 + bytes(2 * MiB - 101_000)


TARGETS = {
    "qemu-nbd": (*QEMU, "--discard=unmap"),
    "nbdkit": (*NBDKIT, "file"),
    "without zeroes": (*NBDKIT, "--filter=nozero", "file"),
}


@pytest.mark.parametrize("server", TARGETS.values(), ids=TARGETS)
def test_convert_to_an_export(tmp_path: Path, disk: Path, server: tuple[object, ...]) -> None:
    target = tmp_path / "target.raw"
    target.write_bytes(b"\xaa" * (SIZE + 3 * MiB - 512))
    with serving(tmp_path, *server, target) as (uri, _), images.open(disk) as source:
        with pytest.raises(TargetExistsError, match="would be overwritten; .*--force"):
            images.convert(source, images.location(uri), "nbd")
        assert target.read_bytes()[:512] == b"\xaa" * 512
        images.convert(source, images.location(uri), "nbd", force=True)
    assert target.read_bytes() == disk.read_bytes() + bytes(3 * MiB - 512)
    if "--filter=nozero" not in server:
        assert target.stat().st_blocks * 512 < 8 * MiB


def test_from_the_shell(tmp_path: Path, disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(tmp_path, *NBDKIT, "memory", "size=64M") as (uri, _):
        assert run(["image", "convert", str(disk), uri, "--format", "nbd"]) == 13
        assert run(["image", "convert", str(disk), uri, "--format", "nbd", "--force"]) == 0
        capsys.readouterr()
        assert run(["image", "info", uri, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["size_bytes"] == 64 * MiB
        assert run(["image", "check", uri]) == 0
        assert run(["image", "convert", uri, str(tmp_path / "back.raw"), "--format", "raw"]) == 0
        assert run(["image", "info", "nbd://localhost/a//b"]) == 4
    assert (tmp_path / "back.raw").read_bytes()[:SIZE] == disk.read_bytes()


def test_exports_that_cannot_be_targets(tmp_path: Path, disk: Path) -> None:
    targets = {("-r", "memory", "size=64M"): "is read-only", ("memory", "size=1M"): r"has 1048576 .* are needed"}
    for words, match in targets.items():
        with (
            images.open(disk) as source,
            serving(tmp_path, *NBDKIT, *words) as (uri, _),
            pytest.raises(ImageError, match=match),
        ):
            images.convert(source, images.location(uri), "nbd", force=True)


def test_an_error_in_the_middle(tmp_path: Path) -> None:
    with (
        serving(
            tmp_path, *NBDKIT, "--filter=error", "memory", "size=32M", "error-pread=EIO", "error-pread-rate=100%"
        ) as (uri, _),
        images.open(images.location(uri)) as image,
        pytest.raises(ImageError, match="failed to read .*Input/output error"),
    ):
        image.read_into(8 * MiB, bytearray(4 * MiB))


def test_a_server_that_dies(tmp_path: Path) -> None:
    with serving(tmp_path, *NBDKIT, "--filter=delay", "memory", "size=32M", "rdelay=1") as (uri, process):
        with images.open(images.location(uri)) as image:
            threading.Timer(0.3, process.kill).start()
            with pytest.raises(ImageError, match="cannot read .*(closed the connection|reset by peer)"):
                image.read_into(0, bytearray(4 * MiB))
        with pytest.raises(ImageError, match="cannot connect to .*; is the server running"):
            images.open(images.location(uri))


def test_a_server_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd_client.NbdConnection.__init__, "__kwdefaults__", {"answer_seconds": 0.5})
    with (
        serving(tmp_path, *NBDKIT, "--filter=delay", "memory", "size=32M", "rdelay=20") as (uri, _),
        images.open(images.location(uri)) as image,
        pytest.raises(ImageError, match="did not answer in time"),
    ):
        image.read_into(0, bytearray(4 * MiB))


def test_names_of_exports(tmp_path: Path, disk: Path) -> None:
    with serving(tmp_path, *QEMU, "-r", "-x", "a/b c", disk) as (uri, _):
        right = uri.replace("///", "///a%2Fb%20c")
        with images.open(images.location(right)) as image:
            assert image.size_bytes == SIZE
        with pytest.raises(ImageError, match=r"refuses export 'wrong' .*no such export.*nbdinfo --list"):
            images.open(images.location(uri.replace("///", "///wrong")))


def issue(folder: Path) -> None:
    """A CA, a server's and a client's certificate without restrictions on their use, which qemu would misread."""
    now = datetime.now(UTC)
    ca_key = ec.generate_private_key(ec.SECP256R1())
    for name in ("ca", "server", "client"):
        key = ca_key if name == "ca" else ec.generate_private_key(ec.SECP256R1())
        subject, issuer = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, word)]) for word in (name, "ca"))
        certificate = (
            x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=1))
            .add_extension(x509.BasicConstraints(name == "ca", None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
            .sign(ca_key, hashes.SHA256())
        )
        (folder / f"{name}.crt").write_bytes(certificate.public_bytes(Encoding.PEM))
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (folder / f"{name}.key").write_bytes(pem)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folders `server`, `client`, `other` (another CA) and `bare` (no client certificate), files named as by qemu."""
    root = tmp_path_factory.mktemp("pki")
    for authority in ("ours", "theirs"):
        (root / authority).mkdir()
        issue(root / authority)
    for folder, authority, roles in [
        ("server", "ours", ["server"]),
        ("client", "ours", ["client"]),
        ("other", "theirs", ["client"]),
        ("bare", "ours", []),
    ]:
        (root / folder).mkdir()
        shutil.copy(root / authority / "ca.crt", root / folder / "ca-cert.pem")
        for role in roles:
            shutil.copy(root / authority / f"{role}.crt", root / folder / f"{role}-cert.pem")
            shutil.copy(root / authority / f"{role}.key", root / folder / f"{role}-key.pem")
    return root


def tls_servers(folder: Path, disk: Path) -> dict[str, tuple[object, ...]]:
    credentials = f"tls-creds-x509,id=tls0,endpoint=server,verify-peer=on,dir={folder}"
    return {
        "qemu-nbd": (*QEMU, "-r", "--object", credentials, "--tls-creds", "tls0", disk),
        "nbdkit": (*NBDKIT, "-r", "--tls=require", f"--tls-certificates={folder}", "--tls-verify-peer", "file", disk),
    }


@pytest.mark.parametrize("server", ["qemu-nbd", "nbdkit"])
def test_tls_both_ways(tmp_path: Path, disk: Path, certificates: Path, server: str) -> None:
    with serving(tmp_path, *tls_servers(certificates / "server", disk)[server]) as (plain, _):
        safe = plain.replace("nbd+", "nbds+") + f"&tls-certificates={certificates}"
        with images.open(images.location(f"{safe}/client")) as image:
            assert content(image) == disk.read_bytes()
        refused = {
            plain: "it demands TLS.*; write nbds",
            f"{safe}/client&tls-hostname=elsewhere": "certificate that was refused: Hostname mismatch",
            f"{safe}/other": "certificate that was refused: .*; `tls-certificates` must hold the CA",
            f"{safe}/bare": "cannot open .*",
            f"{safe}/nowhere": "certificates in .* cannot be used",
        }
        for uri, match in refused.items():
            with pytest.raises(ImageError, match=match):
                images.open(images.location(uri))


def test_tls_is_never_done_without(tmp_path: Path, disk: Path, certificates: Path) -> None:
    with serving(tmp_path, *NBDKIT, "-r", "--tls=off", "file", disk) as (plain, _):
        uri = plain.replace("nbd+", "nbds+") + f"&tls-certificates={certificates / 'client'}"
        with pytest.raises(ImageError, match="refuses .*(option|policy).*"):
            images.open(images.location(uri))


def test_over_tcp(disk: Path, tmp_path: Path) -> None:

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        "qemu-nbd",
        "-t",
        "-r",
        "-e",
        "8",
        "-f",
        "raw",
        "-b",
        "127.0.0.1",
        "-p",
        str(port),
        "-x",
        "os",
        str(disk),
    ]
    process = subprocess.Popen([*command, "--fork", "--pid-file", str(tmp_path / "pid")])
    assert process.wait(20) == 0
    try:
        with images.open(images.location(f"nbd://127.0.0.1:{port}/os"), fs=FileSystem()) as image:
            assert content(image) == disk.read_bytes()
    finally:
        os.kill(int((tmp_path / "pid").read_text()), 9)
