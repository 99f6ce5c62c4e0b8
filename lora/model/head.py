"""What turns hidden states into logits and losses: a language model's head, or pooling and a classifier's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lora.backend import Array, linear, wide
from lora.data.packed import Packed
from lora.dispatch import Ops
from lora.model.context import Gradients
from lora.model.decoder import EMBEDDING
from lora.model.parameters import Parameters

Pooling = Literal["mean", "last"]


@dataclass(frozen=True)
class CausalHead:
    """Next-token logits and loss; the weight is the embedding's where the family ties them."""

    @staticmethod
    def logits(ops: Ops, parameters: Parameters, hidden: Array, batch: Packed) -> Array:
        """Return [N, V] in hidden's accumulation dtype, for hidden states [N, D]."""
        return linear(hidden, parameters[_language_head(parameters)])

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
    """A pooled row per sequence, and a linear layer over it; class names in the order of the logits."""

    pooling: Pooling
    class_names: tuple[str, ...]

    def logits(self, ops: Ops, parameters: Parameters, hidden: Array, batch: Packed) -> Array:
        """Return [S, C] in hidden's accumulation dtype, for hidden states [N, D] of S sequences."""
        pooled, _ = ops.pool.forward(hidden, batch.cu_seqlens, kind=self.pooling)
        logits = linear(pooled, parameters["score.weight"])
        return logits + wide(parameters["score.bias"]) if "score.bias" in parameters else logits

    def normalizer(self, batch: Packed, class_weights: Array | None) -> float:
        """Return the number of rows, or with class weights the sum of the rows' weights."""
        return float(batch.counted if class_weights is None else class_weights[batch.targets].sum())

    def score(
        self, ops: Ops, parameters: Parameters, hidden: Array, batch: Packed, *, class_weights: Array | None
    ) -> Any:
        """Return the Outcome of `batch` without gradients: the summed loss, and how many were right."""
        pooled, _ = ops.pool.forward(hidden, batch.cu_seqlens, kind=self.pooling)
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
        arrays = _classifier_arrays(parameters, batch, class_weights)
        outcome, saved = ops.softmax_xent.forward(
            pooled, *arrays, normalizer=normalizer, label_smoothing=label_smoothing, wants_weight=True
        )
        grads = ops.softmax_xent.backward(saved)
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


def _language_head(parameters: Parameters) -> str:
    return "lm_head.weight" if "lm_head.weight" in parameters else EMBEDDING
