"""A private CA in a directory: the certificates that primaries and replica sites know each other by.

    init(Path("pki"))                                        ca.crt, ca.key
    issue(Path("pki"), "dr-1", ["localhost", "127.0.0.1"])   dr-1.crt, dr-1.key
    issue(Path("pki"), "hv-1")                               hv-1.crt, hv-1.key

The name becomes the subject's common name, and that is the identity a receiver
authorises. The hosts become subject alternative names (RFC 6125: the only
place a client looks for a host name); without any, the name itself is one if
it can be a DNS name. Every certificate serves both roles, because a failover
turns a replica site into a primary.

Keys are ECDSA P-256 in PKCS #8, readable by their owner only. The profile is
RFC 5280's: basic constraints with path length 0 and key usage on the CA, key
identifiers on both, so that `openssl verify -x509_strict` agrees. Nothing is
ever overwritten: a CA that is gone takes every certificate with it.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from replica.durable import FileSystem
from replica.errors import ConfigError, TargetExistsError
from replica.model import check_name
from replica.transport.tls import TlsFiles

CA_DAYS = 3652
LEAF_DAYS = 825
MAX_COMMON_NAME = 64
"""RFC 5280 appendix A: ub-common-name."""
_SKEW = timedelta(hours=1)
_MAX_PEM_BYTES = 64 << 10
_LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)\Z")


def init(directory: Path, name: str = "replica CA", *, fs: FileSystem | None = None) -> tuple[Path, Path]:
    """Make a CA; returns (certificate, key). TargetExistsError if the directory has one."""
    fs = fs or FileSystem()
    _check_common_name(name)
    cert_path, key_path = directory / "ca.crt", directory / "ca.key"
    fs.make_directory(directory, private=True)
    _refuse_existing(fs, cert_path, key_path)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _subject(name)
    start = datetime.now(UTC)
    certificate = (
        _builder(subject, subject, key.public_key(), start, start + timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write_pair(fs, cert_path, certificate, key_path, key)
    return cert_path, key_path


def issue(directory: Path, name: str, hosts: Sequence[str] = (), *, fs: FileSystem | None = None) -> TlsFiles:
    """Make a certificate for `name`, signed by the directory's CA.

    Raises ConfigError (no CA here, it has expired, a name or host that cannot
    be one) or TargetExistsError.
    """
    fs = fs or FileSystem()
    _check_common_name(name)
    if name == "ca":
        raise ConfigError("the name 'ca' is the CA's own", hint="choose another name")
    alternatives = [_general_name(host) for host in (hosts or ([name] if is_dns_name(name) else []))]
    files = TlsFiles(directory / "ca.crt", directory / f"{name}.crt", directory / f"{name}.key")
    _refuse_existing(fs, files.cert, files.key)
    ca, ca_key = _load_ca(fs, directory)
    start = datetime.now(UTC)
    if ca.not_valid_after_utc <= start:
        raise ConfigError(f"the CA {files.ca} has expired", hint="make a new one with `replica pki init` elsewhere")
    key = ec.generate_private_key(ec.SECP256R1())
    stop = min(start + timedelta(days=LEAF_DAYS), ca.not_valid_after_utc)
    builder = (
        _builder(ca.subject, _subject(name), key.public_key(), max(start, ca.not_valid_before_utc + _SKEW), stop)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(ca=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
                ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
            ),
            critical=False,
        )
    )
    if alternatives:
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    _write_pair(fs, files.cert, builder.sign(ca_key, hashes.SHA256()), files.key, key)
    return files


def is_dns_name(name: str) -> bool:
    """RFC 1123 §2.1: dot-separated labels of letters, digits and inner hyphens; 253 characters at most."""
    return len(name) <= 253 and all(_LABEL.match(label) for label in name.split("."))


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not is_dns_name(host.removeprefix("*.")):
        raise ConfigError(f"{host!r} is neither a host name nor an IP address", hint="give `--host` one of them")
    return x509.DNSName(host)


def _check_common_name(name: str) -> None:
    try:
        check_name(name, "certificate name")
        if len(name) > MAX_COMMON_NAME:
            raise ValueError(f"certificate name {name!r} has more than {MAX_COMMON_NAME} characters")
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _refuse_existing(fs: FileSystem, *paths: Path) -> None:
    for path in paths:
        if fs.exists(path):
            raise TargetExistsError(f"{path} is there already", hint="nothing is overwritten; move it away first")


def _load_ca(fs: FileSystem, directory: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    cert_path, key_path = directory / "ca.crt", directory / "ca.key"
    for path in (cert_path, key_path):
        if not fs.exists(path):
            raise ConfigError(f"{directory} has no CA: {path.name} is missing", hint="`replica pki init` makes one")
    try:
        certificate = x509.load_pem_x509_certificate(fs.read_bytes(cert_path, _MAX_PEM_BYTES))
        key = load_pem_private_key(fs.read_bytes(key_path, _MAX_PEM_BYTES), password=None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{cert_path} or {key_path} is not in (unencrypted) PEM form: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise ConfigError(f"{key_path} is not the key of {cert_path}")
    return certificate, key


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    issuer: x509.Name, subject: x509.Name, key: ec.EllipticCurvePublicKey, start: datetime, stop: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .issuer_name(issuer)
        .subject_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - _SKEW)
        .not_valid_after(stop)
    )


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write_pair(
    fs: FileSystem, cert_path: Path, cert: x509.Certificate, key_path: Path, key: ec.EllipticCurvePrivateKey
) -> None:
    """The key first: a certificate that is there has its key."""
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    fs.replace_bytes(key_path, pem, private=True)
    fs.replace_bytes(cert_path, cert.public_bytes(Encoding.PEM))
