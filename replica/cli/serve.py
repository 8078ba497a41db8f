"""`replica serve`: the replica site."""

from __future__ import annotations

from pathlib import Path

import click

from replica.cli.command import Command, config_option


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
    log_to_stderr()
    serve_site(spec)
