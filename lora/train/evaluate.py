"""How well a model does on rows that it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora.backend import to_host
from lora.data.packed import pack, split
from lora.data.tokenizer import Tokenizer
from lora.errors import ValidationError
from lora.model.head import ClassifierHead
from lora.model.model import Model
from lora.train.classification_metrics import ClassificationMetrics, metrics_from_probabilities, softmax
from lora.train.examples import Examples, read_data, tokenise
from lora.train.loop import evaluate_loss

TOKENS_AT_ONCE = 4096  # without a backward pass, only one block's activations live at a time


@dataclass(frozen=True)
class CausalMetrics:
    """A language model's scores on the rows of a file."""

    rows: int
    tokens: int  # that were predicted: all but the first of each row
    loss: float  # per token, in nats
    perplexity: float  # exp(loss)
    token_accuracy: float  # share of tokens that were the most likely one

    def as_dict(self) -> dict[str, Any]:
        """Return the scores as JSON values, under the names of the fields."""
        return asdict(self)


def read_examples_for(model: Model, path: Path, max_seq_len: int) -> Examples:
    """Read a file as `model` needs it: a classifier's labels by its own class names, a causal model's texts.

    Raises:
        MissingFileError: there is no such file.
        DataError: rows are bad, or hold a class that the model does not know.
    """
    names = model.head.class_names if isinstance(model.head, ClassifierHead) else None
    data = read_data(path, "causal" if names is None else "classify", class_names=names)
    return tokenise(data, Tokenizer.load(model.checkpoint.folder), max_seq_len)


def evaluate(
    model: Model, examples: Examples, *, batch_size: int = 32
) -> ClassificationMetrics | CausalMetrics:
    """Return the scores of `model` on `examples`, which hold a label each if it is a classifier.

    Args:
        model: with its adapter, if any, active.
        examples: from `read_examples_for`.
        batch_size: rows that are run together, at most.

    Raises:
        ValidationError: the model gives a logit that is not finite.
    """
    if isinstance(model.head, ClassifierHead):
        p = class_probabilities(model, examples.sequences, batch_size=batch_size)
        return metrics_from_probabilities(p, examples.labels, model.head.class_names)
    loss, accuracy = evaluate_loss(model, examples, batch_size, TOKENS_AT_ONCE)
    tokens = examples.tokens - len(examples)
    return CausalMetrics(len(examples), tokens, loss, _exp(loss), accuracy)


def class_probabilities(model: Model, sequences: Sequence[np.ndarray], *, batch_size: int = 32) -> np.ndarray:
    """Return the probability of each class for each token sequence, [n, C] float64.

    Raises:
        ValidationError: the model is no classifier, or gives a logit that is not finite.
    """
    if not isinstance(model.head, ClassifierHead):
        raise ValidationError(f"{model.base_name} is a language model: expected a classifier or its adapter")
    batches = (pack(sequences[first : first + batch_size]) for first in range(0, len(sequences), batch_size))
    parts = (
        part for batch in batches for part in split(batch, max(TOKENS_AT_ONCE, int(batch.lengths.max())))
    )
    return softmax(np.concatenate([to_host(model.packed_logits(part)) for part in parts]))


def _exp(loss: float) -> float:
    # a loss of 710 nats and more has no finite exponential
    return math.exp(loss) if loss < math.log(np.finfo(np.float64).max) else math.inf
