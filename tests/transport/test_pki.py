"""The private CA, judged by openssl and by what it refuses."""

from __future__ import annotations

import stat
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from replica.errors import ConfigError, TargetExistsError
from replica.transport import pki


def openssl(*arguments: object) -> str:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    pki.init(tmp_path / "pki")
    return tmp_path / "pki"


def test_openssl_accepts_both_uses_of_a_certificate(ca: Path) -> None:
    files = pki.issue(ca, "dr-1", ["localhost", "127.0.0.1", "::1", "*.example.org"])
    for purpose in ("sslserver", "sslclient"):
        openssl("verify", "-x509_strict", "-purpose", purpose, "-CAfile", files.ca, files.cert)
    for check in (["-verify_hostname", "localhost"], ["-verify_ip", "127.0.0.1"], ["-verify_ip", "::1"]):
        openssl("verify", "-x509_strict", *check, "-CAfile", files.ca, files.cert)


def test_a_certificate_of_another_ca_is_not_accepted(ca: Path, tmp_path: Path) -> None:
    pki.init(tmp_path / "other")
    files = pki.issue(tmp_path / "other", "dr-1")
    done = subprocess.run(["openssl", "verify", "-CAfile", ca / "ca.crt", files.cert], capture_output=True, check=False)
    assert done.returncode != 0


def test_the_extensions_are_those_of_rfc_5280(ca: Path) -> None:
    pki.issue(ca, "hv-1")
    authority = openssl("x509", "-in", ca / "ca.crt", "-noout", "-text")
    leaf = openssl("x509", "-in", ca / "hv-1.crt", "-noout", "-text")
    for text in ("CA:TRUE, pathlen:0", "Certificate Sign, CRL Sign", "Subject Key Identifier", "prime256v1"):
        assert text in authority
    for text in ("CA:FALSE", "Digital Signature", "TLS Web Server Authentication, TLS Web Client Authentication"):
        assert text in leaf
    for text in ("Authority Key Identifier", "Subject Key Identifier", "DNS:hv-1", "CN = hv-1"):
        assert text in leaf
    assert "Certificate Sign" not in leaf


@pytest.mark.parametrize(
    ("name", "hosts", "expected"),
    [
        ("hv-1", [], ["hv-1"]),
        ("hv_1 west", [], []),
        ("hv-1", ["dr.example.org"], ["dr.example.org"]),
        ("hv-1", ["10.0.0.1"], ["10.0.0.1"]),
    ],
)
def test_alternative_names_are_the_hosts_or_else_the_name(
    ca: Path, name: str, hosts: list[str], expected: list[str]
) -> None:
    certificate = x509.load_pem_x509_certificate(pki.issue(ca, name, hosts).cert.read_bytes())
    found = [
        str(value.value)
        for extension in certificate.extensions
        if isinstance(extension.value, x509.SubjectAlternativeName)
        for value in extension.value
    ]
    assert found == expected


def test_lifetimes(ca: Path) -> None:
    now = datetime.now(UTC)
    authority = x509.load_pem_x509_certificate((ca / "ca.crt").read_bytes())
    leaf = x509.load_pem_x509_certificate(pki.issue(ca, "hv-1").cert.read_bytes())
    day = timedelta(days=1)
    assert abs(authority.not_valid_after_utc - now - 3652 * day) < day
    assert abs(leaf.not_valid_after_utc - now - 825 * day) < day
    assert leaf.not_valid_before_utc <= now


def test_keys_are_their_owner_s_alone(ca: Path) -> None:
    files = pki.issue(ca, "hv-1")
    for key in (ca / "ca.key", files.key):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        assert b"BEGIN PRIVATE KEY" in key.read_bytes()
    assert sorted(p.name for p in ca.iterdir()) == ["ca.crt", "ca.key", "hv-1.crt", "hv-1.key"]


@pytest.mark.parametrize("present", ["ca.crt", "ca.key"])
def test_a_ca_is_never_overwritten(tmp_path: Path, present: str) -> None:
    (tmp_path / present).write_text("mine")
    with pytest.raises(TargetExistsError, match=present):
        pki.init(tmp_path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(present, "mine")]


@pytest.mark.parametrize("present", ["hv-1.crt", "hv-1.key"])
def test_a_certificate_is_never_overwritten(ca: Path, present: str) -> None:
    (ca / present).write_text("mine")
    with pytest.raises(TargetExistsError, match=present):
        pki.issue(ca, "hv-1")
    assert (ca / present).read_text() == "mine"


@pytest.mark.parametrize("name", ["", "ca", "../x", "a/b", ".hidden", "x" * 65, "a\nb"])
def test_names_that_cannot_be_are_refused(ca: Path, name: str) -> None:
    before = sorted(ca.iterdir())
    with pytest.raises(ConfigError):
        pki.issue(ca, name)
    assert sorted(ca.iterdir()) == before


@pytest.mark.parametrize("host", ["", "two words", "-x", "x-", "a..b", "http://x", "256.1.1.1.", "x" * 64])
def test_hosts_that_cannot_be_are_refused(ca: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="neither a host name nor an IP address"):
        pki.issue(ca, "hv-1", [host])
    assert not (ca / "hv-1.key").exists()


def test_without_a_ca_nothing_is_issued(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ca\.crt is missing.*pki init"):
        pki.issue(tmp_path, "hv-1")


def test_a_ca_whose_files_do_not_belong_together_issues_nothing(ca: Path, tmp_path: Path) -> None:
    pki.init(tmp_path / "other")
    (ca / "ca.key").write_bytes((tmp_path / "other" / "ca.key").read_bytes())
    with pytest.raises(ConfigError, match="is not the key of"):
        pki.issue(ca, "hv-1")
    (ca / "ca.key").write_text("nonsense")
    with pytest.raises(ConfigError, match="PEM"):
        pki.issue(ca, "hv-1")
