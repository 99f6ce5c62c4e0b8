"""`--recipe FILE`: every flag of a command from a YAML file, where the command line does not name it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click
from click.core import ParameterSource

from lora.cli.output import note


def recipe_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --recipe, and call `command` with what it says; a flag that is given wins, and this is said."""

    @click.option(
        "--recipe",
        metavar="FILE",
        help="YAML: model, data, output and any setting below, by name. Flags win over it.",
    )
    @click.pass_context
    @wraps(command)
    def with_recipe(ctx: click.Context, /, recipe: str | None, **values: Any) -> Any:
        return command(**(values if recipe is None else values | _not_overruled(ctx, recipe, values)))

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
