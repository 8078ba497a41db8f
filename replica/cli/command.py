"""What every command shares: the `--debug` switch, the options, and JSON for errors."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from replica.cli.log import log_to_stderr
from replica.cli.output import error_fields, print_json
from replica.errors import ReplicaError

F = TypeVar("F", bound=Callable[..., Any])

DEBUG = "replica.debug"


class Command(click.Command):
    """A command that knows `--debug`, and that answers an error in JSON where JSON was asked for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        text = "Show what the engine logs, and tracebacks of errors."
        self.params.append(click.Option(["--debug"], is_flag=True, expose_value=False, callback=_debug, help=text))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ReplicaError as error:
            if ctx.meta.get(DEBUG):
                traceback.print_exc()
            if ctx.params.get("as_json"):
                print_json({"error": error_fields(error)})
            raise
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if ctx.params.get("as_json"):
                hint = "run again with --debug and report it"
                print_json({"error": error_fields(ReplicaError(f"fault in the engine: {error!r}", hint=hint))})
            raise


def _debug(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[DEBUG] = True
        sys.excepthook = sys.__excepthook__
        log_to_stderr()


def config_option(which: str) -> Callable[[F], F]:
    """`-c FILE`, required."""
    return click.option(
        "-c",
        "--config",
        type=click.Path(path_type=Path),
        required=True,
        metavar="FILE",
        help=f"The configuration, {which}.",
    )


def json_option(function: F) -> F:
    """`--json`, passed as `as_json`."""
    help_text = "Print one JSON document on standard output, and nothing else there."
    return click.option("--json", "as_json", is_flag=True, help=help_text)(function)


def parents_option(function: F) -> F:
    """`--parents DIR`, several times."""
    return click.option(
        "--parents",
        type=click.Path(path_type=Path),
        multiple=True,
        metavar="DIR",
        help="A folder, besides the image's own, that parents of a differencing image may lie in. Repeatable.",
    )(function)
