"""`--adapters DATA:DIR`: several adapters on one base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

Pair = tuple[str, str]  # a file of rows, and the folder of its run


def adapters_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --adapters, which the command receives as pairs of a data file and a folder."""
    return click.option(
        "--adapters",
        metavar="DATA:DIR",
        multiple=True,
        callback=_pairs,
        help="Train the rows of DATA into DIR, in the place of --data and -o; repeat it for more adapters, "
        "one after another on a base that is loaded once.",
    )(command)


def _pairs(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[Pair, ...]:
    pairs = []
    for value in values:
        data, _, folder = value.rpartition(":")
        if not data or not folder:
            raise click.BadParameter(f"expected DATA:DIR, a file and a folder, found {value!r}")
        pairs.append((data, folder))
    return tuple(pairs)
