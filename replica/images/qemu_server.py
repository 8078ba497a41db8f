"""A qemu-nbd of one's own, for one image: started, connected to, and gone with whoever started it.

It is handed open files and told every driver, so it opens nothing else, whatever the
image says (`qemu_layers`); it runs without the right to gain privileges. Its socket
is in a private directory, and only until the connections are made. It ends, in this
order of luck: when the image is closed; when its last client is gone, since it is not
`--persistent`; and when the thread that started it ends, with its process if need be
by SIGKILL (prctl(2): PR_SET_PDEATHSIG). That signal belongs to a thread, so a
thread of its own starts it and lives as long.

`force-share` leaves out qemu's image locks: reading never keeps a machine from
starting, and a machine that runs never keeps from reading. Whether the files stood
still is for the proof to say (`tracking.still`), as for every image.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from replica.errors import ImageError
from replica.images.nbd import MAX_CONNECTIONS
from replica.images.nbd_client import NbdConnection
from replica.images.nbd_protocol import Flag
from replica.images.nbd_uri import NbdUri
from replica.images.qemu_layers import QemuLayer

START_SECONDS: Final = 20.0
_TAIL_BYTES: Final = 2000


class QemuServer:
    """Serves a chain of layers, read-only, until `close`. Failures are ImageErrors."""

    def __init__(self, path: Path, layers: Sequence[QemuLayer]) -> None:
        self._path = path
        self._process: subprocess.Popen[bytes] | None = None
        self._failure: OSError | None = None
        self._said = b""
        with tempfile.TemporaryDirectory(prefix="replica-nbd-") as folder:
            place = Path(folder) / "socket"
            command = [
                *(_program("setpriv", "util-linux"), "--pdeathsig", "KILL", "--no-new-privs"),
                *(_program("qemu-nbd", "qemu-utils (Debian, Ubuntu) or qemu-img (Fedora, RHEL)"), "--read-only"),
                *("--shared", str(MAX_CONNECTIONS), "--socket", str(place)),
                "json:" + json.dumps(node(layers)),
            ]
            started = threading.Event()
            files = [layer.source.fileno() for layer in layers]
            self._keeper = threading.Thread(
                target=self._keep, args=(command, files, started), name="qemu-nbd", daemon=True
            )
            self._keeper.start()
            started.wait()
            try:
                self.uri = NbdUri(b"", socket=str(place), label=f"image {path}")
                self.connections = self._connect()
            except BaseException:
                self.close()
                raise

    def _keep(self, command: list[str], files: list[int], started: threading.Event) -> None:
        """Start it, take what it says, see it end."""
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                bufsize=0,
                pass_fds=files,
                env={"PATH": os.defpath, "LC_ALL": "C"},
            )
        except OSError as error:
            self._failure = error
            return
        finally:
            started.set()
        with self._process as process:
            assert process.stderr is not None
            while said := process.stderr.read(4096):
                self._said = (self._said + said)[-_TAIL_BYTES:]

    def _connect(self) -> list[NbdConnection]:
        first = self._first_connection()
        made = [first]
        try:
            while Flag.CAN_MULTI_CONN in first.export.flags and len(made) < MAX_CONNECTIONS:
                made.append(NbdConnection(self.uri))
        except BaseException:
            for connection in made:
                connection.close()
            raise
        return made

    def _first_connection(self) -> NbdConnection:
        deadline = time.monotonic() + START_SECONDS
        while self._process is not None and self._process.poll() is None and time.monotonic() < deadline:
            if Path(self.uri.socket).exists():
                try:
                    return NbdConnection(self.uri)
                except ImageError as error:  # bound and not listening yet, or the image is none and it is about to end
                    self._keeper.join(0 if isinstance(error.__cause__, ConnectionRefusedError) else 1)
                    if self._keeper.is_alive() and not isinstance(error.__cause__, ConnectionRefusedError):
                        raise
            time.sleep(0.005)
        if self._process is not None:
            self._process.kill()
        self._keeper.join()
        why = str(self._failure or "") or _said(self._said) or "it did not start in time"
        raise ImageError(f"qemu-nbd cannot open image {self._path}: {why}")

    def close(self) -> None:
        """Idempotent."""
        if self._process is not None:
            self._process.kill()
        self._keeper.join()


def node(layers: Sequence[QemuLayer]) -> dict[str, Any]:
    """The block devices of qemu that read the layers, as `blockdev-add` knows them: every file and driver is named."""
    node: dict[str, Any] | None = None
    for layer in reversed(layers):
        kind = "host_device" if layer.source.device else "file"
        below: dict[str, Any] = {"driver": kind, "filename": f"/dev/fd/{layer.source.fileno()}"}
        above: dict[str, Any] = {"driver": layer.driver, "file": below, "read-only": True}
        if layer.driver in ("qcow2", "vmdk"):
            above["backing"] = node
        node = above
    assert node is not None
    return {**node, "force-share": True}


def _program(name: str, package: str) -> str:
    """The program's path. ImageError that says which package has it."""
    for folder in (*os.get_exec_path(), *os.defpath.split(os.pathsep)):
        path = Path(folder or ".") / name
        if path.is_absolute() and os.access(path, os.X_OK):
            return str(path)
    raise ImageError(f"{name} is needed to read this image, and is not installed", hint=f"install {package}")


def _said(text: bytes) -> str:
    """The last line of what it printed, as far as it prints."""
    lines = text.decode(errors="replace").strip().splitlines()
    return "".join(c for c in (lines[-1] if lines else "") if c.isprintable())
