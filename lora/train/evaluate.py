"""How well a model does on rows that it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora.backend import to_host
from lora.data.chat_template import ChatTemplate
from lora.data.packed import pack, split
from lora.data.tokenizer import Tokenizer
from lora.errors import DataError, ValidationError
from lora.model.head import ClassifierHead
from lora.model.model import Model
from lora.train.classification_metrics import ClassificationMetrics, metrics_from_probabilities, softmax
from lora.train.examples import Data, Examples, detect_task, read_data, tokenise
from lora.train.loop import evaluate_loss
from lora.train.multi_label_metrics import MultiLabelMetrics, multi_label_metrics, sigmoid

TOKENS_AT_ONCE = 4096  # without a backward pass, only one block's activations live at a time


@dataclass(frozen=True)
class CausalMetrics:
    """A language model's scores on the rows of a file."""

    rows: int
    tokens: int  # that were predicted: all but the first of each row, or those that an instruction teaches
    loss: float  # per token, in nats
    perplexity: float  # exp(loss)
    token_accuracy: float  # share of tokens that were the most likely one

    def as_dict(self) -> dict[str, Any]:
        """Return the scores as JSON values, under the names of the fields."""
        return asdict(self)


def read_data_for(model: Model, path: Path) -> Data:
    """Read a file as `model` needs it: a classifier's labels by its own class names, else texts or dialogues.

    Raises:
        MissingFileError: there is no such file.
        DataError: rows are bad, or hold a class that the model does not know.
    """
    if isinstance(model.head, ClassifierHead):
        head = model.head
        return read_data(path, "classify", class_names=head.class_names, multi_label=head.is_multi_label)
    return read_data(path, "instruct" if detect_task(path) == "instruct" else "causal")


def examples_for(model: Model, data: Data, max_seq_len: int) -> Examples:
    """Return the rows as the tokens of `model`'s own tokenizer and chat template; errors as in `tokenise`."""
    folder = model.checkpoint.folder
    return tokenise(data, Tokenizer.load(folder), max_seq_len, template=ChatTemplate.load(folder))


def read_examples_for(model: Model, path: Path, max_seq_len: int) -> Examples:
    """Read a file and return its rows as tokens; errors as in `read_data_for` and `examples_for`."""
    return examples_for(model, read_data_for(model, path), max_seq_len)


def evaluate(
    model: Model, examples: Examples, *, batch_size: int = 32
) -> ClassificationMetrics | MultiLabelMetrics | CausalMetrics:
    """Return the scores of `model`, a classifier or a language model; arguments and errors as below."""
    if isinstance(model.head, ClassifierHead):
        scored = evaluate_multi_label if model.head.is_multi_label else evaluate_classifier
        return scored(model, examples, batch_size=batch_size)
    return evaluate_causal(model, examples, batch_size=batch_size)


def evaluate_classifier(model: Model, examples: Examples, *, batch_size: int = 32) -> ClassificationMetrics:
    """Return the scores of a classifier on labelled examples.

    Args:
        model: with its adapter, if any, active.
        examples: from `read_examples_for`.
        batch_size: rows that are run together, at most.

    Raises:
        ValidationError: the model is no classifier, or gives a logit that is not finite.
        DataError: the examples have no labels.
    """
    if examples.labels is None:
        raise DataError("expected a label for each example, found texts alone")
    p = class_probabilities(model, examples.sequences, batch_size=batch_size)
    return metrics_from_probabilities(p, examples.labels, classifier_head(model).class_names)


def evaluate_multi_label(model: Model, examples: Examples, *, batch_size: int = 32) -> MultiLabelMetrics:
    """Return the scores of a classifier of several labels; the rest as in `evaluate_classifier`."""
    if examples.labels is None:
        raise DataError("expected labels for each example, found texts alone")
    p = class_probabilities(model, examples.sequences, batch_size=batch_size)
    return multi_label_metrics(p, examples.labels, classifier_head(model).class_names)


def evaluate_causal(model: Model, examples: Examples, *, batch_size: int = 32) -> CausalMetrics:
    """Return the scores of a language model on texts; arguments as in `evaluate_classifier`."""
    loss, accuracy = evaluate_loss(model, examples, batch_size, TOKENS_AT_ONCE)
    return CausalMetrics(len(examples), examples.predicted, loss, _exp(loss), accuracy)


def class_probabilities(model: Model, sequences: Sequence[np.ndarray], *, batch_size: int = 32) -> np.ndarray:
    """Return the probability of each class, or of each label, for each token sequence, [n, C] float64.

    Raises:
        ValidationError: the model is no classifier, or gives a logit that is not finite.
    """
    probabilities = sigmoid if classifier_head(model).is_multi_label else softmax
    batches = (pack(sequences[first : first + batch_size]) for first in range(0, len(sequences), batch_size))
    parts = (
        part for batch in batches for part in split(batch, max(TOKENS_AT_ONCE, int(batch.lengths.max())))
    )
    return probabilities(np.concatenate([to_host(model.packed_logits(part)) for part in parts]))


def classifier_head(model: Model) -> ClassifierHead:
    """Return the model's head.

    Raises:
        ValidationError: it is a language model's.
    """
    if not isinstance(model.head, ClassifierHead):
        raise ValidationError(
            f"{model.base_name} is a language model: expected a classifier, or a classifier's adapter"
        )
    return model.head


def _exp(loss: float) -> float:
    # a loss of 710 nats and more has no finite exponential
    return math.exp(loss) if loss < math.log(np.finfo(np.float64).max) else math.inf
