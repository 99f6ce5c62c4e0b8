"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from lora.model.model import Model

LENGTH = 512  # tokens of a text, where neither the user nor an adapter says

base_option = click.option(
    "--base", metavar="MODEL", show_default="the one that it names", help="The adapter's base."
)
_tokens: dict[str, Any] = {
    "type": click.IntRange(1),
    "help": "Tokens of a text; a longer one keeps its head.",
}
length_option = click.option("--max-seq-len", default=LENGTH, **_tokens)
trained_length_option = click.option(
    "--max-seq-len", show_default=f"as the adapter was trained, else {LENGTH}", **_tokens
)
debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, help="Show a traceback with an error."
)
device_option = click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    help="Where to compute; cuda needs --dtype bfloat16.",
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["float32", "float64", "bfloat16"]),
    default="float32",
    help="Precision of the arithmetic.",
)


def text_length(model: Model, asked: int | None) -> int:
    """Return how many tokens a text keeps: those asked for, else those that the adapter was trained with."""
    adapter = model.parameters.adapter
    trained = (adapter.facts.get("training") or {}).get("max_seq_len") if adapter is not None else None
    return asked or trained or LENGTH


def given(name: str) -> bool:
    """Return whether the running command's option `name` stands on its command line."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --temperature, --top-p, --top-k and --seed."""
    for option in (
        click.option("--seed", type=click.IntRange(0), default=0, help="Of the draws."),
        click.option(
            "--top-k", type=click.IntRange(0), default=0, help="Draw from so many alone; 0: from all."
        ),
        click.option(
            "--top-p",
            type=click.FloatRange(0, 1, min_open=True),
            default=1.0,
            help="Draw from the likeliest tokens that hold this share.",
        ),
        click.option(
            "--temperature",
            type=click.FloatRange(0),
            default=0.0,
            help="Divides the logits before a token is drawn; 0 takes the likeliest.",
        ),
    ):
        command = option(command)
    return command


def output_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --json, which the command receives as `as_json`, and --debug, which `Failures` reads by itself."""
    command = debug_option(command)
    return click.option(
        "--json",
        "as_json",
        is_flag=True,
        help="Print one JSON document, for errors too, and nothing else on stdout.",
    )(command)
