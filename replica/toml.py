"""A TOML file as typed values, every complaint with the file and the line.

The standard parser says where broken syntax is, but forgets positions once a
file parses. So the text is scanned a second time, for table headers and keys
only; that scan serves messages and never values, and a spelling it does not
understand costs a line number and nothing else.

    config = toml.read(Path("sender.toml"), SenderFile)

`SenderFile` is a `msgspec.Struct` whose fields are plain types, structs
(tables) or tuples of structs (arrays of tables). Unknown keys are refused with
the nearest known one, missing and ill-typed ones are named.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from replica.errors import ConfigError

Place = tuple[str | int, ...]
"""Where a value stands: `("machine", 0, "disk", 1, "image")`."""

MAX_FILE_BYTES = 1 << 20

_HEADER = re.compile(r"^\s*(\[\[?)\s*([A-Za-z0-9_.\- ]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"^\s*([A-Za-z0-9_\-]+)\s*[=.]")

T = TypeVar("T", bound=msgspec.Struct)


class Source:
    """One file's text, and where in it things stand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}", hint="check the path given with -c") from error
        if len(data) > MAX_FILE_BYTES:
            raise ConfigError(f"{path} has {len(data)} bytes, which is no configuration")
        try:
            text = data.decode()
            self.table: dict[str, Any] = tomllib.loads(text)
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise ConfigError(f"{path}:{line}: not UTF-8 text") from error
        except tomllib.TOMLDecodeError as error:
            raise self._syntax(text, error) from error
        except ValueError as error:  # a number of thousands of digits
            raise ConfigError(f"{path} is no configuration: {error}", hint="correct the file") from error
        except RecursionError as error:
            raise ConfigError(f"{path} is nested too deeply", hint="no setting needs that; correct the file") from error
        self._lines = _positions(text)

    def _syntax(self, text: str, error: tomllib.TOMLDecodeError) -> ConfigError:
        found = re.search(r"\(at line (\d+), column (\d+)\)", str(error))
        line = int(found[1]) if found else text.count("\n") + 1
        reason = str(error).split(" (at ")[0]
        return ConfigError(f"{self.path}:{line}: broken TOML: {reason}", hint="correct that line")

    def fail(self, place: Place, message: str, hint: str = "") -> NoReturn:
        """Raise the ConfigError that points at `place`, or at the nearest thing around it that has a line."""
        known = next((place[:n] for n in range(len(place), 0, -1) if place[:n] in self._lines), None)
        where = f"{self.path}:{self._lines[known]}" if known else str(self.path)
        raise ConfigError(f"{where}: {message}", hint=hint)


def read(path: Path, kind: type[T]) -> tuple[Source, T]:
    """The file as a value of `kind`, and its source for later complaints. Raises ConfigError."""
    source = Source(path)
    return source, build(source, kind, source.table, ())


def build(source: Source, kind: type[T], table: dict[str, Any], place: Place) -> T:
    """The table at `place` as a `kind`."""
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    hints = get_type_hints(kind, include_extras=True)
    for key in table:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
            hint = f"did you mean `{near[0]}`?" if near else f"known keys here: {', '.join(fields)}"
            source.fail((*place, key), f"unknown key `{_dotted((*place, key))}`", hint)
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in table:
            values[name] = _value(source, hints[name], table[name], (*place, name))
        elif field.required:
            where = f"[{_dotted(place)}]" if place else "the file"
            source.fail(place, f"`{name}` is missing in {where}", f"add `{name} = …`")
    try:
        return kind(**values)
    except ValueError as error:
        source.fail(place, str(error))


def _value(source: Source, hint: Any, value: Any, place: Place) -> Any:
    """One value as the type its field has."""
    inner = next((a for a in get_args(hint) if isinstance(a, type) and issubclass(a, msgspec.Struct)), None)
    if get_origin(hint) is tuple and inner is not None:
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            source.fail(place, f"`{_dotted(place)}` is an array of tables", f"write it as [[{_dotted(place)}]]")
        return tuple(build(source, inner, item, (*place, n)) for n, item in enumerate(value))
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        if not isinstance(value, dict):
            source.fail(place, f"`{_dotted(place)}` is a table", f"write it as [{_dotted(place)}]")
        return build(source, hint, value, place)
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and "\0" in text:
            source.fail(place, f"`{_dotted(place)}` has a NUL character in it", "no name, path or command can have one")
    try:
        return msgspec.convert(value, hint)
    except msgspec.ValidationError as error:
        source.fail(place, f"`{_dotted(place)}`: {_in_words(str(error), hint)}")


_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text in quotes",
    "bool": "true or false",
    "array": "a list in [ ]",
    "object": "a table",
}


def _in_words(text: str, hint: Any) -> str:
    """What msgspec says of a value, without the words of its types; and what a choice is between."""
    if text.startswith("Invalid enum value"):
        choices = ", ".join(f'"{choice}"' for choice in _choices(hint))
        return f"{text.removeprefix('Invalid enum value ').split(' - at')[0]} is not possible; it is one of {choices}"
    if found := re.match(r"Expected `([^`]+)`, got `(\w+)`", text):
        wanted = " or ".join(_TYPES.get(kind, kind) for kind in found[1].split(" | ") if kind != "null")
        return f"{wanted} is expected here, this is {_TYPES.get(found[2], found[2])}"
    return text.replace("`", "")


def _choices(hint: Any) -> list[str]:
    if isinstance(hint, type) and issubclass(hint, Enum):
        return [str(member.value) for member in hint]
    if get_origin(hint) is Literal:
        return [str(choice) for choice in get_args(hint)]
    return [choice for part in get_args(hint) for choice in _choices(part)]


def _dotted(place: Place) -> str:
    return ".".join(part for part in place if isinstance(part, str))


def _positions(text: str) -> dict[Place, int]:
    """Line numbers of the tables and keys the scan recognises."""
    lines: dict[Place, int] = {}
    counts: dict[Place, int] = {}
    current: Place = ()
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            *outer, last = (part.strip() for part in header[2].split("."))
            current = ()
            for part in outer:
                current = (*current, part)
                if current in counts:
                    current = (*current, counts[current] - 1)
            current = (*current, last)
            if header[1] == "[[":
                lines.setdefault(current, number)
                counts[current] = counts.get(current, 0) + 1
                current = (*current, counts[current] - 1)
            lines[current] = number
        elif key := _KEY.match(line):
            lines.setdefault((*current, key[1]), number)
    return lines
