"""URIs name servers and exports as the NBD project's specification says, also after a `Path` has had them."""

from pathlib import Path

import pytest

from replica import images
from replica.errors import ImageError
from replica.images.nbd_uri import NbdUri, is_uri, location, parse

CERTIFICATES = Path("/pki")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nbd://host", NbdUri(b"", "host", hostname="host")),
        ("nbd://host/", NbdUri(b"", "host", hostname="host")),
        ("nbd://host:10810/a%2Fb%20c", NbdUri(b"a/b c", "host", 10810, hostname="host")),
        ("nbd://host/a/b", NbdUri(b"a/b", "host", hostname="host")),
        ("nbd://[::1]:1/x", NbdUri(b"x", "::1", 1, hostname="::1")),
        ("nbd+unix:///x?socket=/run/a.sock", NbdUri(b"x", socket="/run/a.sock", hostname="localhost")),
        ("nbd+unix://?socket=/run/a.sock", NbdUri(b"", socket="/run/a.sock", hostname="localhost")),
        (
            "nbds://host/x?tls-certificates=/pki&tls-hostname=other",
            NbdUri(b"x", "host", tls=True, certificates=CERTIFICATES, hostname="other"),
        ),
        (
            "nbds+unix:///x?socket=/s&tls-certificates=/pki",
            NbdUri(b"x", socket="/s", tls=True, certificates=CERTIFICATES, hostname="localhost"),
        ),
    ],
)
def test_what_is_named(text: str, expected: NbdUri) -> None:
    path = location(text, Path("/etc"))
    assert parse(text) == parse(path) == expected
    assert images.format_of(path) == images.format_of(path, "nbd") == "nbd"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("nbd:///x", "names no host"),
        ("nbd://host:99999/x", "no NBD URI: Port out of range"),
        ("nbd://host/x?socket=/s", "`socket` is the absolute path"),
        ("nbd+unix:///x", "`socket` is the absolute path"),
        ("nbd+unix:///x?socket=s", "`socket` is the absolute path"),
        ("nbd://host/x?tls-certificate=/pki", "tls-certificate is not known"),
        ("nbd://host/x?tls-certificates=/pki", "names certificates and no TLS"),
        ("nbds://host/x", "TLS needs certificates; add .tls-certificates"),
        ("nbds://host/x?tls-certificates=pki", "is the absolute path of a folder"),
        ("nbd://host/x#part", "is not known"),
        ("nbd://host/" + "x" * 4097, "longer than 4096 bytes"),
        ("nbd://host/a//b", "would be lost; percent-encode"),
        ("nbd://host/a/./b", "would be lost; percent-encode"),
    ],
)
def test_what_is_refused(text: str, match: str) -> None:
    with pytest.raises(ImageError, match=match):
        location(text)


@pytest.mark.parametrize("text", ["/nbd/x", "nbd", "x.nbd", "/a/nbd:/x", "http://host/x", "nbd+ssh://host/x"])
def test_paths_are_paths(text: str) -> None:
    assert not is_uri(text) and location(text, Path("/etc")) == Path("/etc") / text
