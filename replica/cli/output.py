"""How results and errors look: one JSON document, plain tables, sizes and times a person reads."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import click
import msgspec

from replica.errors import ReplicaError


@dataclass
class Said:
    """What a command line has answered so far: the `obj` of its click contexts."""

    document: bool = False


def print_json(value: object) -> None:
    """The one document on standard output, indented, with a newline at its end.

    What of a file's name is not UTF-8 shows as U+FFFD: JSON has nothing else for it.
    """
    try:
        data = msgspec.json.encode(value)
    except UnicodeEncodeError:
        data = msgspec.json.encode(_as_utf8(msgspec.to_builtins(value)))
    context = click.get_current_context(silent=True)
    if context is not None and isinstance(context.obj, Said):
        context.obj.document = True
    click.echo(msgspec.json.format(data, indent=2).decode())


def _as_utf8(value: object) -> object:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if isinstance(value, dict):
        return {_as_utf8(key): _as_utf8(item) for key, item in value.items()}
    return [_as_utf8(item) for item in value] if isinstance(value, list | tuple) else value


def error_fields(error: ReplicaError) -> dict[str, object]:
    """An error as `--json` shows it."""
    return {
        "code": error.code,
        "message": error.message,
        "hint": error.hint,
        "exit_code": error.exit_code,
        "retryable": error.retryable,
    }


def complain(error: ReplicaError, about: str = "") -> None:
    """One line on standard error; `about` names the thing where the message may not."""
    text = " ".join(str(error).split())
    prefix = f"{about}: " if about and not error.message.startswith(about) else ""
    click.echo(f"replica: {prefix}{text}", err=True)


def warn_of_open_keys(paths: Iterable[Path]) -> None:
    """One line on standard error for each private key that any user of this host may read or write."""
    for path in paths:
        with suppress(OSError):
            if path.stat().st_mode & 0o007:
                click.echo(
                    f"replica: WARNING: the key {path} is open to every user of this host; chmod 600 it", err=True
                )


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns padded to their widest cell; the first is aligned left, cells that are numbers right."""
    cells = [list(headers), *(list(row) for row in rows)]
    widths = [max(len(row[n]) for row in cells) for n in range(len(headers))]
    right = [bool(rows) and all(row[n][:1].isdigit() and n > 0 for row in rows) for n in range(len(headers))]
    for row in cells:
        parts = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        click.echo("  ".join(parts).rstrip())


def size(count_bytes: float) -> str:
    """`1.5 MiB`; three digits at most before the point."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count_bytes < 1024:
            return f"{count_bytes:.0f} B" if unit == "B" else f"{count_bytes:.1f} {unit}"
        count_bytes /= 1024
    return f"{count_bytes:.1f} TiB"


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `5 min 3 s`, `2 h 10 min`, `3 d 4 h`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit, below, next_unit, step in (("min", 3600, "s", 60), ("h", 86400, "min", 3600)):
        if whole < 60:
            return f"{whole} s"
        if whole < below:
            rest = whole % step // (step // 60)
            return f"{whole // step} {unit}" + (f" {rest} {next_unit}" if rest else "")
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def on_terminal() -> bool:
    """Whether bars may be drawn: they go to standard error."""
    return sys.stderr.isatty()
