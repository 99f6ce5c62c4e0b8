"""Attempts to falsify contracts/training/exact_match.yaml, with a model that says what it is told to say."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.contracts import training_contract
from lora.data.causal import CausalData
from lora.data.instruct import Dialogue, InstructData
from lora.data.packed import Packed
from lora.data.tokenizer import Tokenizer
from lora.errors import DataError, ValidationError
from lora.train import exact_match as module
from tests.data.files import EOS, tokenizer_folder
from tests.harness.claims import assert_killed, claimed, planted

CONTRACT = training_contract("exact_match")
END = "<|im_end|>"
LIMIT = 40  # longer than any answer with its end


@cache
def folder() -> Path:
    made = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return tokenizer_folder(made)


class Exchange(NamedTuple):
    """One row, and what the model answers to it."""

    bare: bool  # a prompt and completion, else a conversation
    before: int  # earlier exchanges of the conversation
    answer: str  # of the row
    said: str
    ends: bool

    def dialogue(self, number: int) -> Dialogue:
        if self.bare:
            return Dialogue((), None, f"{number}: ", self.answer)
        asked = [(f"question {number}, {i}", f"answer {i}") for i in range(self.before)]
        asked.append((f"question {number}", self.answer))
        roles = ({"user": user, "assistant": assistant} for user, assistant in asked)
        messages = [{"role": role, "content": text} for turn in roles for role, text in turn.items()]
        return Dialogue(tuple(messages), None, "", "")

    def prompt(self, number: int) -> str:
        if self.bare:
            return f"{number}: "
        text = "".join(
            f"<|im_start|>{message['role']}\n{message['content']}{END}\n"
            for message in self.dialogue(number).messages[:-1]
        )
        return f"{text}<|im_start|>assistant\n"

    @property
    def matches(self) -> bool:
        return self.ends and self.said.strip() == self.answer.strip()


class Case(NamedTuple):
    exchanges: list[Exchange]
    batch_size: int

    def data(self) -> InstructData:
        rows = [exchange.dialogue(number) for number, exchange in enumerate(self.exchanges)]
        return InstructData(tuple(rows), tuple(range(1, len(rows) + 1)))


class Scripted:
    """Stands in for a model: continues each prompt that it knows with its answer, and remembers it."""

    def __init__(self, case: Case) -> None:
        self.checkpoint = SimpleNamespace(folder=folder())
        self.spec = SimpleNamespace(eos_token_ids=(256,), max_position_embeddings=10_000)
        self.tokenizer = Tokenizer.load(folder())
        self.asked: list[str] = []
        self.answers = {
            exchange.prompt(number): exchange.said
            + ((EOS if exchange.bare else END) if exchange.ends else "." * LIMIT)
            for number, exchange in enumerate(case.exchanges)
        }

    def stream(self, prompts: Packed, max_new_tokens: int, sampling: Any, ended: Any) -> Iterator[Any]:
        assert sampling.temperature == 0
        for row in range(prompts.num_sequences):
            ids = prompts.input_ids[prompts.cu_seqlens[row] : prompts.cu_seqlens[row + 1]]
            prompt = self.tokenizer.decode(ids, skip_special_tokens=False)
            self.asked.append(prompt)
            [(said, _)] = self.tokenizer.encode_with_offsets([self.answers.get(prompt, "?")])
            for length in range(1, min(len(said), max_new_tokens) + 1):
                if ended(row, said[:length]):
                    break
                yield []


def score(tested: Any, case: Case) -> tuple[module.ExactMatch, list[str]]:
    model: Any = Scripted(case)
    found = tested.exact_match(model, case.data(), max_new_tokens=LIMIT, batch_size=case.batch_size)
    return found, model.asked


def check_matches(tested: Any, case: Case) -> None:
    found, _ = score(tested, case)
    matches, rows = sum(exchange.matches for exchange in case.exchanges), len(case.exchanges)
    assert (found.exact_matches, found.generated_rows) == (matches, rows)
    assert found.exact_match == matches / rows
    assert found.unended_rows == sum(not exchange.ends for exchange in case.exchanges)


def check_prompts(tested: Any, case: Case) -> None:
    _, asked = score(tested, case)
    expected = [exchange.prompt(number) for number, exchange in enumerate(case.exchanges)]
    assert set(asked) <= set(expected)


def check_batches(tested: Any, case: Case) -> None:
    found, asked = score(tested, case)
    assert sorted(asked) == sorted(e.prompt(number) for number, e in enumerate(case.exchanges))
    assert found.exact_matches == sum(exchange.matches for exchange in case.exchanges)


CHECKS = {
    "EXACT-MATCH-001": check_matches,
    "EXACT-MATCH-002": check_prompts,
    "EXACT-MATCH-003": check_batches,
}
# an answer may spell the end of the other form
SAID = st.sampled_from(["yes", "Yes", "yes ", "\nyes", "no", "yes, it is", f"yes{EOS[:-1]}", "é 你好"])
EXCHANGE = st.builds(
    Exchange, st.booleans(), st.integers(0, 2), SAID, SAID, st.sampled_from([True, True, False])
)
CASE = st.builds(
    Case,
    st.lists(EXCHANGE, min_size=CONTRACT.domain["rows"][0], max_size=CONTRACT.domain["rows"][1]),
    st.integers(*CONTRACT.domain["batch_size"]),
)


@pytest.mark.parametrize("check", claimed(CHECKS))
@given(case=CASE)
def test_claim(check: Any, case: Case) -> None:
    check(module, case)


def altered(**parts: Any) -> SimpleNamespace:
    def exact_match(*arguments: Any, **options: Any) -> module.ExactMatch:
        with mock.patch.multiple(module, **parts):
            return right(*arguments, **options)

    right = module.exact_match
    return SimpleNamespace(exact_match=exact_match)


def comparing(equal: Any) -> SimpleNamespace:
    return altered(
        matched=lambda question, answer, _: answer.finish == "stop" and equal(answer.text, question.answer)
    )


def asking(prompt_of: Any) -> SimpleNamespace:
    right = module.questions
    return altered(questions=lambda *arguments: [q._replace(prompt=prompt_of(q)) for q in right(*arguments)])


def ending_alike(data: Any, template: Any, eos: str) -> list[module.Question]:
    return [q._replace(end=eos) for q in RIGHT_QUESTIONS(data, template, eos)]


def all_but_the_last(asked: Any, batch_size: int) -> Any:
    batches = RIGHT_BATCHES(asked, batch_size)
    return batches[:-1] if len(batches) > 1 else batches


RIGHT_QUESTIONS, RIGHT_BATCHES = module.questions, module._batches
HEADER = "<|im_start|>assistant\n"
MUTANTS = {
    "compares_white_space": comparing(lambda said, answer: said == answer),
    "ignores_case": comparing(lambda said, answer: said.strip().lower() == answer.strip().lower()),
    "counts_a_beginning": comparing(lambda said, answer: said.strip().startswith(answer.strip())),
    "counts_what_has_not_ended": altered(
        matched=lambda question, answer, _: answer.text.rstrip(".").strip() == question.answer.strip()
    ),
    "asks_with_the_answer": asking(lambda q: q.prompt + q.answer),
    "forgets_the_turns_before": asking(lambda q: q.prompt[q.prompt.rfind("<|im_start|>user") :] or q.prompt),
    "asks_without_the_header": asking(lambda q: q.prompt.removesuffix(HEADER)),
    "drops_the_last_batch": altered(_batches=all_but_the_last),
    "ends_all_alike": altered(questions=ending_alike),
}


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS, MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    assert_killed(check, mutant, CASE)


def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    case = Case([Exchange(True, 0, "yes", "yes", True)], 1)
    model: Any = Scripted(case)
    model.spec.max_position_embeddings = LIMIT + 2
    with pytest.raises(ValidationError, match=r"take 43 tokens; the model's context holds 42"):
        module.exact_match(model, case.data(), max_new_tokens=LIMIT)


def test_rows_without_an_answer_are_refused() -> None:
    model: Any = Scripted(Case([], 1))
    with pytest.raises(DataError, match="other rows have no answer"):
        module.exact_match(model, CausalData(("a",), (1,)))


def test_special_tokens_are_compared_by_nobody(tmp_path: Path) -> None:
    # what marks a turn inside a row is left out of both texts
    exchange = Exchange(True, 0, f"yes{EOS}", "yes", True)
    found, _ = score(module, Case([exchange], 1))
    assert found.exact_matches == 1
    assert np.isclose(found.exact_match, 1.0)
