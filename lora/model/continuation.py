"""What a language model says next, as text: cut at its end token or at a stop text, also while it comes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora.data.packed import pack
from lora.data.tokenizer import Tokenizer
from lora.errors import ValidationError

if TYPE_CHECKING:
    from lora.model.generation import Step
    from lora.model.model import Model
    from lora.model.sampling import Sampling

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what a character is decoded to whose last bytes have not come


@dataclass
class Continuation:
    """What follows one prompt, as its tokens come."""

    prompt: str
    tokenizer: Tokenizer
    stops: tuple[str, ...]
    end_ids: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    text: str = ""  # without an end token, and up to a stop text
    finish: str = "length"  # or "stop"

    def take(self, tokens: Sequence[int]) -> bool:
        """Read the tokens so far, the newest last, and return whether the continuation ends with them."""
        self.tokens = list(tokens)
        self.text = self.tokenizer.decode(self.tokens)
        places = [place for place in map(self.text.find, self.stops) if place >= 0]
        if places:
            self.text = self.text[: min(places)]
        if places or self.tokens[-1] in self.end_ids:
            self.finish = "stop"
        return self.finish == "stop"

    @property
    def settled(self) -> str:
        """The text that no later token can change: less half a character, and what may begin a stop text."""
        if self.finish == "stop":
            return self.text
        text = self.text.rstrip(REPLACEMENT)
        longest = max(map(len, self.stops), default=1)
        return text[: len(text) - (longest - 1)] if longest > 1 else text

    def as_dict(self) -> dict[str, Any]:
        """Return the outcome as JSON values."""
        return {
            "prompt": self.prompt,
            "text": self.text,
            "tokens": len(self.tokens),
            "finish_reason": self.finish,
        }


def continued(
    model: Model,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling,
    stops: tuple[str, ...],
    *,
    lines: Sequence[int] | None = None,
) -> tuple[list[Continuation], Iterator[Step]]:
    """Return the continuation of each prompt, and the steps that fill all of them in as they are drawn.

    Args:
        model: a language model.
        prompts: texts of one token or more, run together.
        max_new_tokens: where a continuation is cut that has not ended.
        sampling: how a token is chosen.
        stops: texts, none of them empty, that end a continuation and are left out of it.
        lines: where the prompts stand in their file, for the message.

    Raises:
        UsageError: the model is a classifier.
        DataError: a prompt holds no token.
        ValidationError: a prompt leaves no room in the model's context for what is to come.
    """
    tokenizer = Tokenizer.load(model.checkpoint.folder)
    ids = tokenizer.encode(prompts, sys.maxsize, lines=lines).ids
    _check_room(max(map(len, ids)) + max_new_tokens, model.spec.max_position_embeddings)
    stop_ids = [token for token in map(tokenizer.token_id, stops) if token is not None]
    ends = (*model.spec.eos_token_ids, *stop_ids)
    made = [Continuation(prompt, tokenizer, stops, ends) for prompt in prompts]
    return made, model.stream(pack(ids), max_new_tokens, sampling, lambda row, new: made[row].take(new))


def _check_room(needed: int, context: int) -> None:
    if needed > context:
        raise ValidationError(
            f"the longest prompt and max_new_tokens take {needed} tokens; the model's context holds {context}"
        )
