"""`lora predict`: the class of each text, or its labels, and how sure the classifier is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from lora.cli.options import (
    base_option,
    device_option,
    dtype_option,
    output_options,
    text_length,
    trained_length_option,
)
from lora.cli.output import note_truncated, one_line, print_json
from lora.cli.texts import Texts, check_one_source, read_texts

if TYPE_CHECKING:
    import numpy as np

    from lora.model.model import Model


@click.command(short_help="Classify texts.")
@click.argument("model", metavar="MODEL_OR_ADAPTER")
@click.argument("texts", metavar="[TEXT]...", nargs=-1)
@click.option(
    "--data", "-d", metavar="FILE", help='*.jsonl: the "input" of each row; any other file: each line.'
)
@trained_length_option
@base_option
@device_option
@dtype_option
@output_options
def predict(
    model: str,
    texts: tuple[str, ...],
    data: str | None,
    max_seq_len: int | None,
    base: str | None,
    device: str,
    dtype: str,
    as_json: bool,
) -> None:
    """Classify each TEXT, each row of --data, or else each line of standard input.

    A TEXT that starts with a dash comes after `--`.
    """
    check_one_source(texts, data)
    from lora.io.hub import require_path
    from lora.model.loading import load
    from lora.train.evaluate import classifier_head

    require_path(model)
    read = read_texts(texts, data, field="input")
    loaded = load(model, device, dtype, base=base)
    head = classifier_head(loaded)
    names = head.class_names
    predicted = predict_labels if head.is_multi_label else predict_texts
    length = text_length(loaded, max_seq_len)
    predictions, truncated = predicted(loaded, read, length)
    note_truncated(truncated, length)
    if as_json:
        document = {"status": "predicted", "model": model, "class_names": list(names)}
        print_json(
            {**document, "truncated_rows": truncated, "predictions": [p.as_dict() for p in predictions]}
        )
    else:
        print_predictions(predictions)


@dataclass(frozen=True)
class Prediction:
    """The most probable class of a text."""

    text: str
    label: str
    probability: float
    probabilities: dict[str, float]  # by class name

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return vars(self)


@dataclass(frozen=True)
class LabelPrediction:
    """The labels of a text: those more probable than not, in the order of the head's outputs."""

    text: str
    labels: list[str]
    probabilities: dict[str, float]  # by label; each for itself, so that they sum to anything

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return vars(self)


def predict_texts(model: Model, read: Texts, max_seq_len: int) -> tuple[list[Prediction], int]:
    """Return the prediction for each text, and how many texts lost their tail.

    Raises:
        ValidationError: the model is no classifier.
        DataError: a text holds no token.
    """
    names, rows, truncated = _probabilities(model, read, max_seq_len)
    return [_prediction(*pair, names) for pair in zip(read.texts, rows, strict=True)], truncated


def predict_labels(model: Model, read: Texts, max_seq_len: int) -> tuple[list[LabelPrediction], int]:
    """Return the labels of each text, and how many texts lost their tail; errors as in `predict_texts`."""
    names, rows, truncated = _probabilities(model, read, max_seq_len)
    return [_label_prediction(*pair, names) for pair in zip(read.texts, rows, strict=True)], truncated


def _probabilities(model: Model, read: Texts, max_seq_len: int) -> tuple[Sequence[str], np.ndarray, int]:
    from lora.data.tokenizer import Tokenizer
    from lora.train.evaluate import class_probabilities, classifier_head

    encoded = Tokenizer.load(model.checkpoint.folder).encode(read.texts, max_seq_len, lines=read.lines)
    rows = class_probabilities(model, encoded.ids)
    return classifier_head(model).class_names, rows, encoded.truncated


def print_predictions(predictions: Sequence[Prediction] | Sequence[LabelPrediction]) -> None:
    """Print a line for each text: class, probability, and how the text begins.

    Or its labels, and the probability of every label.
    """
    found = [_found(p) for p in predictions]
    width = max(map(len, found))
    for p, label in zip(predictions, found, strict=True):
        click.echo(f"{label:<{width}}  {_probability(p)}  {one_line(p.text)}")


def _found(prediction: Prediction | LabelPrediction) -> str:
    if isinstance(prediction, Prediction):
        return prediction.label
    return ", ".join(prediction.labels) or "(none)"


def _probability(prediction: Prediction | LabelPrediction) -> str:
    if isinstance(prediction, Prediction):
        return f"{prediction.probability:.4f}"
    return "  ".join(f"{name} {p:.4f}" for name, p in prediction.probabilities.items())


def _label_prediction(text: str, row: np.ndarray, names: Sequence[str]) -> LabelPrediction:
    from lora.train.multi_label_metrics import predicted_labels

    labels = [name for name, is_there in zip(names, predicted_labels(row), strict=True) if is_there]
    return LabelPrediction(text, labels, dict(zip(names, row.tolist(), strict=True)))


def _prediction(text: str, row: np.ndarray, names: Sequence[str]) -> Prediction:
    best = int(row.argmax())
    return Prediction(text, names[best], float(row[best]), dict(zip(names, row.tolist(), strict=True)))
