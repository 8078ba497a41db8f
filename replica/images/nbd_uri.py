"""Where an NBD export is: URIs as the NBD project's `doc/uri.md` has them.

    nbd://host[:port]/export                  TCP, port 10809 without one
    nbd+unix:///export?socket=/run/nbd.sock   a Unix socket
    nbds://…  nbds+unix://…                   the same with TLS, which is then demanded

Of TLS the query says `tls-certificates=FOLDER`, which holds what qemu, nbdkit and
libnbd call `ca-cert.pem` and, where the server asks for them, `client-cert.pem`
and `client-key.pem`; and `tls-hostname=NAME`, whom the server's certificate must
name (without it: the host; `localhost` on a Unix socket).

An image is named by a `Path` everywhere, so a URI is one, too: `Path` writes
`nbd://host/x` as `nbd:/host/x`, and both are read alike. What it would change
besides (`//`, `/.`, a slash at the end) is percent-encoded: `location` refuses it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, unquote_to_bytes, urlsplit

from replica.errors import ImageError

DEFAULT_PORT = 10809
"""Assigned by IANA."""
MAX_NAME_BYTES = 4096
"""Of an export's name (`doc/proto.md`, "Values")."""
_URI = re.compile(r"(nbds?(?:\+unix)?):/")
_KEYS: Final = {"socket", "tls-certificates", "tls-hostname"}
_FORMS = "write nbd://host/export or nbd+unix:///export?socket=/path, with nbds for TLS"


@dataclass(frozen=True)
class NbdUri:
    """An export, and how to get there. Either `socket` or `host` is set."""

    export: bytes
    host: str = ""
    port: int = DEFAULT_PORT
    socket: str = ""
    tls: bool = False
    certificates: Path | None = None
    """The folder with the certificates; always there with `tls`."""
    hostname: str = ""
    """Whom the server's certificate must name."""
    label: str = ""
    """What to call it in messages, if not by its place."""

    @property
    def place(self) -> str:
        """Server and export in words, for messages."""
        if self.label:
            return self.label
        name = self.export.decode(errors="replace")
        shown = name if name.isprintable() else ascii(name)
        return f"export {shown!r} at {self.socket or f'{self.host}:{self.port}'}"


def is_uri(path: Path | str) -> bool:
    """Whether that names an NBD export and no file."""
    return _URI.match(str(path)) is not None


def location(text: str, folder: Path | None = None) -> Path:
    """An image as a configuration or command line names it: a URI, or a path (a relative one starts at `folder`).

    ImageError for a URI that is none, or that a `Path` would change.
    """
    if not is_uri(text):
        return folder / text if folder is not None else Path(text)
    path = Path(text)
    if re.match(r"nbds?:(/(?!/)|///)", text):
        raise ImageError(f"image {text} names no host", hint=_FORMS)
    parse(path)
    collapsed = re.sub(r":/+", ":/", text, count=1)
    if collapsed.rstrip("/") != str(path).rstrip("/"):
        raise ImageError(f"image {text}: // and /. in it would be lost", hint="percent-encode them: / is %2F, . is %2E")
    return path


def parse(path: Path | str) -> NbdUri:
    """The export that a URI names. ImageError for one that is none, or that asks for what is not known."""
    text = str(path)
    found = _URI.match(text)
    if found is None:
        raise ImageError(f"image {text} is no NBD URI", hint=_FORMS)
    scheme, rest = found[1], text[found.end() :].lstrip("/")
    tls, unix = scheme.startswith("nbds"), scheme.endswith("+unix")
    try:
        url = urlsplit(f"{scheme}://{'/' if unix else ''}{rest}")
        query = parse_qs(url.query, keep_blank_values=True, strict_parsing=bool(url.query))
        port = url.port or DEFAULT_PORT
    except ValueError as error:
        raise ImageError(f"image {text} is no NBD URI: {error}", hint=_FORMS) from error
    unknown = query.keys() - _KEYS
    if unknown or url.fragment or any(len(values) > 1 for values in query.values()):
        raise ImageError(f"image {text}: {', '.join(sorted(unknown)) or 'a part of it'} is not known", hint=_FORMS)
    words = {key: values[0] for key, values in query.items()}
    export = unquote_to_bytes(url.path.removeprefix("/"))
    if len(export) > MAX_NAME_BYTES:
        raise ImageError(f"image {text[:60]}…: the export's name is longer than {MAX_NAME_BYTES} bytes")
    if ("socket" in words) != unix or (unix and not words["socket"].startswith("/")):
        raise ImageError(f"image {text}: `socket` is the absolute path of a Unix socket", hint=_FORMS)
    host = (url.hostname or "") if not unix else ""
    if not unix and not host:
        raise ImageError(f"image {text} names no host", hint=_FORMS)
    if tls and not words.get("tls-certificates"):
        raise ImageError(
            f"image {text}: TLS needs certificates",
            hint="add ?tls-certificates=/folder with ca-cert.pem (and client-cert.pem, client-key.pem) in it",
        )
    if tls and not words["tls-certificates"].startswith("/"):
        raise ImageError(f"image {text}: `tls-certificates` is the absolute path of a folder", hint=_FORMS)
    if not tls and words.keys() & {"tls-certificates", "tls-hostname"}:
        raise ImageError(f"image {text} names certificates and no TLS", hint="write nbds instead of nbd")
    return NbdUri(
        export,
        host,
        port,
        words.get("socket", ""),
        tls,
        Path(words["tls-certificates"]) if tls else None,
        words.get("tls-hostname") or host or "localhost",
    )
