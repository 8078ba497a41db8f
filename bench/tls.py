"""TLS 1.3 with certificates on both sides, as the product has it, for whoever is measured against it."""

from __future__ import annotations

import ssl
import subprocess
import sys
from pathlib import Path

from bench.measure import Group, free_port, wait_listening

REPLICA = [sys.executable, "-m", "replica"]


class Certificates:
    """A private CA with one certificate per end, made by `replica pki`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ca, self.ca_key = directory / "ca.crt", directory / "ca.key"
        self.server, self.server_key = directory / "dr-1.crt", directory / "dr-1.key"
        self.client, self.client_key = directory / "hv-1.crt", directory / "hv-1.key"
        if not directory.exists():
            self._run("init", directory)
            self._run("issue", directory, "dr-1", "--host", "127.0.0.1", "--host", "localhost")
            self._run("issue", directory, "hv-1")

    def _run(self, *arguments: object) -> None:
        subprocess.run([*REPLICA, "pki", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)

    def context(self, *, server: bool) -> ssl.SSLContext:
        """For Python's own sockets."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(self.ca)
        context.load_cert_chain(*((self.server, self.server_key) if server else (self.client, self.client_key)))
        return context

    def openssl_server(self, port: int) -> list[str]:
        """Takes one connection and writes what comes to standard output. Its standard input must stay open."""
        return [
            "openssl", "s_server", "-quiet", "-tls1_3", "-accept", f"127.0.0.1:{port}", "-naccept", "1",
            "-cert", str(self.server), "-key", str(self.server_key), "-CAfile", str(self.ca),
            "-Verify", "1", "-verify_return_error", "-verify_quiet",
        ]  # fmt: skip

    def openssl_client(self, port: int) -> list[str]:
        """Sends its standard input and ends with it. `-nocommands`: a 'Q' in binary data is not a wish to quit."""
        return [
            "openssl", "s_client", "-quiet", "-no_ign_eof", "-nocommands", "-tls1_3", "-connect", f"127.0.0.1:{port}",
            "-cert", str(self.client), "-key", str(self.client_key), "-CAfile", str(self.ca),
            "-verify_return_error", "-verify_quiet",
        ]  # fmt: skip


def listen(group: Group, certificates: Certificates, stdout: int | None) -> tuple[int, subprocess.Popen[bytes]]:
    """Start an `openssl s_server` for one connection: its port, and the process. It never reads anything."""
    port = free_port()
    server = group.start(
        certificates.openssl_server(port), stdin=subprocess.PIPE, stdout=stdout, stderr=subprocess.DEVNULL
    )
    wait_listening(port, server)
    return port, server
