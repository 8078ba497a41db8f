"""The command `replica`: thin, light to start, and the place where errors become lines and exit codes.

A command's module is imported when that command is asked for, and imports what
it needs inside the command: `replica --help` loads no cryptography, `replica sync` no web server.
Nothing is decided here that the library could not do: a command reads its
configuration, calls the engine, and prints.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and leave the process with its exit code."""
    from replica.cli import app

    sys.exit(app.main())
