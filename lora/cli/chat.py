"""`lora chat`: talk with a language model in its own chat template."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from lora.cli.generate import continue_texts
from lora.cli.options import base_option, debug_option, device_option, dtype_option, sampling_options
from lora.cli.texts import Texts

if TYPE_CHECKING:
    from lora.data.chat_template import ChatTemplate
    from lora.model.model import Model
    from lora.model.sampling import Sampling


@click.command(short_help="Talk with a language model.")
@click.argument("model", metavar="MODEL_OR_ADAPTER")
@click.option("--system", metavar="TEXT", help="What the model is told first.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=512, help="Where an answer is cut.")
@sampling_options
@base_option
@device_option
@dtype_option
@debug_option
def chat(
    model: str,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    base: str | None,
    device: str,
    dtype: str,
) -> None:
    """Answer each line that you write, in the checkpoint's chat template, or in ChatML where it has none.

    Answers are written as they come. /exit, the end of input or Ctrl-C leave.
    """
    from lora.data.chat_template import ChatTemplate
    from lora.io.hub import require_path
    from lora.model.loading import load
    from lora.model.sampling import Sampling

    require_path(model)
    sampling = Sampling(temperature, top_p, top_k, seed)
    loaded = load(model, device, dtype, base=base)
    template = ChatTemplate.load(loaded.checkpoint.folder)
    try:
        _talk(loaded, template, system, max_new_tokens, sampling)
    except KeyboardInterrupt:
        click.echo()  # leaving is what Ctrl-C is for here


def _talk(
    model: Model, template: ChatTemplate, system: str | None, max_new_tokens: int, sampling: Sampling
) -> None:
    from lora.data.supervision import end_of_turn

    end = end_of_turn(template)
    messages = [] if system is None else [{"role": "system", "content": system}]
    for line in _lines():
        messages.append({"role": "user", "content": line})
        prompt = template.render(messages, add_generation_prompt=True)
        (answer,) = continue_texts(
            model, Texts((prompt,), None), max_new_tokens, sampling, (end,) if end else (), writes=True
        )
        messages.append({"role": "assistant", "content": answer.text})


def _lines() -> Iterator[str]:
    """Yield what the user writes, line by line, with a prompt on a terminal alone."""
    while True:
        if sys.stdin.isatty():
            click.echo("> ", nl=False)
            sys.stdout.flush()
        line = sys.stdin.readline()
        if not line or line.strip() == "/exit":
            return
        if line.strip():
            yield line.rstrip("\r\n")
