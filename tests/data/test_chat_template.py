"""Where a template comes from, and what one of a stranger cannot do."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lora.data import chat_template
from lora.data.chat_template import CHATML, ChatTemplate
from lora.errors import DataError, FileFormatError, LoraError

MESSAGES = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, CHATML),
        ({"tokenizer_config.json": {"chat_template": "own"}}, "own"),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [
                        {"name": "tool_use", "template": "t"},
                        {"name": "default", "template": "d"},
                    ]
                }
            },
            "d",
        ),
        (
            {"chat_template.json": {"chat_template": "j"}, "tokenizer_config.json": {"chat_template": "c"}},
            "j",
        ),
        ({"chat_template.jinja": "x", "tokenizer_config.json": {"chat_template": "c"}}, "x"),
    ],
)
def test_where_it_comes_from(files: dict, expected: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    assert ChatTemplate.load(tmp_path).source == expected


@pytest.mark.parametrize("token", ["<end>", {"content": "<end>", "lstrip": False}])
def test_special_tokens_are_known_to_it(token: object, tmp_path: Path) -> None:
    config = {"eos_token": token, "chat_template": "{{ eos_token }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTemplate.load(tmp_path).render(MESSAGES) == "<end>"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"chat_template": 3}'),
        ("tokenizer_config.json", '{"chat_template": [{"name": "other"}, 3]}'),
        ("chat_template.jinja", "{% for %}"),
        ("chat_template.jinja", "{{ a "),
    ],
)
def test_a_broken_file_is_named(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(FileFormatError):
        ChatTemplate.load(tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__code__.co_code }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(1000000) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content.nothing.more }}",
    ],
)
def test_what_a_template_of_a_stranger_may_not_do(source: str) -> None:
    with pytest.raises(DataError, match="the chat template fails"):
        ChatTemplate(source).render(MESSAGES)


def test_a_text_without_end_is_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_CHARACTERS", 100)
    endless = "{% for i in range(99999) %}aaaaaaaaaa{% endfor %}"
    with pytest.raises(DataError, match="more than 100 characters"):
        ChatTemplate(endless).render(MESSAGES)


PIECES = st.sampled_from(
    [
        "{{",
        "}}",
        "{%",
        "%}",
        "for m in messages",
        "endfor",
        "if",
        "endif",
        "generation",
        "endgeneration",
        "m.role",
    ]
)


@given(source=st.lists(PIECES | st.text(max_size=4), max_size=12).map(" ".join))
@example("{% generation %}")
@example("{{ strftime_now('%') }}")
def test_a_hostile_template_renders_or_is_refused(source: str) -> None:
    with suppress(LoraError):
        assert len(ChatTemplate(source).render(MESSAGES)) < 1000
