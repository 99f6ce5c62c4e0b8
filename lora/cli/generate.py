"""`lora generate`: what a language model says next."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from lora.cli.options import base_option, device_option, dtype_option, output_options, sampling_options
from lora.cli.output import one_line, print_json
from lora.cli.texts import Texts, check_one_source, read_texts
from lora.errors import UsageError

if TYPE_CHECKING:
    from lora.model.continuation import Continuation
    from lora.model.model import Model
    from lora.model.sampling import Sampling


@click.command(short_help="Continue texts.")
@click.argument("model", metavar="MODEL_OR_ADAPTER")
@click.argument("prompts", metavar="[PROMPT]...", nargs=-1)
@click.option(
    "--data", "-d", metavar="FILE", help='*.jsonl: the "prompt" of each row; any other file: each line.'
)
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, help="Where a continuation is cut.")
@sampling_options
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given again.")
@base_option
@device_option
@dtype_option
@output_options
def generate(
    model: str,
    prompts: tuple[str, ...],
    data: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    stop: tuple[str, ...],
    base: str | None,
    device: str,
    dtype: str,
    as_json: bool,
) -> None:
    """Continue each PROMPT, each row of --data, or else each line of standard input.

    The likeliest token is taken each time, unless --temperature is above 0. One prompt's continuation is
    printed as it comes. A PROMPT that starts with a dash comes after `--`.
    """
    check_one_source(prompts, data)
    if "" in stop:
        raise UsageError("--stop: expected a text, found an empty one")
    from lora.io.hub import require_path
    from lora.model.loading import load
    from lora.model.sampling import Sampling

    require_path(model)
    sampling = Sampling(temperature, top_p, top_k, seed)
    read = read_texts(prompts, data, field="prompt")
    loaded = load(model, device, dtype, base=base)
    writes = not as_json and len(read.texts) == 1
    continuations = continue_texts(loaded, read, max_new_tokens, sampling, stop, writes=writes)
    if as_json:
        print_json(
            {"status": "generated", "model": model, "completions": [c.as_dict() for c in continuations]}
        )
    elif not writes:
        for continuation in continuations:
            click.echo(f"==> {one_line(continuation.prompt)} <==\n{shown(continuation.text)}\n")


def continue_texts(
    model: Model,
    read: Texts,
    max_new_tokens: int,
    sampling: Sampling,
    stops: tuple[str, ...],
    *,
    writes: bool,
) -> list[Continuation]:
    """Return the continuation of each text; with `writes`, print the first one as it comes.

    Raises:
        UsageError: the model is a classifier.
        ValidationError: a prompt leaves no room in the model's context for what is to come.
    """
    from lora.model.continuation import continued

    made, steps = continued(model, read.texts, max_new_tokens, sampling, stops, lines=read.lines)
    written = ""
    for _ in steps:
        if writes:
            written = _write(written, made[0].settled)
    if writes:
        _write(written, made[0].text)
        click.echo()
    return made


def shown(text: str) -> str:
    """Return `text`, on a terminal without the control characters that could command it."""
    if not sys.stdout.isatty():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def _write(written: str, text: str) -> str:
    """Print what `text` has beyond `written`, and return what has then been written."""
    if not text.startswith(written):  # a decoder may still take back a space
        return written
    click.echo(shown(text[len(written) :]), nl=False)
    sys.stdout.flush()
    return text
