"""A checkpoint's chat template: Jinja text that turns messages into the one text a model was trained on.

The settings are Transformers' own (`apply_chat_template`), so that a template renders here as it does there.
It comes from a stranger: it runs in Jinja's immutable sandbox, where no attribute of Python's internals can
be reached and nothing passed in can be changed, and it reads no file. A range is at most 100,000 long and a
rendered row at most 10^7 characters. Time and memory within one expression are not bounded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lora.data.tokenizer import read_object
from lora.errors import DataError, FileFormatError

MAX_CHARACTERS = 10**7  # of one rendered conversation

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

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        """Compile `source`.

        Raises:
            FileFormatError: it is not Jinja.
        """
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        try:
            self._compiled = _environment().from_string(source)
        except (jinja2.TemplateError, RecursionError, ValueError) as error:
            raise FileFormatError(f"the chat template is not a Jinja template: {error}") from error

    @classmethod
    def load(cls, folder: str | Path) -> ChatTemplate:
        """Return the template of the checkpoint in `folder`, or ChatML where it has none.

        Raises:
            FileFormatError: a file is corrupt, or names templates of which none is "default".
        """
        folder = Path(folder)
        config = read_object(folder / "tokenizer_config.json")
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        tokens = {name: _token(config[name]) for name in names if config.get(name) is not None}
        return cls(_source(folder, config), tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """Return the text of `messages`.

        Raises:
            DataError: the template refuses them, fails on them, or makes more than 10^7 characters.
        """
        parts, size = [], 0
        try:
            for part in self._compiled.generate(
                messages=list(messages),
                tools=None if tools is None else list(tools),
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            ):
                parts.append(part)
                size += len(part)
                if size > MAX_CHARACTERS:
                    break
        except _FAILURES as error:
            raise DataError(f"the chat template fails: {error}") from error
        if size > MAX_CHARACTERS:
            raise DataError(f"the chat template makes more than {MAX_CHARACTERS:,} characters of one row")
        return "".join(parts)


class _Generation(Extension):
    """Reads Transformers' `{% generation %}` block as its body: turns are found by their place."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: Parser) -> list[Node]:
        """Return the body of the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda style: datetime.now().strftime(style)
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which no model was trained on
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _source(folder: Path, config: Mapping[str, Any]) -> str:
    text = folder / "chat_template.jinja"
    if text.is_file():
        return _read_text(text)
    stored = read_object(folder / "chat_template.json").get("chat_template", config.get("chat_template"))
    if stored is None:
        return CHATML
    if isinstance(stored, list):  # several, by name
        named = [item for item in stored if isinstance(item, dict) and item.get("name") == "default"]
        stored = named[0].get("template") if named else None
    if not isinstance(stored, str):
        raise FileFormatError(f"{folder}: expected a chat template named 'default', or one text")
    return stored


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{path}: expected UTF-8, found: {error}") from error


def _token(value: Any) -> str:
    return str(value.get("content")) if isinstance(value, dict) else str(value)
