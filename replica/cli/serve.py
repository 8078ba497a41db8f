"""`replica serve`: the replica site."""

from __future__ import annotations

from pathlib import Path

import click

from replica.cli.command import Command, config_option
from replica.cli.output import warn_of_open_keys


@click.command(cls=Command)
@config_option("receiver.toml")
def serve(config: Path) -> None:
    """Take what primaries send, until stopped.

    Says one line when it is ready. SIGTERM or Ctrl-C ends it in order; a kill
    at any moment loses nothing either, the next start recovers.

    \b
    Example:
      replica serve -c receiver.toml
    """
    from replica.cli.log import log_to_stderr
    from replica.config import load_receiver
    from replica.receiver.server import serve as serve_site

    spec = load_receiver(config)
    paths = [storage.path for storage in spec.storages.values()]
    receipt_keys = [spec.receipt_key] if spec.receipt_key else [path / "receipt.key" for path in paths]
    warn_of_open_keys([spec.tls.key, *receipt_keys, *(key for path in paths for key in path.glob("*/keys/*.key"))])
    log_to_stderr()
    serve_site(spec)
