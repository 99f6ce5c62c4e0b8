"""`--recipe FILE`: every flag of a command from a YAML file, where the command line does not name it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from lora.cli.output import note
from lora.errors import UsageError


def recipe_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --recipe, and call `command` with what it says; a flag that is given wins, and this is said."""

    @click.option(
        "--recipe",
        metavar="FILE",
        help="YAML: model, data, output and any setting below, by name; paths from the current folder. "
        "Flags win over it.",
    )
    @click.pass_context
    @wraps(command)
    def with_recipe(ctx: click.Context, /, recipe: str | None, **values: Any) -> Any:
        if recipe is not None:
            values |= _not_overruled(ctx, recipe, values)
            if not values["resume"] and not values["plan"]:
                _refuse_overwriting(Path(recipe), values["output"])
        return command(**values)

    return with_recipe


def _not_overruled(ctx: click.Context, path: str, given: dict[str, Any]) -> dict[str, Any]:
    from lora.train.recipe import read_recipe

    recipe = read_recipe(path)
    named = [name for name in recipe if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    overruled = [
        f"{name} = {given[name]} (there: {recipe[name]})" for name in named if given[name] != recipe[name]
    ]
    if overruled:
        note(f"the command line wins over {path}: {', '.join(overruled)}")
    return {name: value for name, value in recipe.items() if name not in named}


def _refuse_overwriting(path: Path, output: str) -> None:
    from lora.train.recipe import RECIPE_FILE

    if path.resolve() == (Path(output) / RECIPE_FILE).resolve():
        raise UsageError(
            f"{path} is where the run in {output} would write its own recipe; name another output"
        )
