"""Rows for instruction tuning: a conversation, or a prompt and its completion."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from lora.data.rows import Row, RowError, field, kind, read_parsed, text_field

ROLES = ("system", "user", "assistant", "tool")
# what a row is told by: its first field that stands here
FORMS = ("messages", "instruction", "prompt")


class Dialogue(NamedTuple):
    """Messages for a chat template, or a bare prompt and completion."""

    messages: tuple[dict[str, Any], ...]  # empty for a prompt and its completion
    tools: tuple[Any, ...] | None
    prompt: str
    completion: str


class InstructData(NamedTuple):
    """Conversations in the order of the file."""

    dialogues: tuple[Dialogue, ...]
    lines: tuple[int, ...]  # where each row stands in the file


def read_instructions(path: str | Path) -> InstructData:
    """Read rows {"messages", "tools"?}, {"instruction", "response", "system"?} or {"prompt", "completion"}.

    A conversation gets no system message that the row does not hold; a template may add its own.

    Raises:
        MissingFileError: there is no such file.
        DataError: the file is empty, or a row is bad; every bad row is listed by its line (an empty
            instruction or response as F-INST-001).
    """
    pairs, problems = read_parsed(path, lambda row: (_parse(row), row.line))
    problems.raise_any()
    dialogues, lines = zip(*pairs, strict=True)
    return InstructData(dialogues, lines)


def _parse(row: Row) -> Dialogue:
    form = next((name for name in FORMS if name in row.fields), None)
    if form == "messages":
        return Dialogue(_messages(row), _tools(row), "", "")
    if form == "instruction":
        return _instruction(row)
    if form == "prompt":
        return Dialogue((), None, text_field(row, "prompt"), text_field(row, "completion"))
    found = ", ".join(map(repr, row.fields)) or "no field"
    raise RowError(f"expected messages, instruction and response, or prompt and completion; found {found}")


def _instruction(row: Row) -> Dialogue:
    for name in ("instruction", "response"):
        if row.fields.get(name) == "":
            raise RowError(f"F-INST-001: {name!r}: expected a text, found an empty string")
    turns = [("user", text_field(row, "instruction")), ("assistant", text_field(row, "response"))]
    if "system" in row.fields:
        turns.insert(0, ("system", text_field(row, "system")))
    return Dialogue(tuple({"role": role, "content": content} for role, content in turns), None, "", "")


def _messages(row: Row) -> tuple[dict[str, Any], ...]:
    messages = field(row, "messages")
    if not isinstance(messages, list) or not messages:
        raise RowError(f"'messages': expected a list of messages, found {kind(messages)}")
    for number, message in enumerate(messages, start=1):
        _check_message(message, f"message {number}")
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError("'messages': expected an assistant's turn to learn, found none")
    return tuple(messages)


def _check_message(message: Any, name: str) -> None:
    if not isinstance(message, dict):
        raise RowError(f"{name}: expected an object, found {kind(message)}")
    if message.get("role") not in ROLES:
        raise RowError(f"{name}: expected a role of {', '.join(ROLES)}; found {message.get('role')!r}")
    content = message.get("content")
    if isinstance(content, str) and content:
        return
    # a turn that calls tools may say nothing beside
    if message["role"] == "assistant" and message.get("tool_calls") and content in (None, ""):
        return
    raise RowError(f"{name}: 'content': expected a non-empty text, found {kind(content)}")


def _tools(row: Row) -> tuple[Any, ...] | None:
    tools = row.fields.get("tools")
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise RowError(f"'tools': expected a list, found {kind(tools)}")
    return tuple(tools)
