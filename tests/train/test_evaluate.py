"""Scores of a model against the same sums written out from its logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lora.errors import DataError, ValidationError
from lora.model.loading import load
from lora.train.evaluate import class_probabilities, evaluate, read_examples_for
from lora.train.examples import Examples
from tests.data.files import tokenizer_folder, write_jsonl
from tests.harness.models import TINY_QWEN2, write_model

CONFIG = TINY_QWEN2 | {"vocab_size": 257, "eos_token_id": 256, "pad_token_id": 256}
NAMES = ("cold", "hot", "mild")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(write_model(tmp_path_factory.mktemp("evaluate") / "base", CONFIG))


def random_examples(lengths: list[int], classes: int | None) -> Examples:
    rng = np.random.default_rng(7)
    sequences = tuple(rng.integers(0, 257, length) for length in lengths)
    labels = None if classes is None else rng.integers(0, classes, len(lengths))
    return Examples(sequences, labels, 0)


def softmax(logits: np.ndarray) -> np.ndarray:
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return odds / odds.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_probabilities_are_those_of_each_sequence_alone(folder: Path, batch_size: int) -> None:
    model = load(folder, dtype="float64", class_names=NAMES)
    examples = random_examples([3, 1, 9, 4, 2, 6, 5], classes=3)
    found = class_probabilities(model, examples.sequences, batch_size=batch_size)
    expected = softmax(np.concatenate([model(ids[None]) for ids in examples.sequences]))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_batch_is_cut_where_it_holds_too_many_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(folder, dtype="float64", class_names=NAMES)
    examples = random_examples([3, 1, 9, 4, 2, 6, 5], classes=3)
    whole = class_probabilities(model, examples.sequences)
    seen = []
    run = model.packed_logits
    monkeypatch.setattr(model, "packed_logits", lambda batch: seen.append(batch.num_tokens) or run(batch))
    monkeypatch.setattr("lora.train.evaluate.TOKENS_AT_ONCE", 5)
    np.testing.assert_allclose(class_probabilities(model, examples.sequences), whole, rtol=1e-12)
    assert seen == [4, 9, 6, 6, 5]  # a sequence of 9 cannot be cut, so 9 is what a part may hold


def test_a_classifier_is_scored_by_its_labels(folder: Path) -> None:
    model = load(folder, dtype="float64", class_names=NAMES)
    examples = random_examples([3, 1, 9, 4, 2, 6, 5], classes=3)
    scores = evaluate(model, examples)
    predicted = np.array([int(model(ids[None]).argmax()) for ids in examples.sequences])
    assert scores.accuracy == (predicted == examples.labels).mean()
    assert [score.name for score in scores.per_class] == list(NAMES)


@pytest.mark.parametrize("batch_size", [1, 2, 50])
def test_a_language_model_is_scored_by_its_counted_tokens(folder: Path, batch_size: int) -> None:
    model = load(folder, dtype="float64")
    examples = random_examples([3, 9, 2, 6], classes=None)
    losses, right = [], []
    for ids in examples.sequences:
        p = softmax(model(ids[None])[0])[:-1]
        losses += [-np.log(p[np.arange(len(ids) - 1), ids[1:]])]
        right += [p.argmax(axis=1) == ids[1:]]
    expected = np.concatenate(losses).mean()
    scores = evaluate(model, examples, batch_size=batch_size)
    assert (scores.rows, scores.tokens) == (4, 16)
    np.testing.assert_allclose(scores.loss, expected, rtol=1e-12)
    np.testing.assert_allclose(scores.perplexity, np.exp(expected), rtol=1e-11)
    assert scores.token_accuracy == np.concatenate(right).mean()


def test_a_classifier_needs_labels(folder: Path) -> None:
    with pytest.raises(DataError, match="texts alone"):
        evaluate(load(folder, class_names=NAMES), random_examples([3], classes=None))


def test_a_hopeless_loss_has_an_infinite_perplexity(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora.train.evaluate.evaluate_loss", lambda *arguments: (1000.0, 0.0))
    assert evaluate(load(folder), random_examples([3], classes=None)).perplexity == np.inf


def test_a_language_model_has_no_class_probabilities(folder: Path) -> None:
    with pytest.raises(ValidationError, match="is a language model"):
        class_probabilities(load(folder), [np.arange(3)])


def test_rows_are_read_as_the_model_needs_them(folder: Path, tmp_path: Path) -> None:
    rows = [{"input": "abc", "label": "mild"}, {"input": "abcdef", "label": "cold"}]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    examples = read_examples_for(load(folder, class_names=NAMES), data, 4)
    np.testing.assert_array_equal(examples.labels, [2, 0])
    assert [len(ids) for ids in examples.sequences] == [3, 4]
    assert examples.truncated == 1
    with pytest.raises(DataError, match="'text'"):
        read_examples_for(load(folder), data, 4)
    with pytest.raises(DataError, match="none of the classes hot, mild"):
        read_examples_for(load(folder, class_names=("hot", "mild")), data, 4)
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "abc"}])
    examples = read_examples_for(load(folder), texts, 9)
    assert (examples.labels, len(examples.sequences[0])) == (None, 4)  # the end of the text is one more
