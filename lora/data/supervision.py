"""Which characters of a rendered row, and so which tokens, are learned: by position, never by token id."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lora.data.chat_template import ChatTemplate, Span
from lora.data.instruct import Dialogue
from lora.data.packed import IGNORED
from lora.errors import DataError


class Supervised(NamedTuple):
    """One row's text, and the parts of it that are learned."""

    text: str
    spans: tuple[Span, ...]


def supervise(dialogue: Dialogue, template: ChatTemplate, eos: str) -> Supervised:
    """Return the row's text with the spans of its assistant's turns, or of its completion and EOS.

    Where the template marks what is generated, the marks are the spans, as in Transformers: an end-of-turn
    token outside of them is not learned. Elsewhere a turn's span begins after what the template writes to
    prompt it, and ends with what the template writes to end it: the end-of-turn token is learned, the white
    space after it is not.

    Raises:
        DataError: the template fails, marks nothing of the row though it knows marks, or rewrites earlier
            turns so that a turn cannot be found.
        FileFormatError: the template takes more steps than one row may.
    """
    if not dialogue.messages:
        start = len(dialogue.prompt)
        ending = "" if dialogue.completion.endswith(eos) else eos
        text = dialogue.prompt + dialogue.completion + ending
        return Supervised(text, ((start, len(text)),))
    if template.marks_turns:
        return _marked_by_its_author(dialogue, template)
    text = template.render(dialogue.messages, dialogue.tools)
    turns = (i for i, message in enumerate(dialogue.messages) if message["role"] == "assistant")
    return Supervised(text, tuple(_span(dialogue, template, text, turn) for turn in turns))


def _marked_by_its_author(dialogue: Dialogue, template: ChatTemplate) -> Supervised:
    text, spans = template.render_marked(dialogue.messages, dialogue.tools)
    if not spans:
        raise DataError("the chat template marks generated text, and none in this row: nothing is learned")
    return Supervised(text, spans)


def _span(dialogue: Dialogue, template: ChatTemplate, text: str, turn: int) -> Span:
    messages, tools = dialogue.messages, dialogue.tools
    if turn == 0:
        _check_begins_with_nothing(template, tools)
    followed = any(message["role"] == "user" for message in messages[turn + 1 :])
    before = _rendered(messages[:turn], tools, template, followed=followed)
    through = _rendered(messages[: turn + 1], tools, template, followed=followed).rstrip()
    header = template.render(messages[:turn], tools, add_generation_prompt=True)[
        len(template.render(messages[:turn], tools)) :
    ]
    written = through[len(before) :]
    start = len(before) + len(header)
    if not written.startswith(header):
        # the prompt may open a thinking block that this turn does not have: keep the whole lines they share
        start = len(before) + written.rfind("\n", 0, _shared(written, header)) + 1
    if not (header and text.startswith(through) and through.startswith(before)):
        raise DataError(
            f"the chat template writes message {turn + 1} otherwise once later messages follow, so what is "
            "to be learned cannot be found: give one row for each turn"
        )
    if not len(before) < start < len(through):
        raise DataError(f"the chat template writes nothing to learn for message {turn + 1}")
    return start, len(through)


def _check_begins_with_nothing(template: ChatTemplate, tools: Sequence[Any] | None) -> None:
    """Refuse a template that cannot write what stands before a first message: many look at `messages[0]`."""
    try:
        template.render([], tools)
    except DataError as error:
        raise DataError(
            "message 1: expected a user's or a system message, found the assistant's, and the chat template "
            "cannot tell where that begins: put a user's message before it, or leave it out"
        ) from error


def _rendered(
    messages: Sequence[dict[str, Any]], tools: Sequence[Any] | None, template: ChatTemplate, *, followed: bool
) -> str:
    """Return the text of `messages` as it stands where a user's message follows, or where none does.

    A template may leave the thinking out of turns that a user has answered, so a beginning of the
    conversation is rendered with such an answer behind it, which is cut off again.
    """
    if not followed:
        return template.render(messages, tools)
    answer = {"role": "user", "content": "answer"}
    alone = template.render([answer], tools)
    tail = template.render([answer, answer], tools)[len(alone) :]
    return template.render([*messages, answer], tools).removesuffix(tail)


def _shared(a: str, b: str) -> int:
    """Return how many characters the beginnings of `a` and `b` share."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def end_of_turn(template: ChatTemplate) -> str:
    """Return what the template writes behind an assistant's words, without white space; it may be nothing.

    Raises:
        DataError: the template fails, or does not write what the assistant says.
    """
    said = "an answer"
    exchange = ({"role": "user", "content": "a question"}, {"role": "assistant", "content": said})
    _, found, end = template.render(exchange).rpartition(said)
    if not found:
        raise DataError("the chat template does not write what an assistant says, so its end is unknown")
    return end.strip()


def token_labels(ids: Sequence[int], offsets: Sequence[Span], spans: Sequence[Span]) -> np.ndarray:
    """Return the label of each token, [T] int64: its id where it begins in a span, else -100."""
    starts = np.array([start for start, _ in offsets], np.int64)
    learned = np.zeros(len(starts), bool)
    for start, end in spans:
        learned |= (starts >= start) & (starts < end)
    return np.where(learned, np.asarray(ids, np.int64), IGNORED)
