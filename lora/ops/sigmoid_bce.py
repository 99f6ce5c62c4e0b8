"""A head of independent yes-or-no outputs and its loss in one, with the gradient.

    z_n = W h_n + bias        loss = Σ_nc log(1 + exp((1 - 2 y_nc) z_nc)) / normalizer

The binary cross-entropy of sigmoid(z_nc) and y_nc, 0 or 1: each label of a row is judged for itself. With the
sign s = 1 - 2 y inside the exponent nothing cancels: the loss of an output that is sure and right is small to
full relative precision, and so is its gradient, dz = s sigmoid(s z) / normalizer.

Contract: contracts/ops/sigmoid_bce.yaml. Source: Cox 1958, "The regression analysis of binary sequences",
J. R. Stat. Soc. B 20; the mean over rows and labels is that of Transformers' multi_label_classification.
"""

from __future__ import annotations

from typing import NamedTuple

from lora.backend import Array, array_module, linear, linear_transpose, matmul, wide
from lora.errors import DataError, ShapeError, UsageError
from lora.ops._logistic import sigmoid, softplus


class Outcome(NamedTuple):
    """What a step reports."""

    loss: float  # in nats, divided by the normalizer
    correct: int  # rows of which every label is right: its logit is above 0 where the target is 1


class Grads(NamedTuple):
    """Of the loss."""

    hidden: Array  # [N, D] dtype of hidden
    weight: Array | None  # [C, D] accumulation dtype; None where the head is frozen
    bias: Array | None  # [C] accumulation dtype; None where the head is frozen or has none


class Saved(NamedTuple):
    """The gradients themselves: they fall out of the forward, while the logits are there."""

    grads: Grads | None


def forward(
    hidden: Array,
    weight: Array,
    targets: Array,
    bias: Array | None = None,
    *,
    normalizer: float,
    wants_gradient: bool = True,
    wants_weight: bool = False,
) -> tuple[Outcome, Saved]:
    """Return the loss, the number of correct rows, and what backward hands out.

    Args:
        hidden: [N, D] input of the head, one row per sequence.
        weight: [C, D] the head, stored dtype.
        targets: [N, C] integers or booleans, 1 where the label belongs to the row, else 0.
        bias: [C] or None.
        normalizer: divides the sum: rows times labels of the optimizer step, for the mean over both.
        wants_gradient: False in evaluation.
        wants_weight: also the gradients of weight and bias, for a head that is trained.

    Raises:
        ShapeError: the arrays do not fit.
        DataError: a target is neither 0 nor 1, or the normalizer is not positive.
    """
    _check(hidden, weight, targets, bias, normalizer)
    logits = linear(hidden, weight)
    if bias is not None:
        logits += wide(bias)
    signs = (1 - 2 * targets.astype("int8")).astype(logits.dtype)
    correct = int(((logits > 0) == (targets != 0)).all(axis=1).sum())
    signed = signs * logits
    loss = float(softplus(signed).sum(dtype="float64")) / normalizer
    if not wants_gradient:
        return Outcome(loss, correct), Saved(None)
    dlogits = sigmoid(signed)
    dlogits *= signs
    dlogits /= normalizer
    return Outcome(loss, correct), Saved(_gradients(dlogits, hidden, weight, bias, wants_weight=wants_weight))


def backward(saved: Saved) -> Grads:
    """Return the gradients of the loss.

    Raises:
        UsageError: the forward was told that none are wanted.
    """
    if saved.grads is None:
        raise UsageError("sigmoid_bce.forward ran with wants_gradient=False: there is no gradient to return")
    return saved.grads


def _gradients(
    dlogits: Array, hidden: Array, weight: Array, bias: Array | None, *, wants_weight: bool
) -> Grads:
    dhidden = linear_transpose(dlogits, weight).astype(hidden.dtype, copy=False)
    if not wants_weight:
        return Grads(dhidden, None, None)
    dbias = None if bias is None else dlogits.sum(axis=0)
    return Grads(dhidden, matmul(dlogits.T, hidden), dbias)


def _check(hidden: Array, weight: Array, targets: Array, bias: Array | None, normalizer: float) -> None:
    if not normalizer > 0:
        raise DataError(f"the normalizer counts rows times labels and must be positive; got {normalizer}")
    rows, labels = hidden.shape[:1], weight.shape[:1]
    fits = hidden.shape[1:] == weight.shape[1:] and targets.shape == (*rows, *labels)
    if not (fits and (bias is None or bias.shape == labels)):
        found = [None if array is None else list(array.shape) for array in (hidden, weight, targets, bias)]
        raise ShapeError(f"hidden [N, D], weight [C, D], targets [N, C] and bias [C] do not fit: {found}")
    # any other number would turn the sign of a logit, or scale it, in silence
    if not array_module(targets).isin(targets, (0, 1)).all():
        raise DataError(f"targets must be 0 or 1; found {targets.min()} to {targets.max()}")
