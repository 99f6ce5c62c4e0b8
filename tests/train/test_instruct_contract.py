"""Attempts to falsify contracts/training/instruct.yaml."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lora.contracts import training_contract
from lora.data import chat_template, supervision
from lora.data.chat_template import CHATML, ChatTemplate
from lora.data.instruct import Dialogue, InstructData
from lora.data.packed import IGNORED
from lora.data.supervision import Supervised
from lora.data.tokenizer import Tokenizer
from lora.errors import DataError
from lora.train import examples as module
from tests.data.files import byte_tokenizer
from tests.golden.chat_templates import CASES, TEMPLATES
from tests.harness.claims import assert_killed, claimed, planted

CONTRACT = training_contract("instruct")
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "chat.json").read_text())["cases"]


def tokenizer() -> Tokenizer:
    built = byte_tokenizer()
    built.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return Tokenizer(built, 256)


TOKENIZER = tokenizer()


class Case(NamedTuple):
    name: str  # of a golden case
    said: list[tuple[str, str]]  # what user and assistant say in turn
    kept: int  # max_seq_len


def conversation(case: Case) -> list[dict[str, str]]:
    return [
        {"role": role, "content": content}
        for pair in case.said
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]


def check_rendering(tested: Any, case: Case) -> None:
    name, messages, tools, _ = CASES[case.name]
    template = tested.template(TEMPLATES[name])
    assert template.render(messages, tools) == GOLDEN[case.name]["text"]
    prompt = template.render(messages, tools, add_generation_prompt=True)
    assert prompt == GOLDEN[case.name]["prompt"]


def check_hand_written_spans(tested: Any, case: Case) -> None:
    name, messages, tools, expected = CASES[case.name]
    row = tested.supervise(Dialogue(tuple(messages), tools, "", ""), ChatTemplate(TEMPLATES[name]), "")
    assert [row.text[start:end] for start, end in row.spans] == expected
    [(ids, offsets)] = TOKENIZER.encode_with_offsets([row.text])
    mask = GOLDEN[case.name]["mask"]
    assert len(ids) == len(GOLDEN[case.name]["ids"])
    if mask is not None:
        assert [int(label != IGNORED) for label in supervision.token_labels(ids, offsets, row.spans)] == mask


def check_every_turn(tested: Any, case: Case) -> None:
    row = tested.supervise(Dialogue(tuple(conversation(case)), None, "", ""), ChatTemplate(CHATML), "")
    place = 0
    for (start, end), (asked, answered) in zip(row.spans, case.said, strict=True):
        place += len(f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n")
        assert (start, end) == (place, place + len(answered + "<|im_end|>"))
        place = end + 1


# its author leaves the end of a turn out of what is generated
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
)


def check_marks(tested: Any, case: Case) -> None:
    messages = conversation(case)
    row = tested.supervise(Dialogue(tuple(messages), None, "", ""), ChatTemplate(MARKED), "")
    assert row.text == ChatTemplate(CHATML).render(messages)
    assert [row.text[start:end] for start, end in row.spans] == [answered for _, answered in case.said]


def check_cut(tested: Any, case: Case) -> None:
    data = InstructData((Dialogue(tuple(conversation(case)), None, "", ""),), (7,))
    whole = module.tokenise(data, TOKENIZER, 10**6)
    labels = whole.token_labels[0]
    kept = case.kept
    if (labels[1:kept] != IGNORED).any():
        cut = tested.tokenise(data, TOKENIZER, kept)
        np.testing.assert_array_equal(cut.sequences[0], whole.sequences[0][:kept])
        np.testing.assert_array_equal(cut.token_labels[0], labels[:kept])
        assert cut.truncated == (len(labels) > kept)
    else:
        with pytest.raises(DataError, match=r"lines \[7\]"):
            tested.tokenise(data, TOKENIZER, kept)


CHECKS = {
    "INSTRUCT-001": check_rendering,
    "INSTRUCT-002": check_hand_written_spans,
    "INSTRUCT-003": check_every_turn,
    "INSTRUCT-004": check_cut,
    "INSTRUCT-005": check_marks,
}
SAID = st.one_of(
    st.text(min_size=1, max_size=6),
    st.sampled_from(["yes", "<|im_end|>", "<|im_start|>assistant\nyes", "\n"]),
)
CASE = st.builds(
    Case,
    st.sampled_from(sorted(CASES)),
    st.lists(
        st.tuples(SAID, SAID), min_size=CONTRACT.domain["turns"][0], max_size=CONTRACT.domain["turns"][1]
    ),
    st.integers(1, 80),
)
RIGHT = SimpleNamespace(template=ChatTemplate, supervise=supervision.supervise, tokenise=module.tokenise)


@pytest.mark.parametrize("check", claimed(CHECKS))
@given(case=CASE)
def test_claim(check: Any, case: Case) -> None:
    check(RIGHT, case)


def changed(**parts: Any) -> SimpleNamespace:
    return SimpleNamespace(**vars(RIGHT) | parts)


class Altered(ChatTemplate):
    """A template under other settings than Transformers' own."""

    def __init__(self, source: str, alter: Any) -> None:
        super().__init__(source)
        environment: ImmutableSandboxedEnvironment = chat_template._environment()
        alter(environment)
        self._compiled = environment.from_string(source)


def alteration(alter: Any) -> SimpleNamespace:
    return changed(template=lambda source: Altered(source, alter))


def respanned(spans_of: Any) -> SimpleNamespace:
    def supervise(dialogue: Dialogue, template: ChatTemplate, eos: str) -> Supervised:
        row = supervision.supervise(dialogue, template, eos)
        return Supervised(row.text, tuple(spans_of(row, dialogue)))

    return changed(supervise=supervise)


def first_likeness(row: Supervised, dialogue: Dialogue) -> Any:
    for start, end in row.spans:
        found = row.text.index(row.text[start:end])
        yield found, found + end - start


def passes_over(data: InstructData, tokenizer: Tokenizer, max_seq_len: int) -> Any:
    try:
        return module.tokenise(data, tokenizer, max_seq_len)
    except DataError:
        return replace(module.tokenise(data, tokenizer, 10**6), token_labels=())


def counts_no_cut(data: InstructData, tokenizer: Tokenizer, max_seq_len: int) -> Any:
    return replace(module.tokenise(data, tokenizer, max_seq_len), truncated=0)


def ignores_the_marks(dialogue: Dialogue, template: ChatTemplate, eos: str) -> Supervised:
    source = template.source.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    source += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    return supervision.supervise(dialogue, ChatTemplate(source), eos)


def leaves_the_marks(dialogue: Dialogue, template: ChatTemplate, eos: str) -> Supervised:
    row = supervision.supervise(dialogue, template, eos)
    return row._replace(text=template._text(dialogue.messages, None, ("\x02", "\x03")))


MUTANTS = {
    "ignores_the_marks": changed(supervise=ignores_the_marks),
    "leaves_the_marks_in_the_text": changed(supervise=leaves_the_marks),
    "escapes_html": alteration(
        lambda e: e.filters.update(
            tojson=lambda value: json.dumps(value, ensure_ascii=False).replace("<", "&lt;")
        )
    ),
    "writes_ascii": alteration(lambda e: e.filters.update(tojson=json.dumps)),
    "keeps_the_blocks_lines": alteration(lambda e: setattr(e, "trim_blocks", False)),
    "learns_the_header": respanned(lambda row, _: [(start - 10, end) for start, end in row.spans]),
    "forgets_the_end": respanned(
        lambda row, _: [(start, end - len("<|im_end|>")) for start, end in row.spans]
    ),
    "learns_the_last_turn_alone": respanned(lambda row, _: row.spans[-1:]),
    "finds_the_first_likeness": respanned(first_likeness),
    "passes_over_empty_rows": changed(tokenise=passes_over),
    "counts_no_cut": changed(tokenise=counts_no_cut),
}


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS, MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    assert_killed(check, mutant, CASE)
