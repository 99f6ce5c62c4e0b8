"""What a report says of a run's best state, row by row: it is run again on the rows that validated it.

Training keeps no predictions, so that it costs nothing there; the recipe, the seed and the hash of the data
say which rows those were, and the numbers are those of the bytes on the disk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora.data.classify import ClassifyData
from lora.data.instruct import Dialogue, InstructData
from lora.data.packed import split
from lora.data.split import stratified_split
from lora.errors import ValidationError
from lora.io.base_hash import base_change
from lora.io.checkpoint import open_checkpoint
from lora.model.loading import load
from lora.model.model import Model
from lora.train.classification_metrics import (
    CALIBRATION_BINS,
    ClassificationMetrics,
    calibration_bin,
    metrics_from_probabilities,
)
from lora.train.config import FinetuneConfig
from lora.train.evaluate import TOKENS_AT_ONCE, CausalMetrics, class_probabilities, evaluate_causal
from lora.train.examples import Data, Examples, data_hash
from lora.train.finetune import Prepared, prepare
from lora.train.multi_label_metrics import (
    MultiLabelMetrics,
    label_losses,
    multi_label_metrics,
    predicted_labels,
)
from lora.train.recipe import read_recipe

WORST = 10


@dataclass(frozen=True)
class WorstRow:
    """A validation row that the model finds hard."""

    line: int  # in the data file
    text: str
    loss: float  # of the row, per token or for its label, in nats
    label: str | None = None  # a classifier's
    predicted: str | None = None
    confidence: float | None = None  # the probability of `predicted`; of several labels, of all together


@dataclass(frozen=True)
class CalibrationBin:
    """The rows whose confidence lies in one tenth of (0, 1]."""

    rows: int
    confidence: float  # mean; 0 where there is no row
    accuracy: float


@dataclass(frozen=True)
class Evaluation:
    """The best state's scores on the validation rows, and the rows that it does worst on."""

    scores: ClassificationMetrics | MultiLabelMetrics | CausalMetrics
    calibration: tuple[CalibrationBin, ...]  # of a classifier of one class, by rising confidence
    worst: tuple[WorstRow, ...]  # the largest loss first


def evaluate_run(state: Path, recipe: Path, facts: Mapping[str, Any]) -> Evaluation:
    """Run the state in the folder `state` on the validation rows of the run that `recipe` repeats.

    Args:
        state: a kept state of the run.
        recipe: the run's.
        facts: from run.json, the hashes of data and base.

    Raises:
        LoraError: the recipe, the data or the base is not there any more, or not what it was.
    """
    prepared = _prepare(recipe)
    found = data_hash(prepared.data)
    if found != facts.get("data_hash"):
        raise ValidationError(f"{prepared.data_path}: the rows are not those of the run ({found[:12]}...)")
    if prepared.config.method == "lora":  # any other state is a base of its own
        change = base_change(open_checkpoint(prepared.folder), facts)
        if change is not None:
            raise ValidationError(change)
    model = load(state, dtype=prepared.config.dtype)
    examples = prepared.examples
    _, rows = stratified_split(examples.strata, prepared.config.val_split, prepared.config.seed)
    validation = examples.subset(rows)
    if not isinstance(prepared.data, ClassifyData):
        return _evaluate_causal(model, prepared.data, validation, rows)
    if prepared.data.is_multi_label:
        return _evaluate_multi_label(model, prepared.data, validation, rows)
    return _evaluate_classifier(model, prepared.data, validation, rows)


def _prepare(recipe: Path) -> Prepared:
    values = read_recipe(recipe)
    model, data, _ = (values.pop(name) for name in ("model", "data", "output"))
    return prepare(FinetuneConfig(**{**values, "tensorboard": False}), model, Path(data))


def calibration(probabilities: np.ndarray, labels: np.ndarray) -> tuple[CalibrationBin, ...]:
    """Return the bins of the calibration error, for `probabilities` [n, C] and `labels` [n]."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bins = calibration_bin(confidence)
    rows = np.bincount(bins, minlength=CALIBRATION_BINS)
    sums = (np.bincount(bins, weights=w, minlength=CALIBRATION_BINS) for w in (confidence, right))
    means = (total / np.maximum(rows, 1) for total in sums)
    return tuple(
        CalibrationBin(*values) for values in zip(rows.tolist(), *(m.tolist() for m in means), strict=True)
    )


def _evaluate_classifier(model: Model, data: Data, examples: Examples, rows: np.ndarray) -> Evaluation:
    names, labels = model.head.class_names, np.asarray(examples.labels)  # pyright: ignore[reportAttributeAccessIssue]
    p = class_probabilities(model, examples.sequences)
    losses = -np.log(np.maximum(p[np.arange(len(labels)), labels], np.finfo(np.float64).eps))
    predicted = p.argmax(axis=1)
    worst = [
        WorstRow(
            data.lines[rows[i]],
            _text(data, rows[i]),
            float(losses[i]),
            names[labels[i]],
            names[predicted[i]],
            float(p[i, predicted[i]]),
        )
        for i in _largest(losses)
    ]
    scores = metrics_from_probabilities(p, labels, names)
    return Evaluation(scores, calibration(p, labels), tuple(worst))


def _evaluate_multi_label(
    model: Model, data: ClassifyData, examples: Examples, rows: np.ndarray
) -> Evaluation:
    names, labels = data.class_names, np.asarray(examples.labels)
    p = class_probabilities(model, examples.sequences)
    losses, predicted = label_losses(p, labels).mean(axis=1), predicted_labels(p)
    # each label for itself: that all of them are as predicted is as probable as the product
    confidence = np.where(predicted, p, 1 - p).prod(axis=1)
    worst = [
        WorstRow(
            data.lines[rows[i]],
            data.texts[rows[i]],
            float(losses[i]),
            _listed(data.names_of(rows[i])),
            _listed([names[label] for label in np.flatnonzero(predicted[i])]),
            float(confidence[i]),
        )
        for i in _largest(losses)
    ]
    return Evaluation(multi_label_metrics(p, labels, names), (), tuple(worst))


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(labels) or "(none)"


def _evaluate_causal(model: Model, data: Data, examples: Examples, rows: np.ndarray) -> Evaluation:
    losses = row_losses(model, examples)
    worst = [WorstRow(data.lines[rows[i]], _text(data, rows[i]), float(losses[i])) for i in _largest(losses)]
    return Evaluation(evaluate_causal(model, examples), (), tuple(worst))


def row_losses(model: Model, examples: Examples, *, batch_size: int = 32) -> np.ndarray:
    """Return a language model's loss per counted token of each row, in nats, [n] float64."""
    losses: list[float] = []
    for first in range(0, len(examples), batch_size):
        batch = examples.batch(np.arange(first, min(first + batch_size, len(examples))))
        for part in split(batch, max(TOKENS_AT_ONCE, int(batch.lengths.max()))):
            hidden = model.hidden_states(part)
            for start, end in zip(part.cu_seqlens[:-1], part.cu_seqlens[1:], strict=True):
                row = examples.batch([len(losses)])
                outcome = model.head.score(
                    model.ops, model.parameters, hidden[start:end], row, class_weights=None
                )
                losses.append(float(outcome.loss) / row.counted)
    return np.array(losses)


def _largest(losses: np.ndarray) -> list[int]:
    return np.argsort(-losses, kind="stable")[:WORST].tolist()


def _text(data: Data, row: int) -> str:
    if isinstance(data, InstructData):
        return _dialogue_text(data.dialogues[row])
    return data.texts[row]


def _dialogue_text(dialogue: Dialogue) -> str:
    if not dialogue.messages:
        return f"{dialogue.prompt}\n→ {dialogue.completion}"
    return "\n".join(f"{message['role']}: {_content(message)}" for message in dialogue.messages)


def _content(message: dict[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else json.dumps(message, ensure_ascii=False)
