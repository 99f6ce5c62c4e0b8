"""A conversation through a pipe, against the model called with the template's text."""

from __future__ import annotations

import pytest

from lora.cli import chat
from lora.data.tokenizer import Tokenizer
from lora.model.loading import load
from tests.cli.test_predict import give_stdin


def answer(base, prompt: str) -> str:
    model, tokenizer = load(base), Tokenizer.load(base)
    ids = tokenizer.encode([prompt], 200).ids[0]
    return tokenizer.decode(model.generate([ids], 3)[0])


def test_each_answer_follows_the_conversation_so_far(lora, own_base, monkeypatch) -> None:
    template = "{% for m in messages %}{{ m.role }} {{ m.content }}\n{% endfor %}"
    (own_base / "chat_template.jinja").write_text(template + "{% if add_generation_prompt %}>{% endif %}")
    give_stdin(monkeypatch, b"Hi\n\nMore\r\n")
    outcome = lora("chat", own_base, "--system", "Be.", "--max-new-tokens", 3)
    begin = "system Be.\nuser Hi\n"
    first = answer(own_base, begin + ">")
    second = answer(own_base, f"{begin}assistant {first}\nuser More\n>")
    assert (outcome.exit_code, outcome.out, outcome.err) == (0, f"{first}\n{second}\n", "")


@pytest.mark.parametrize("content", [b"", b"/exit\nnever read\n", b"\n \n/exit"])
def test_the_end_and_exit_leave_quietly(lora, base, monkeypatch, content: bytes) -> None:
    give_stdin(monkeypatch, content)
    outcome = lora("chat", base)
    assert (outcome.exit_code, outcome.out, outcome.err) == (0, "", "")


def test_an_interrupt_leaves_quietly(lora, base, monkeypatch) -> None:
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "continue_texts", interrupted)
    give_stdin(monkeypatch, b"Hi\n")
    outcome = lora("chat", base)
    assert (outcome.exit_code, outcome.out, outcome.err) == (0, "\n", "")


def test_a_checkpoint_without_a_template_speaks_chatml(lora, base, monkeypatch) -> None:
    give_stdin(monkeypatch, b"Hi\n")
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert lora("chat", base, "--max-new-tokens", 3).out == answer(base, prompt) + "\n"


def test_a_classifier_is_refused(lora, adapter, monkeypatch) -> None:
    give_stdin(monkeypatch, b"Hi\n")
    assert lora("chat", adapter, "--max-new-tokens", 3).exit_code == 2
