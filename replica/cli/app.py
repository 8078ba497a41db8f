"""The group of commands, and what happens to an error on its way out.

Standard output carries results only. With `--json` it carries exactly one JSON
document: the result, or `{"error": …}`. Standard error carries one line per
error, `replica: <what happened to which thing>; <what to do>`, and the exit
code says the class of the error (docs/OPERATIONS.md). A traceback is shown
with `--debug` only.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
from importlib import import_module
from types import FrameType, TracebackType

import click

from replica import __version__
from replica.cli.output import Said, complain, print_json
from replica.errors import ReplicaError

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
GO_ON = "nothing is lost, run it again to go on"
COMMANDS = {
    "adopt": "adopt",
    "enrol": "enrol",
    "image": "image",
    "lock": "lock",
    "pki": "pki",
    "points": "points",
    "prune": "prune",
    "receipt": "receipt",
    "restore": "restore",
    "resync": "resync",
    "run": "sync",
    "serve": "serve",
    "status": "status",
    "sync": "sync",
    "verify": "verify",
}
"""Each command, and the module of `replica.cli` that has it under the same name."""


class Commands(click.Group):
    """A group whose commands are imported when they are asked for: only `--help` imports them all."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*COMMANDS, *self.commands})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in COMMANDS and cmd_name not in self.commands:
            module = import_module(f"replica.cli.{COMMANDS[cmd_name]}")
            self.add_command(getattr(module, cmd_name))
        return super().get_command(ctx, cmd_name)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes and every setting: docs/OPERATIONS.md.",
)
@click.version_option(__version__, prog_name="replica", message="%(prog)s %(version)s")
def cli() -> None:
    """Disaster-recovery replication of virtual machine disks.

    \b
    Set up, once:
      replica pki init pki/                              a private certificate authority
      replica pki issue pki/ dr-1 --host dr-1.example    a certificate for the replica site
      replica pki issue pki/ hv-1                        a certificate for the primary
    At the replica site:
      replica serve -c receiver.toml                     take what primaries send
      replica points web-1 -c receiver.toml              which points can be restored
      replica restore web-1 --to out/ -c receiver.toml   the newest point as image files
      replica lock web-1 --point 3 --until 2027-01-31 -c receiver.toml
                                                         a point that must stay
      replica receipt show web-1 -c receiver.toml        what the site signed of it
    At the primary site:
      replica sync web-1 -c sender.toml                  one cycle, now
      replica run -c sender.toml                         cycles on schedule until stopped
    Anywhere:
      replica image info web-1.vhd                       what a disk image is
      replica image convert web-1.vhd web-1.raw --format raw
    """


def main() -> int:
    """The process: what nobody raised on purpose becomes one line, and SIGTERM unwinds like Ctrl-C does.

    What the engine logs is shown by the long-running commands and with `--debug`: else an error would be told twice.
    """
    sys.excepthook = _fault
    logging.getLogger("replica").addHandler(logging.NullHandler())
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a file's name is shown as it is
    signal.signal(signal.SIGTERM, _terminated)
    return run(sys.argv[1:])


def run(arguments: list[str]) -> int:
    """Run one command line; returns the exit code. Prints, never raises what a user could cause."""
    said = Said()

    def failed(kind: str, exit_code: int, message: str, hint: str) -> int:
        """What no `ReplicaError` says: one line, and the one document where it was asked for and is not there yet."""
        click.echo(f"replica: {message}; {hint}", err=True)
        if "--json" in arguments and not said.document:
            retryable = kind == "interrupted"
            error = {"code": kind, "message": message, "hint": hint, "exit_code": exit_code, "retryable": retryable}
            print_json({"error": error})
        return exit_code

    try:
        code = cli.main(args=arguments, prog_name="replica", standalone_mode=False, obj=said)
        sys.stdout.flush()
    except ReplicaError as error:
        complain(error)
        return error.exit_code
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "replica"
        return failed("usage", error.exit_code, error.format_message(), f"see `{path} --help`")
    except click.ClickException as error:
        return failed("usage", error.exit_code, error.format_message(), "correct the command line")
    except (KeyboardInterrupt, click.Abort):
        return failed("interrupted", INTERRUPTED, "interrupted", GO_ON)
    except SystemExit as leave:
        if leave.code != TERMINATED:
            raise
        return failed("interrupted", TERMINATED, "terminated", GO_ON)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return code if isinstance(code, int) else 0


def _fault(kind: type[BaseException], error: BaseException, _trace: TracebackType | None) -> None:
    """The last resort: an exception that nobody raised on purpose, as one line. Python exits with 1 after it."""
    text = str(error).splitlines()[0] if str(error) else "no details"
    click.echo(f"replica: fault in the engine: {kind.__name__}: {text}; run again with --debug and report it", err=True)


def _terminated(_number: int, _frame: FrameType | None) -> None:
    """Unwind, so that frozen machines are thawed on the way out."""
    raise SystemExit(TERMINATED)
