"""Continuations from the command line, against the model called by hand."""

from __future__ import annotations

import json

import pytest

from lora.data.tokenizer import Tokenizer
from lora.model.continuation import Continuation
from lora.model.loading import load
from tests.cli.test_predict import give_stdin
from tests.data.files import write_jsonl

PROMPTS = ["a line", "another", "b"]


def expected(base, prompt: str, **settings) -> str:
    model, tokenizer = load(base), Tokenizer.load(base)
    ids = tokenizer.encode([prompt], 100).ids[0]
    return tokenizer.decode(model.generate([ids], 12, **settings)[0])


def texts_of(outcome) -> list[str]:
    assert outcome.exit_code == 0
    return [completion["text"] for completion in outcome.document["completions"]]


def test_json_holds_what_the_model_says(lora, base) -> None:
    outcome = lora("generate", base, *PROMPTS, "--max-new-tokens", 12, "--json")
    assert texts_of(outcome) == [expected(base, prompt) for prompt in PROMPTS]
    first = outcome.document["completions"][0]
    assert (first["prompt"], first["tokens"], first["finish_reason"]) == (PROMPTS[0], 12, "length")


def test_every_setting_reaches_the_draws(lora, base) -> None:
    settings = {"temperature": 1.5, "top_p": 0.9, "top_k": 30, "seed": 3}
    options = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", value)]
    outcome = lora("generate", base, *PROMPTS, "--max-new-tokens", 12, *options, "--json")
    assert texts_of(outcome) == [expected(base, prompt, **settings) for prompt in PROMPTS]
    for name in settings:
        less = {key: value for key, value in settings.items() if key != name}
        assert any(expected(base, p, **less) != expected(base, p, **settings) for p in PROMPTS), name


def test_one_prompt_is_written_as_it_comes_and_several_below_each_other(lora, base) -> None:
    settings = ("--max-new-tokens", 12, "--temperature", 1)
    texts = [expected(base, prompt, temperature=1.0) for prompt in PROMPTS]
    assert lora("generate", base, PROMPTS[0], *settings).out == texts[0] + "\n"
    pairs = zip(PROMPTS, texts, strict=True)
    assert lora("generate", base, *PROMPTS, *settings).out == "".join(
        f"==> {prompt} <==\n{text}\n\n" for prompt, text in pairs
    )


def test_prompts_are_read_from_files_and_standard_input(lora, base, tmp_path, monkeypatch) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    from_rows = lora("generate", base, "--data", rows, "--max-new-tokens", 2, "--json").document
    give_stdin(monkeypatch, "\n".join(PROMPTS).encode())
    from_stdin = lora("generate", base, "--max-new-tokens", 2, "--json").document
    assert from_rows == from_stdin
    assert [c["prompt"] for c in from_rows["completions"]] == PROMPTS


def test_a_stop_text_ends_and_is_left_out(lora, base) -> None:
    whole = expected(base, PROMPTS[0], temperature=1.0)
    stop = whole[3:5]
    outcome = lora(
        "generate", base, PROMPTS[0], "--max-new-tokens", 12, "--temperature", 1, "--stop", stop, "--json"
    )
    assert texts_of(outcome) == [whole[: whole.find(stop)]]
    assert outcome.document["completions"][0]["finish_reason"] == "stop"
    assert outcome.document["completions"][0]["tokens"] < 12


def test_a_stop_that_is_a_special_token_ends_by_its_id(lora, own_base) -> None:
    path = own_base / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    first = int(load(own_base).generate([Tokenizer.load(own_base).encode(["a line"], 9).ids[0]], 3)[0][0])
    (token,) = (t for t, i in tokenizer["model"]["vocab"].items() if i == first)
    special = {"id": first, "content": token, "special": True, "normalized": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    tokenizer["added_tokens"] = [*tokenizer["added_tokens"], special | flags]
    path.write_text(json.dumps(tokenizer))
    outcome = lora("generate", own_base, "a line", "--stop", token, "--json")
    (completion,) = outcome.document["completions"]
    assert (completion["text"], completion["tokens"], completion["finish_reason"]) == ("", 1, "stop")


def test_what_a_later_token_can_change_is_held_back(base) -> None:
    tokenizer = Tokenizer.load(base)
    continuation = Continuation("", tokenizer, ("END",), (256,))
    ids = tokenizer.encode(["aé bEN"], 100).ids[0]
    written = [
        continuation.settled for n in range(1, len(ids) + 1) if not continuation.take(ids[:n].tolist())
    ]
    assert written == ["", "", "", "a", "aé", "aé ", "aé b"]
    assert continuation.take([*ids.tolist(), *tokenizer.encode(["D"], 100).ids[0].tolist()])
    assert continuation.text == continuation.settled == "aé b"


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (("a", "--data", "b"), 2, "not from both"),
        (("a", "--stop", ""), 2, "--stop"),
        (("a", "--top-p", "0"), 2, "--top-p"),
        (("a", "--max-new-tokens", "1000"), 5, "the model's context holds 128"),
        (("a", ""), 5, "text 1"),
    ],
)
def test_what_cannot_be_continued_is_refused(lora, base, arguments, exit_code: int, said: str) -> None:
    outcome = lora("generate", base, *arguments)
    assert (outcome.exit_code, outcome.out) == (exit_code, "")
    assert said in outcome.err


def test_a_classifier_is_refused(lora, adapter) -> None:
    assert lora("generate", adapter, "a").exit_code == 2
