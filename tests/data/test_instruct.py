"""Rows of dialogues: what is read, and what is refused by its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.data.chat_template import ChatTemplate
from lora.data.instruct import Dialogue, _parse, read_instructions
from lora.data.rows import Row, RowError
from lora.data.supervision import supervise
from lora.errors import DataError
from tests.data.files import write_jsonl

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def test_every_form_is_read(tmp_path: Path) -> None:
    rows = [
        {"messages": [USER, ANSWER], "tools": [{"name": "t"}]},
        {"instruction": "a", "response": "b"},
        "",
        {"instruction": "a", "response": "b", "system": "s", "metadata": {}},
        {"prompt": "p", "completion": "c"},
    ]
    data = read_instructions(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert data.lines == (1, 2, 4, 5)
    assert data.dialogues == (
        Dialogue((USER, ANSWER), ({"name": "t"},), "", ""),
        Dialogue((USER, ANSWER), None, "", ""),
        Dialogue(({"role": "system", "content": "s"}, USER, ANSWER), None, "", ""),
        Dialogue((), None, "p", "c"),
    )


BAD: list[tuple[Any, str]] = [
    ({"instruction": "", "response": "b"}, "F-INST-001: 'instruction': expected a text"),
    ({"instruction": "a", "response": ""}, "F-INST-001: 'response': expected a text"),
    ({"instruction": "a"}, "expected the field 'response'"),
    ({"instruction": "a", "response": "b", "system": 3}, "'system': expected a string, found 3"),
    ({"prompt": "a"}, "expected the field 'completion'"),
    ({"text": "a"}, "expected messages, instruction and response, or prompt and completion; found 'text'"),
    ({"messages": []}, "'messages': expected a list of messages"),
    ({"messages": "a"}, "'messages': expected a list of messages, found a string"),
    ({"messages": [3]}, "message 1: expected an object, found 3"),
    ({"messages": [USER]}, "'messages': expected an assistant's turn to learn, found none"),
    ({"messages": [USER, {"role": "bot", "content": "b"}]}, "message 2: expected a role"),
    ({"messages": [USER, {"role": [], "content": "b"}]}, "message 2: expected a role"),
    ({"messages": [USER, {"role": "assistant", "content": ""}]}, "message 2: 'content': expected"),
    ({"messages": [USER, {"role": "assistant", "content": ["b"]}]}, "message 2: 'content': expected"),
    ({"messages": [USER, ANSWER], "tools": {}}, "'tools': expected a list, found an object"),
]


def test_every_bad_row_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{len(BAD)} problems") as caught:
        read_instructions(write_jsonl(tmp_path / "rows.jsonl", [row for row, _ in BAD]))
    for number, (line, (_, message)) in enumerate(
        zip(str(caught.value).splitlines()[1:], BAD, strict=True), start=1
    ):
        assert line.strip().startswith(f"line {number}: {message}")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from(["user", "assistant", "tool"]) | JSON, "content": JSON}
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "messages": st.lists(MESSAGE, max_size=3) | JSON,
        "tools": JSON,
        "instruction": JSON,
        "response": JSON,
        "system": JSON,
        "prompt": JSON,
        "completion": JSON,
    },
)


@given(fields=FIELDS)
def test_a_hostile_row_is_read_or_refused(fields: dict[str, Any]) -> None:
    try:
        dialogue = _parse(Row(1, fields))
    except RowError:
        return
    assert dialogue.messages or (dialogue.prompt and dialogue.completion)


@pytest.mark.parametrize(("completion", "learned"), [("c", "c<end>"), ("c<end>", "c<end>")])
def test_a_completion_ends_with_one_eos(completion: str, learned: str) -> None:
    row = supervise(Dialogue((), None, "p", completion), ChatTemplate(""), "<end>")
    [(start, end)] = row.spans
    assert (row.text[:start], row.text[start:end]) == ("p", learned)


FIRST = "{% set first = messages[0].role %}"  # as the templates of Qwen look at the first message
LIST = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<assistant>{% endif %}"


def test_an_assistant_may_begin_where_the_template_lets_it() -> None:
    begun = Dialogue((ANSWER, USER, ANSWER), None, "", "")
    row = supervise(begun, ChatTemplate(LIST + PROMPT), "")
    assert [row.text[start:end] for start, end in row.spans] == ["b", "b"]
    with pytest.raises(DataError) as caught:
        supervise(begun, ChatTemplate(FIRST + LIST + PROMPT), "")
    assert str(caught.value) == (
        "message 1: expected a user's or a system message, found the assistant's, and the chat template "
        "cannot tell where that begins: put a user's message before it, or leave it out"
    )
    assert supervise(begun._replace(messages=(USER, ANSWER)), ChatTemplate(FIRST + LIST + PROMPT), "").spans


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "cannot be found"),  # prompts nothing
        ("{{ messages | length }}", "cannot be found"),  # rewrites what stood before
        ("{{ raise_exception('no tools') }}", "the chat template fails: no tools"),
    ],
)
def test_a_template_in_which_turns_cannot_be_found_is_refused(source: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        supervise(Dialogue((USER, ANSWER), None, "", ""), ChatTemplate(source), "")
