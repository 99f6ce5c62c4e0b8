"""What turns hidden states into logits and losses: a language model's head, or pooling and a classifier's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lora.backend import Array, linear, wide
from lora.data.packed import IGNORED, Packed
from lora.dispatch import Ops
from lora.errors import UsageError
from lora.model.context import Gradients
from lora.model.decoder import EMBEDDING
from lora.model.parameters import Parameters

Pooling = Literal["mean", "last"]
ProblemType = Literal["single_label_classification", "multi_label_classification"]  # Transformers' names
SINGLE_LABEL: ProblemType = "single_label_classification"
MULTI_LABEL: ProblemType = "multi_label_classification"
MOST_WORTH_CUTTING = 7 / 8  # of the tokens: of more, too little would be left out to gather them for


@dataclass(frozen=True)
class CausalHead:
    """Next-token logits and loss; the weight is the embedding's where the family ties them."""

    @staticmethod
    def logits(ops: Ops, parameters: Parameters, hidden: Array, batch: Packed) -> Array:
        """Return [N, V] in hidden's accumulation dtype, for hidden states [N, D]."""
        return linear(hidden, parameters[_language_head(parameters)])

    @staticmethod
    def reads(batch: Packed) -> np.ndarray | None:
        """Return the places [R] of the tokens that the loss reads; None for all or nearly all."""
        if batch.targets is None or not 0 < batch.counted <= MOST_WORTH_CUTTING * batch.num_tokens:
            return None
        return np.flatnonzero(batch.targets != IGNORED)

    @staticmethod
    def normalizer(batch: Packed, class_weights: Array | None) -> float:
        """Return the number of counted tokens."""
        return float(batch.counted)

    @staticmethod
    def score(
        ops: Ops, parameters: Parameters, hidden: Array, batch: Packed, *, class_weights: Array | None
    ) -> Any:
        """Return the Outcome of `batch` without gradients: the summed loss, and how many were right."""
        weight = parameters[_language_head(parameters)]
        return ops.softmax_xent.forward(hidden, weight, batch.targets, normalizer=1.0, wants_gradient=False)[
            0
        ]

    @staticmethod
    def loss(
        ops: Ops,
        hidden: Array,
        batch: Packed,
        gradients: Gradients,
        *,
        normalizer: float,
        class_weights: Array | None,
        label_smoothing: float,
    ) -> tuple[Any, Array]:
        """Return (Outcome, dhidden [N, D]); a trained head adds its gradient to `gradients`."""
        name = _language_head(gradients.parameters)
        wants = gradients.parameters.is_trained(name)
        outcome, saved = ops.softmax_xent.forward(
            hidden,
            gradients.parameters[name],
            batch.targets,
            normalizer=normalizer,
            label_smoothing=label_smoothing,
            wants_weight=wants,
        )
        grads = ops.softmax_xent.backward(saved)
        if wants:
            gradients.add(gradients.parameters.gradient_name(name), grads.weight)
        return outcome, grads.hidden


@dataclass(frozen=True)
class ClassifierHead:
    """A pooled row per sequence, and a linear layer over it; class names in the order of the logits.

    A row has one class, by the softmax of its logits; or any number of labels, each by its own sigmoid.
    """

    pooling: Pooling
    class_names: tuple[str, ...]
    problem_type: ProblemType = SINGLE_LABEL

    @property
    def is_multi_label(self) -> bool:
        """Whether a row has any number of labels."""
        return self.problem_type == MULTI_LABEL

    def logits(self, ops: Ops, parameters: Parameters, hidden: Array, batch: Packed) -> Array:
        """Return [S, C] in hidden's accumulation dtype, for hidden states [N, D] of S sequences."""
        pooled, _ = ops.pool.forward(hidden, batch.cu_seqlens, kind=self.pooling)
        logits = linear(pooled, parameters["score.weight"])
        return logits + wide(parameters["score.bias"]) if "score.bias" in parameters else logits

    def reads(self, batch: Packed) -> np.ndarray | None:
        """Return the places [R] of the tokens that are pooled; None for all."""
        return batch.cu_seqlens[1:] - 1 if self.pooling == "last" else None

    def normalizer(self, batch: Packed, class_weights: Array | None) -> float:
        """Return the number of rows, or with class weights the sum of the rows' weights.

        With several labels it is rows times labels: the loss is the mean over both, as in Transformers.
        """
        if self.is_multi_label:
            return float(batch.counted * len(self.class_names))
        return float(batch.counted if class_weights is None else class_weights[batch.targets].sum())

    def score(
        self, ops: Ops, parameters: Parameters, hidden: Array, batch: Packed, *, class_weights: Array | None
    ) -> Any:
        """Return the Outcome of `batch` without gradients: the summed loss, and how many were right."""
        pooled, _ = ops.pool.forward(hidden, batch.cu_seqlens, kind=self.pooling)
        if self.is_multi_label:
            _refuse_for_labels(class_weights=class_weights)
            arrays = _labelled_arrays(parameters, batch)
            return ops.sigmoid_bce.forward(pooled, *arrays, normalizer=1.0, wants_gradient=False)[0]
        arrays = _classifier_arrays(parameters, batch, class_weights)
        return ops.softmax_xent.forward(pooled, *arrays, normalizer=1.0, wants_gradient=False)[0]

    def loss(
        self,
        ops: Ops,
        hidden: Array,
        batch: Packed,
        gradients: Gradients,
        *,
        normalizer: float,
        class_weights: Array | None,
        label_smoothing: float,
    ) -> tuple[Any, Array]:
        """Return (Outcome, dhidden [N, D]); add the head's gradients to `gradients`."""
        parameters = gradients.parameters
        pooled, pool_saved = ops.pool.forward(hidden, batch.cu_seqlens, kind=self.pooling)
        if self.is_multi_label:
            _refuse_for_labels(class_weights=class_weights, label_smoothing=label_smoothing or None)
            op, arrays, more = ops.sigmoid_bce, _labelled_arrays(parameters, batch), {}
        else:
            op, arrays = ops.softmax_xent, _classifier_arrays(parameters, batch, class_weights)
            more = {"label_smoothing": label_smoothing}
        outcome, saved = op.forward(pooled, *arrays, normalizer=normalizer, wants_weight=True, **more)
        grads = op.backward(saved)
        gradients.add(parameters.gradient_name("score.weight"), grads.weight)
        if grads.bias is not None:
            gradients.add(parameters.gradient_name("score.bias"), grads.bias)
        return outcome, ops.pool.backward(pool_saved, grads.hidden).x


Head = CausalHead | ClassifierHead


def _classifier_arrays(parameters: Parameters, batch: Packed, class_weights: Array | None) -> tuple[Any, ...]:
    """Return softmax_xent's (weight, targets, bias, row_weights)."""
    bias = parameters.get("score.bias")
    row_weights = None if class_weights is None else np.asarray(class_weights)[batch.targets]
    return parameters["score.weight"], batch.targets, bias, row_weights


def _labelled_arrays(parameters: Parameters, batch: Packed) -> tuple[Any, ...]:
    """Return sigmoid_bce's (weight, targets, bias)."""
    return parameters["score.weight"], batch.targets, parameters.get("score.bias")


def _refuse_for_labels(**settings: Any) -> None:
    named = [name for name, value in settings.items() if value is not None]
    if named:
        raise UsageError(f"{', '.join(named)}: rows with several labels are trained without")


def _language_head(parameters: Parameters) -> str:
    return "lm_head.weight" if "lm_head.weight" in parameters else EMBEDDING
