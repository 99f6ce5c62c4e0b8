"""Rows of a JSON Lines file. Every bad row is reported, by line number, in one error; none is dropped.

Stricter than the `json` module where that lets mistakes through: NaN and Infinity, numbers that overflow to
infinity, a key given twice, and half of a surrogate pair are refused. Blank lines separate rows and hold
none. A byte order mark at the start of the file is skipped.
"""

from __future__ import annotations

import json
import math
from codecs import BOM_UTF8
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lora.errors import DataError, MissingFileError

SHOWN = 20  # bad rows that one message lists; the rest are counted

T = TypeVar("T")


class Row(NamedTuple):
    """One JSON object of the file."""

    line: int  # counted from 1, blank lines included, as an editor shows it
    fields: dict[str, Any]


class RowError(ValueError):
    """What is wrong with one row; `Problems` turns all of them into a single DataError."""


class Problems:
    """The bad rows of one file, gathered so that they are reported together."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: list[tuple[int, str]] = []

    def add(self, line: int, message: str) -> None:
        """Note that the row at `line` is bad; `message` names the line in its own words."""
        self._found.append((line, message))

    def raise_any(self) -> None:
        """Raise one error for all that was added, or return where nothing was.

        Raises:
            DataError: at least one row is bad. It lists the first 20 in the order of the file, and counts the
                rest.
        """
        messages = [message for _, message in sorted(self._found)]
        if not messages:
            return
        if len(messages) == 1:
            raise DataError(f"{self._path}: {messages[0]}")
        lines = [f"{self._path}: {len(messages)} problems", *messages[:SHOWN]]
        if len(messages) > SHOWN:
            lines.append(f"and {len(messages) - SHOWN} more")
        raise DataError("\n  ".join(lines))


def read_jsonl(path: str | Path) -> list[Row]:
    """Return the rows of the JSON Lines file at `path`, in order.

    Raises:
        MissingFileError: there is no such file.
        DataError: a line is not a JSON object in UTF-8 (all such lines are listed), or the file holds no row.
    """
    rows, problems = scan_jsonl(path)
    problems.raise_any()
    return rows


def read_parsed(path: str | Path, parse: Callable[[Row], T]) -> tuple[list[T], Problems]:
    """Return `parse(row)` for every good row, and the problems of the others.

    A row is bad where it cannot be read, or where `parse` raises RowError. The caller may add to the
    problems, and raises them.

    Raises:
        MissingFileError: there is no such file.
        DataError: the file holds no row.
    """
    rows, problems = scan_jsonl(path)
    parsed = []
    for row in rows:
        try:
            parsed.append(parse(row))
        except RowError as error:
            problems.add(row.line, f"line {row.line}: {error}")
    return parsed, problems


def scan_jsonl(path: str | Path) -> tuple[list[Row], Problems]:
    """Return the good rows of the file at `path` and the problems of the others.

    Raises:
        MissingFileError: there is no such file.
        DataError: the file holds no row.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(
            f"{path}: expected a JSON Lines file, found {'a folder' if path.is_dir() else 'nothing'}"
        )
    rows, problems = [], Problems(path)
    # split on the newline byte alone: JSON allows U+2028 and its like inside a string, where str.splitlines
    # would cut
    raw_lines = path.read_bytes().removeprefix(BOM_UTF8).split(b"\n")
    numbered = [(number, raw) for number, raw in enumerate(raw_lines, start=1) if raw.strip()]
    if not numbered:
        raise DataError(f"{path}: Training data is empty; expected one JSON object per line")
    for number, raw in numbered:
        try:
            rows.append(Row(number, _parse(raw)))
        except RowError as error:
            problems.add(number, f"Invalid JSONL at line {number}: {error}")
    return rows, problems


def text_field(row: Row, name: str) -> str:
    """Return the non-empty string that `row` holds under `name`.

    Raises:
        RowError: it is absent, not a string, or empty.
    """
    value = field(row, name)
    if not isinstance(value, str):
        raise RowError(f"{name!r}: expected a string, found {kind(value)}")
    if not value:
        raise RowError(f"{name!r}: expected a text, found an empty string")
    return value


def field(row: Row, name: str) -> Any:
    """Return what `row` holds under `name`.

    Raises:
        RowError: it is absent.
    """
    if name not in row.fields:
        found = ", ".join(map(repr, row.fields)) or "no field"
        raise RowError(f"expected the field {name!r}, found {found}")
    return row.fields[name]


def kind(value: Any) -> str:
    """Name the JSON type of `value` for a message, with the value where it is a short one."""
    if isinstance(value, dict | list | str):
        return {dict: "an object", list: "a list", str: "a string"}[type(value)]
    return json.dumps(value)


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode()
        parsed = json.loads(
            text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_without_repeats
        )
    except UnicodeDecodeError as error:
        raise RowError(
            f"expected UTF-8, found byte 0x{raw[error.start]:02x} at column {error.start + 1}"
        ) from error
    except json.JSONDecodeError as error:
        raise RowError(f"{error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise RowError("nested too deeply") from error
    except RowError:
        raise
    except ValueError as error:  # an integer of thousands of digits, which Python declines to convert
        raise RowError(f"a number is too long ({error})") from error
    if not isinstance(parsed, dict):
        raise RowError(f"expected a JSON object, found {kind(parsed)}")
    # only an escape can smuggle in half of a pair, and looking for one is much cheaper than encoding every
    # row
    if "\\u" in text:
        _refuse_lone_surrogates(parsed)
    return parsed


def _refuse_constant(name: str) -> None:
    raise RowError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise RowError(f"the number {digits} does not fit a double")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = sorted({name for name in names if names.count(name) > 1})
        raise RowError(f"given twice: {', '.join(map(repr, repeated))}")
    return fields


def _refuse_lone_surrogates(parsed: dict[str, Any]) -> None:
    try:
        json.dumps(parsed, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RowError("a \\u escape gives half of a surrogate pair, which is not a character") from error
