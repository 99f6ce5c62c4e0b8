"""A checkpoint's chat template: Jinja text that turns messages into the one text a model was trained on.

The settings are Transformers' own (`apply_chat_template`), so that a template renders here as it does there.
It comes from a stranger: it runs in a sandbox with a budget (`lora.data.template_sandbox`) and reads no file.

A template may mark what an assistant generates, `{% generation %}...{% endgeneration %}`. The marks change no
text; as in Transformers (`return_assistant_tokens_mask`) they say what an assistant's turns are.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context

from lora.data.template_budget import BUDGET, Budget, BudgetError
from lora.data.template_sandbox import BoundedEnvironment
from lora.data.tokenizer import File, Folder, read_object
from lora.errors import DataError, FileFormatError

MAX_CHARACTERS = 10**7  # of one rendered conversation
MAX_INDENT = 100
SHOWN = 1000  # characters of a template's own message
MARK, MARKS = "generation mark", "the marks of this rendering"  # a filter and a variable that none can spell

Span = tuple[int, int]  # characters [start, end)

# for a checkpoint without a template
CHATML = (
    "{% for message in messages %}"
    "{% if message.tool_calls or tools %}{{ raise_exception('ChatML knows no tools') }}{% endif %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# what an expression of a template may raise
_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


class ChatTemplate:
    """A compiled template, and the special tokens that it may name."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, str] | None = None, *, stands_in: bool = False
    ) -> None:
        """Compile `source`; `stands_in` where it is not the checkpoint's own.

        Raises:
            FileFormatError: it is not Jinja.
        """
        self.source, self.stands_in = source, stands_in
        self._special_tokens = dict(special_tokens or {})
        environment = _environment()
        try:
            self._compiled = environment.bounded_template(source)
            # whether the author marks what an assistant generates
            self.marks_turns = any(f.name == MARK for f in environment.parse(source).find_all(nodes.Filter))
        except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError, ValueError) as error:
            raise FileFormatError(f"the chat template is not a Jinja template: {_message(error)}") from error

    @classmethod
    def load(cls, folder: str | Folder) -> ChatTemplate:
        """Return the template of the checkpoint in `folder`, or ChatML where it has none.

        Raises:
            FileFormatError: a file is corrupt, or names templates of which none is "default".
        """
        folder = Path(folder) if isinstance(folder, str) else folder
        config = read_object(folder / "tokenizer_config.json")
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        tokens = {name: _token(config[name]) for name in names if config.get(name) is not None}
        source = _source(folder, config)
        return cls(CHATML if source is None else source, tokens, stands_in=source is None)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """Return the text of `messages`.

        Raises:
            DataError: the template refuses them, or fails on them.
            FileFormatError: the template takes more steps, or makes more characters, than one row may.
        """
        return self._text(messages, tools, ("", ""), add_generation_prompt=add_generation_prompt)

    def render_marked(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None
    ) -> tuple[str, tuple[Span, ...]]:
        """Return the text of `messages`, and the spans of it that the template marks as generated, ascending.

        Raises:
            DataError: as in `render`; or the template does something to marked text that hides the marks.
            FileFormatError: as in `render`.
        """
        # no row can hold it, and no filter for letters changes it
        unique = secrets.randbits(64)
        opening, closing = f"\x02{unique}\x02", f"\x03{unique}\x03"
        text, spans = "", []
        first, *parts = self._text(messages, tools, (opening, closing)).split(opening)
        text += first
        for part in parts:
            inside, *behind = part.split(closing)
            spans.append((len(text), len(text) + len(inside)))
            text += "".join([inside, *behind])
            if len(behind) != 1:
                raise DataError(
                    "the chat template's generation marks do not come in pairs, one after the other"
                )
        if closing in first or text != self.render(messages, tools):
            raise DataError("the chat template changes what it marks as generated, so the marks are lost")
        return text, tuple((start, end) for start, end in spans if start < end)

    def _text(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None,
        marks: tuple[str, str],
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        given = {BUDGET: Budget(), MARKS: marks, **self._special_tokens}
        parts, size = [], 0
        try:
            for part in self._compiled.generate(
                given,
                messages=list(messages),
                tools=None if tools is None else list(tools),
                documents=None,
                add_generation_prompt=add_generation_prompt,
            ):
                parts.append(part)
                size += len(part)
                if size > MAX_CHARACTERS:
                    break
        except BudgetError as error:
            raise FileFormatError(f"the chat template is refused: {error}") from error
        except _FAILURES as error:
            raise DataError(f"the chat template fails: {_message(error)}") from error
        if size > MAX_CHARACTERS:
            raise FileFormatError(
                f"the chat template is refused: it makes more than {MAX_CHARACTERS:,} characters of one row"
            )
        return "".join(parts)


class _Generation(Extension):
    """Reads a `{% generation %}` block as its body between two marks, which are mostly empty."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the marks and the body of the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [_mark(0, line), *body, _mark(1, line)]


def _mark(which: int, line: int) -> nodes.Node:
    mark = nodes.Filter(nodes.Const(which), MARK, [], [], None, None, lineno=line)
    return nodes.Output([mark], lineno=line)


@pass_context
def _marked(context: Context, which: int) -> str:
    return context.parent[MARKS][which]


def _environment() -> BoundedEnvironment:
    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters |= {"tojson": _tojson, MARK: _marked}
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


def _message(error: BaseException) -> str:
    return (str(error) or type(error).__name__)[:SHOWN]


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


@pass_context
def _strftime_now(context: Context, style: str) -> str:
    context.parent[BUDGET].spend(256 * len(style))  # what one directive can make
    return datetime.now().strftime(style)


@pass_context
def _tojson(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which no model was trained on
    budget: Budget = context.parent[BUDGET]
    budget.read(value)
    if isinstance(indent, str) or (indent or 0) > MAX_INDENT:
        raise SecurityError(f"tojson: expected an indent of at most {MAX_INDENT}")
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if indent is None and separators is None:
        return budget.made(encoder.encode(value))
    parts = []
    for part in encoder.iterencode(value):
        parts.append(budget.made(part))
    return "".join(parts)


def _source(folder: Folder, config: Mapping[str, Any]) -> str | None:
    text = folder / "chat_template.jinja"
    if text.is_file():
        return _read_text(text)
    stored = read_object(folder / "chat_template.json").get("chat_template", config.get("chat_template"))
    if stored is None:
        return None
    if isinstance(stored, list):  # several, by name
        named = [item for item in stored if isinstance(item, dict) and item.get("name") == "default"]
        stored = named[0].get("template") if named else None
    if not isinstance(stored, str):
        raise FileFormatError(f"{folder}: expected a chat template named 'default', or one text")
    return stored


def _read_text(path: File) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{path}: expected UTF-8, found: {error}") from error


def _token(value: Any) -> str:
    return str(value.get("content")) if isinstance(value, dict) else str(value)
