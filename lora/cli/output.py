"""Results on stdout: one JSON document, or text and tables for a reader. Progress and notes go to stderr."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import click

PIPE_WIDTH = 160  # columns of a table that no terminal will cut
LISTED = 20  # names that are shown of a longer list


def print_json(document: Any) -> None:
    """Print `document` as the one JSON document of this run; a number that is not finite becomes null."""
    click.echo(json.dumps(_plain(document), indent=2, allow_nan=False))


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None, texts: int = 1
) -> None:
    """Print a table whose first `texts` columns are text, and whose others are numbers, right-aligned."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False, show_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < texts else "right", no_wrap=True)
    for row in rows:
        # Text, so that a class named "[red]" is a name and not a colour
        table.add_row(*map(Text, row))
    console = Console()
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    with console.capture() as captured:
        console.print(table)
    # through click, so that a closed pipe is one exception everywhere
    click.echo(captured.get())


def print_facts(facts: dict[str, Any], *, err: bool = False) -> None:
    """Print one aligned line per fact, leaving out those that are None."""
    known = {name: value for name, value in facts.items() if value is not None}
    width = max(map(len, known), default=0) + 1
    for name, value in known.items():
        click.echo(f"{name + ':':<{width}} {value}", err=err)


def listed(names: Sequence[Any], separator: str = ", ") -> str:
    """Return the first 20 names with commas between, or another separator, and how many more there are."""
    more = [f"and {len(names) - LISTED} more"] if len(names) > LISTED else []
    return separator.join([*map(str, names[:LISTED]), *more])


def size(count: int) -> str:
    """Return a number of bytes as a reader wants it: 812 bytes, 40.5 kB, 988 MB, 2.10 GB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            scaled = count / unit
            return f"{scaled:.{max(0, 3 - len(str(int(scaled))))}f} {name}"
    return f"{count} bytes"


def note(message: str) -> None:
    """Say something on stderr that the user should know whatever else is quiet."""
    click.echo(f"note: {message}", err=True)


def note_truncated(texts: int, max_seq_len: int) -> None:
    """Say how many texts lost their tail, if any did."""
    if texts:
        note(f"{texts:,} texts are longer than {max_seq_len} tokens and keep their head")


def one_line(text: str, width: int = 60) -> str:
    """Return the beginning of `text` on one line, where no control character reaches the terminal."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return shown if len(shown) <= width else shown[: width - 3] + "..."


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
