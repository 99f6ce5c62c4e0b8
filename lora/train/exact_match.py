"""How often a language model answers exactly as the rows of an instruction file do.

Contract: contracts/training/exact_match.yaml.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from lora.data.chat_template import ChatTemplate
from lora.data.instruct import InstructData
from lora.data.supervision import end_of_turn, supervise
from lora.data.tokenizer import Tokenizer
from lora.errors import DataError
from lora.model.continuation import Continuation, continued
from lora.model.model import Model
from lora.model.sampling import Sampling
from lora.train.examples import Data

MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class ExactMatch:
    """How many rows a model answered exactly."""

    generated_rows: int
    exact_matches: int
    exact_match: float  # the share of the rows
    unended_rows: int  # answers that were cut at `max_new_tokens`, which match nothing
    max_new_tokens: int

    def as_dict(self) -> dict[str, Any]:
        """Return the counts as JSON values, under the names of the fields."""
        return asdict(self)


class Question(NamedTuple):
    """A row as a model is asked it."""

    prompt: str  # all that the row holds before its last learned turn
    answer: str  # that turn, without what ends it
    end: str  # what ends it; may be empty


def exact_match(
    model: Model, data: Data, *, max_new_tokens: int = MAX_NEW_TOKENS, batch_size: int = 32
) -> ExactMatch:
    """Return how often `model` answers as the last assistant's turn, or the completion, of a row does.

    The model continues what stands before that turn, greedily. Both texts are compared without special tokens
    and without white space at their ends; a thinking block that is learned is part of the turn.

    Args:
        model: a language model, with its adapter, if any, active.
        data: the rows of an instruction file.
        max_new_tokens: where an answer is cut that has not ended.
        batch_size: rows that are run together, at most.

    Raises:
        UsageError: the model is a classifier.
        DataError: the rows are no instructions, or the chat template fails on one.
        ValidationError: a prompt leaves no room in the model's context for the answer.
    """
    if not isinstance(data, InstructData):
        raise DataError("expected instructions, or prompts and completions: other rows have no answer")
    folder = model.checkpoint.folder
    tokenizer = Tokenizer.load(folder)
    asked = questions(data, ChatTemplate.load(folder), tokenizer.eos_token)
    matches = unended = 0
    for batch in _batches(asked, batch_size):
        stops = (batch[0].end,) if batch[0].end else ()
        prompts = [question.prompt for question in batch]
        answers, steps = continued(model, prompts, max_new_tokens, Sampling(), stops)
        for _ in steps:
            pass  # each step fills in the answers
        for question, answer in zip(batch, answers, strict=True):
            matches += matched(question, answer, tokenizer)
            unended += answer.finish != "stop"
    return ExactMatch(len(asked), matches, matches / len(asked), unended, max_new_tokens)


def questions(data: InstructData, template: ChatTemplate, eos: str) -> list[Question]:
    """Return the question that each row asks; arguments and errors as in `supervise`."""
    end = end_of_turn(template) if any(dialogue.messages for dialogue in data.dialogues) else ""
    asked = []
    for dialogue in data.dialogues:
        row = supervise(dialogue, template, eos)
        start, stop = row.spans[-1]
        ending = end if dialogue.messages else eos
        asked.append(Question(row.text[:start], row.text[start:stop].removesuffix(ending), ending))
    return asked


def matched(question: Question, answer: Continuation, tokenizer: Tokenizer) -> bool:
    """Return whether a finished answer says what the row says."""
    [(ids, _)] = tokenizer.encode_with_offsets([question.answer])
    return answer.finish == "stop" and answer.text.strip() == tokenizer.decode(ids).strip()


def _batches(asked: Sequence[Question], batch_size: int) -> list[list[Question]]:
    """Return the questions in batches, each of one ending: a stop text is not another row's."""
    batches = []
    for end in sorted({question.end for question in asked}):
        alike = [question for question in asked if question.end == end]
        batches += [alike[first : first + batch_size] for first in range(0, len(alike), batch_size)]
    return batches
