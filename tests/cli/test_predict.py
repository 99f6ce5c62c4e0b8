"""Classes and probabilities of texts from arguments, files and standard input."""

from __future__ import annotations

import io
import shutil
import sys

import numpy as np
import pytest

from lora.model.loading import load
from tests.cli.conftest import LABELLED, retrain
from tests.data.files import write_jsonl

TEXTS = ["good news", "bad news", "no news"]


def expected(adapter, texts: list[str]) -> np.ndarray:
    """Return the probabilities from the model called with one text at a time; a byte is a token."""
    model = load(adapter)
    vocabulary = {token: i for i, token in enumerate(sorted(_byte_level(bytes(range(256)))))}
    logits = np.concatenate(
        [model(np.array([[vocabulary[c] for c in _byte_level(t.encode())]])) for t in texts]
    )
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)


def _byte_level(content: bytes) -> str:
    """Return the characters that stand for bytes in a byte-level vocabulary (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    table = {byte: chr(byte) if byte in printable else chr(next(others)) for byte in range(256)}
    return "".join(table[byte] for byte in content)


def test_json_has_the_probability_of_every_class(lora, adapter) -> None:
    document = lora("predict", adapter, *TEXTS, "--json").document
    assert document["class_names"] == ["bad", "good"]
    found = document["predictions"]
    assert [prediction["text"] for prediction in found] == TEXTS
    p = np.array([[prediction["probabilities"][name] for name in ("bad", "good")] for prediction in found])
    np.testing.assert_allclose(p, expected(adapter, TEXTS), rtol=1e-5)
    assert [prediction["label"] for prediction in found] == [
        ("bad", "good")[best] for best in p.argmax(axis=1)
    ]
    assert [prediction["probability"] for prediction in found] == p.max(axis=1).tolist()


def test_text_is_a_line_for_each(lora, adapter) -> None:
    outcome = lora("predict", adapter, "first", "sec\x1b[2Jond\nline")
    first, second = (line.split(maxsplit=2) for line in outcome.out.splitlines())
    assert first[0] in ("bad", "good")
    assert 0.5 <= float(first[1]) <= 1
    assert (first[2], second[2]) == ("first", r"sec\x1b[2Jond\nline")


def test_rows_and_lines_are_read_from_files(lora, adapter, rows, tmp_path) -> None:
    from_rows = lora("predict", adapter, "--data", rows, "--json").document["predictions"]
    assert [prediction["text"] for prediction in from_rows] == [row["input"] for row in LABELLED]
    plain = tmp_path / "lines.txt"
    plain.write_bytes("one\r\ntwo é\n".encode())
    from_lines = lora("predict", adapter, "--data", plain, "--json").document["predictions"]
    assert [prediction["text"] for prediction in from_lines] == ["one", "two é"]


def give_stdin(monkeypatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_lines_are_read_from_standard_input(lora, adapter, monkeypatch) -> None:
    give_stdin(monkeypatch, b"one\ntwo")
    found = lora("predict", adapter, "--json").document["predictions"]
    assert [prediction["text"] for prediction in found] == ["one", "two"]


def test_a_terminal_is_not_waited_for(lora, adapter, monkeypatch) -> None:
    give_stdin(monkeypatch, b"")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert lora("predict", adapter).exit_code == 2


@pytest.mark.parametrize(
    ("content", "exit_code", "said"),
    [(b"", 5, "holds no text"), (b"a\n\nb\n", 5, "line 2"), (b"\xff\n", 4, "0xff")],
)
def test_input_without_a_text_is_refused(
    lora, adapter, monkeypatch, content: bytes, exit_code: int, said: str
) -> None:
    give_stdin(monkeypatch, content)
    outcome = lora("predict", adapter)
    assert (outcome.exit_code, outcome.out) == (exit_code, "")
    assert said in outcome.err


def test_cut_texts_are_counted_and_said(lora, adapter) -> None:
    whole, cut = (
        lora("predict", adapter, text, "--max-seq-len", "4", "--json") for text in ("good", "good news")
    )
    assert cut.err == "note: 1 texts are longer than 4 tokens and keep their head\n"
    assert cut.document["truncated_rows"] == 1
    probabilities = [outcome.document["predictions"][0]["probabilities"] for outcome in (whole, cut)]
    assert probabilities[0] == probabilities[1]


def test_what_cannot_be_predicted_is_refused(lora, base, adapter, rows, tmp_path) -> None:
    assert lora("predict", adapter, "text", "--data", rows).exit_code == 2
    assert lora("predict", adapter, "\udcff is no UTF-8").exit_code == 2
    assert lora("predict", adapter, "--data", tmp_path / "nothing.txt").exit_code == 3
    assert lora("predict", adapter, "--data", tmp_path / "nothing.jsonl").exit_code == 3
    assert lora("predict", tmp_path / "nothing", "text").exit_code == 3
    assert lora("predict", "model.apr", "text").exit_code == 3
    no_input = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a"}])
    assert lora("predict", adapter, "--data", no_input).exit_code == 5
    outcome = lora("predict", base, "text")
    assert outcome.exit_code == 5
    assert "is a language model" in outcome.err


def test_texts_are_cut_as_the_adapter_was_trained(lora, base, rows, tmp_path) -> None:
    settings = ("--max-seq-len", "4", "--epochs", "1", "-q")
    assert lora("finetune", base, "-d", rows, "-o", tmp_path / "run", *settings).exit_code == 0
    adapter = tmp_path / "run" / "best"
    for command in (("predict", adapter, "good news"), ("eval", adapter, "-d", rows)):
        as_trained = lora(*command, "--json")
        assert "longer than 4 tokens" in as_trained.err
        assert as_trained.document == lora(*command, "--json", "--max-seq-len", "4").document
        assert lora(*command, "--json", "--max-seq-len", "512").document["truncated_rows"] == 0


@pytest.mark.parametrize("command", ["predict", "eval", "merge"])
def test_a_base_that_was_trained_since_is_said(lora, own_base, adapter, rows, tmp_path, command: str) -> None:
    arguments = {
        "predict": (adapter, "a text", "--base", own_base),
        "eval": (adapter, "-d", rows, "--base", own_base),
        "merge": (own_base, "--adapter", adapter, "-o", tmp_path / "merged"),
    }[command]
    assert lora(command, *arguments).err == ""
    retrain(own_base)
    shutil.rmtree(tmp_path / "merged", ignore_errors=True)
    outcome = lora(command, *arguments)
    assert outcome.exit_code == 0
    assert outcome.err.startswith(
        f"note: {own_base} is not the base that was trained on, or has changed since"
    )
    assert outcome.err.count("\n") == 1
