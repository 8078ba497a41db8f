"""TLS 1.3 with certificates on both sides, and plain words for what goes wrong in it.

Both sides trust exactly one CA file, their own: there is no fall-back to the
system's. The receiver asks every client for a certificate (CERT_REQUIRED), the
sender checks chain, dates and host name. Who a client *is*, is the one common
name in its certificate's subject, and nothing it says inside HTTP.

There is no session resumption: a certificate is looked at on every connection,
so one that was replaced or has expired is out at the next one.

In TLS 1.3 the client's handshake is over before the server has seen the
client's certificate (RFC 8446 §4.4.2, appendix E.1.2): a refusal reaches the
client as an alert at its first *read*. Two things follow. `refusal` must be
asked about errors of the first exchange as well. And the server must get the
alert out before the connection goes: asyncio (up to 3.13 at least) drops what
is still to be written when a handshake fails. `_RefusingObject` therefore
keeps a failed handshake open, deaf, until the client has hung up or the
handshake's time is over; what arrives meanwhile is thrown away.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from replica.errors import ConfigError, ForbiddenError, ReplicaError, TransportError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files: the CA both sides trust, and one's own certificate and private key."""

    ca: Path
    cert: Path
    key: Path


def client_context(files: TlsFiles) -> ssl.SSLContext:
    """The sender's context. Raises ConfigError naming the file that cannot be used."""
    return _prepare(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), files)


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """The receiver's context, for asyncio. Raises ConfigError naming the file that cannot be used."""
    context = _ServerContext(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0
    return _prepare(context, files)


def _prepare(context: ssl.SSLContext, files: TlsFiles) -> ssl.SSLContext:
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(["http/1.1"])
    for what, path in (("ca", files.ca), ("cert", files.cert), ("key", files.key)):
        _readable(what, path)
    try:
        context.load_verify_locations(files.ca)
    except ssl.SSLError as error:
        raise ConfigError(f"[tls] ca {files.ca} holds no certificate in PEM form", hint="name the CA's .crt") from error
    try:
        context.load_cert_chain(files.cert, files.key, password=_no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            what = f"[tls] key {files.key} is not the key of cert {files.cert}"
        else:
            what = f"[tls] cert {files.cert} or key {files.key} is not in (unencrypted) PEM form"
        raise ConfigError(what, hint="make a pair with `replica pki issue`") from error
    return context


def _readable(what: str, path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise ConfigError(
            f"cannot read [tls] {what} {path}: {error.strerror}", hint="`replica pki` makes these files"
        ) from error


def _no_password() -> bytes:
    """Never ask on the terminal: an encrypted key is an error, not a prompt in a service."""
    return b""


Certificate = Mapping[str, object]
"""A certificate as `SSLObject.getpeercert()` shows it."""


def identity_of(certificate: Certificate | None) -> str:
    """The identity in a verified peer certificate, as `getpeercert()` gives it: its one common name.

    Raises ForbiddenError if there is none or more than one, or one that does not print: names stand in logs.
    """
    subject = (certificate or {}).get("subject", ())
    assert isinstance(subject, tuple)
    names = [value for part in subject for key, value in part if key == "commonName"]
    if len(names) != 1 or not isinstance(names[0], str) or not names[0]:
        raise ForbiddenError("the client's certificate does not have exactly one common name (CN)")
    if not names[0].isprintable():
        raise ForbiddenError(
            f"the client's certificate has a common name with characters that do not print: {names[0]!a}"
        )
    return names[0]


_TRUST = "is not signed by the CA in"
_VERIFY = {  # OpenSSL, include/openssl/x509_vfy.h: X509_V_ERR_…
    7: _TRUST,
    9: "is not valid yet (or this clock is wrong), judged with",
    10: "has expired (or this clock is wrong), judged with",
    18: _TRUST,
    19: _TRUST,
    20: _TRUST,
    21: _TRUST,
}
_NAMES = (62, 64)  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH
_ALERTS = {  # RFC 8446 §6.2, as OpenSSL names them
    "TLSV1_ALERT_UNKNOWN_CA": "is not signed by the CA that the receiver trusts",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "has expired",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "is revoked",
    "SSLV3_ALERT_BAD_CERTIFICATE": "is not valid",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "is not one for TLS clients",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "was not accepted",
    "TLSV1_ALERT_ACCESS_DENIED": "was not accepted",
    "TLSV1_ALERT_DECRYPT_ERROR": "does not fit its key",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "was not presented",
}


def refusal(error: ssl.SSLError, url: str, files: TlsFiles) -> ReplicaError:
    """What a TLS error of the client means and what to do about it.

    ForbiddenError if a certificate was refused, by this side or the other;
    else TransportError.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in _NAMES:
            return ForbiddenError(
                f"the certificate of {url} is for other host names",
                hint="use one of its names in `to`, or issue it again with `--host` for this one",
            )
        why = _VERIFY.get(error.verify_code, f"was refused ({error.verify_message}), judged with")
        return ForbiddenError(
            f"the certificate of {url} {why} {files.ca}", hint="both sides need certificates of the same CA"
        )
    why = _ALERTS.get(error.reason or "", "")
    if why:
        return ForbiddenError(
            f"{url} refused this side's certificate: {files.cert} {why}",
            hint="issue one with `replica pki issue` from the receiver's CA",
        )
    return TransportError(
        f"no TLS 1.3 with {url}: {error.reason or error}",
        hint="the address must be the receiver's own port, not a plain HTTP or an intercepting one",
    )


class _RefusingObject(ssl.SSLObject):
    """A server-side TLS object whose failed handshake lets its alert out (see the module's text)."""

    discard: Callable[[], object] | None = None
    _failed = False

    def do_handshake(self) -> None:
        if not self._failed:
            try:
                super().do_handshake()
                return
            except ssl.SSLWantReadError:
                raise
            except ssl.SSLError as error:
                log.warning("refused a connection at its TLS handshake: %s", _reason(error))
                self._failed = True
        if self.discard is not None:
            self.discard()
        raise ssl.SSLWantReadError(ssl.SSL_ERROR_WANT_READ, "the handshake has failed; waiting for the other side")


class _ServerContext(ssl.SSLContext):
    """Makes `_RefusingObject`s that can throw away what arrives after the refusal."""

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        made = super().wrap_bio(incoming, outgoing, server_side, server_hostname, session)
        if isinstance(made, _RefusingObject):
            made.discard = incoming.read
        return made


_ServerContext.sslobject_class = _RefusingObject


def _reason(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the client's certificate: {error.verify_message}"
    return error.reason or str(error)
