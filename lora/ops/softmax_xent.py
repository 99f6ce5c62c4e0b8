"""The head and its loss in one: logits, softmax and cross-entropy in chunks of rows, with the gradient.

    logits_n = W h_n + bias        loss = Σ_n w_n (log Σ_v exp(logits_nv) - logits_n,target) / normalizer

over the rows whose target is not -100. Those rows alone are read: the others are dropped before the product.
Label smoothing ε trains towards (1 - ε) onehot + ε / V in the place of onehot: (1 - ε) logits_n,target +
ε mean_v logits_nv stands in the place of logits_n,target.
The logits of a chunk become their own gradient in place, and are gone when the next chunk begins.

Contract: contracts/ops/softmax_xent.yaml. Source: Bridle 1990, "Probabilistic interpretation of feedforward
classification network outputs"; head and loss fused: Hsu et al. 2024, arXiv:2410.10989; label smoothing:
Szegedy et al. 2016, arXiv:1512.00567, section 7.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import NamedTuple

from lora.backend import Array, accumulation_dtype, array_module, linear, linear_transpose, matmul, wide
from lora.errors import DataError, ShapeError, UsageError

IGNORED = -100  # the target of a row that counts for nothing, as Transformers writes it
CHUNK_BYTES = 320 * 2**20  # of logits: about 550 rows of Qwen2.5's vocabulary in float32


class Outcome(NamedTuple):
    """What a step reports."""

    loss: float  # in nats, weighted and divided by the normalizer
    correct: int  # counted rows whose largest logit is the target's


class Grads(NamedTuple):
    """Zero in the rows that do not count."""

    hidden: Array  # [N, D] dtype of hidden
    weight: Array | None  # [V, D] accumulation dtype; None where the head is frozen
    bias: Array | None  # [V] accumulation dtype; None where the head is frozen or has none


class Saved(NamedTuple):
    """The gradients themselves: they fall out of the forward, while the logits are there."""

    grads: Grads | None


class Softmax(NamedTuple):
    """Of each row; the logits have become their own gradient, times `total`."""

    loss: Array  # [N] accumulation dtype
    best: Array  # [N] the likeliest class
    total: Array  # [N] sum of the odds, those of `best` being 1


class Head(NamedTuple):
    """What makes the logits."""

    weight: Array  # [V, D]
    bias: Array | None  # [V]


def forward(
    hidden: Array,
    weight: Array,
    targets: Array,
    bias: Array | None = None,
    row_weights: Array | None = None,
    *,
    normalizer: float,
    label_smoothing: float = 0.0,
    wants_gradient: bool = True,
    wants_weight: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Outcome, Saved]:
    """Return the loss, the number of correct rows, and what backward hands out.

    Args:
        hidden: [N, D] input of the head, one row per token or per sequence.
        weight: [V, D] the head, stored dtype.
        targets: [N] integers in [0, V), or -100 for a row that does not count.
        bias: [V] or None.
        row_weights: [N] weight of each row in the sum, or None for ones.
        normalizer: divides the sum: the counted rows of the optimizer step, or the sum of their weights.
        label_smoothing: ε in [0, 1): the share of each target that is spread evenly over all V.
        wants_gradient: False in evaluation: one product instead of two.
        wants_weight: also the gradients of weight and bias, for a head that is trained.
        chunk_bytes: upper limit of the logits that exist at once, though never less than one row.

    Raises:
        ShapeError: the arrays do not fit.
        DataError: a target is outside [0, V), or the normalizer is not positive.
        UsageError: the label smoothing is outside [0, 1).
    """
    return forward_by(
        softmax_rows,
        hidden,
        weight,
        targets,
        bias,
        row_weights,
        normalizer=normalizer,
        label_smoothing=label_smoothing,
        wants_gradient=wants_gradient,
        wants_weight=wants_weight,
        chunk_bytes=chunk_bytes,
    )


def forward_by(
    softmax: Callable[..., Softmax],
    hidden: Array,
    weight: Array,
    targets: Array,
    bias: Array | None,
    row_weights: Array | None,
    *,
    normalizer: float,
    label_smoothing: float,
    wants_gradient: bool,
    wants_weight: bool,
    chunk_bytes: int,
) -> tuple[Outcome, Saved]:
    """Run `forward` with `softmax` in the place of `softmax_rows`, whose arguments and results it has."""
    xp = array_module(hidden, weight, targets, bias, row_weights)
    head, counted = Head(weight, bias), xp.flatnonzero(targets != IGNORED)
    check_arguments(hidden, head, targets, row_weights, normalizer, label_smoothing)
    grads = zero_grads(hidden, head, wants_weight) if wants_gradient else None
    dtype = accumulation_dtype(hidden.dtype)
    step = chunk_rows(counted.size, weight.shape[0] * dtype.itemsize, chunk_bytes)
    loss, correct = 0.0, 0
    for start in range(0, counted.size, step):
        rows = counted[start : start + step]
        shares = xp.ones(rows.size, dtype) if row_weights is None else row_weights[rows].astype(dtype)
        shares /= normalizer
        inputs, aims = hidden[rows], targets[rows]
        logits = _logits(inputs, head)
        found = softmax(logits, aims, label_smoothing, wants_gradient=wants_gradient)
        loss += float((shares * found.loss).sum(dtype="float64"))
        correct += int((found.best == aims).sum())
        if grads is not None:
            _add_gradients(grads, rows, inputs, logits, head, shares / found.total)
        del logits  # or the next chunk would be made beside it
    return Outcome(loss, correct), Saved(grads)


def chunk_rows(rows: int, row_bytes: int, chunk_bytes: int) -> int:
    """Return how many of `rows` rows of logits make a chunk: as few chunks as fit, none much shorter.

    The head is read once a chunk, and memory of one size is used again from chunk to chunk.
    """
    most = max(1, chunk_bytes // row_bytes)
    return max(1, ceil(rows / ceil(max(1, rows) / most)))


def backward(saved: Saved) -> Grads:
    """Return the gradients of the loss.

    Raises:
        UsageError: the forward was told that none are wanted.
    """
    if saved.grads is None:
        raise UsageError("softmax_xent.forward ran with wants_gradient=False: there is no gradient to return")
    return saved.grads


def check_arguments(
    hidden: Array,
    head: Head,
    targets: Array,
    row_weights: Array | None,
    normalizer: float,
    label_smoothing: float,
) -> None:
    """Refuse what `forward` says it refuses, whatever implements it."""
    if not normalizer > 0:
        raise DataError(f"the normalizer counts the rows of the step and must be positive; got {normalizer}")
    if not 0 <= label_smoothing < 1:
        raise UsageError(f"label_smoothing: expected a share in [0, 1), found {label_smoothing}")
    _check_shapes(hidden, head, targets, row_weights)
    _check_targets(targets[targets != IGNORED], head.weight.shape[0])


def _check_shapes(hidden: Array, head: Head, targets: Array, row_weights: Array | None) -> None:
    rows, classes = hidden.shape[:1], head.weight.shape[:1]
    fits = hidden.shape[1:] == head.weight.shape[1:] and targets.shape == rows
    fits = fits and (head.bias is None or head.bias.shape == classes)
    if not (fits and (row_weights is None or row_weights.shape == rows)):
        arrays = (hidden, *head, targets, row_weights)
        found = [None if array is None else list(array.shape) for array in arrays]
        raise ShapeError(
            f"hidden [N, D], weight [V, D], bias [V], targets [N] and row_weights [N] do not fit: {found}"
        )


def _check_targets(targets: Array, classes: int) -> None:
    # a negative index would read from the end of the row and train the wrong class
    if targets.size and not 0 <= int(targets.min()) <= int(targets.max()) < classes:
        raise DataError(
            f"targets must lie in [0, {classes}) or be {IGNORED}; "
            f"found {int(targets.min())} to {int(targets.max())}"
        )


def zero_grads(hidden: Array, head: Head, wants_weight: bool) -> Grads:
    """Return the gradients before any chunk has added to them."""
    xp, dtype = array_module(hidden), accumulation_dtype(hidden.dtype)
    dweight = xp.zeros(head.weight.shape, dtype) if wants_weight else None
    dbias = xp.zeros(head.weight.shape[0], dtype) if wants_weight and head.bias is not None else None
    return Grads(xp.zeros(hidden.shape, hidden.dtype), dweight, dbias)


def softmax_rows(logits: Array, targets: Array, smoothing: float, *, wants_gradient: bool) -> Softmax:
    """Return the softmax of rows of `logits` [N, V], each for itself; the logits are written over."""
    xp, each = array_module(logits), array_module(logits).arange(targets.size)
    best = logits.argmax(axis=1)
    logits -= logits[each, best][:, None]
    aim = logits[each, targets]  # the logits' mean under what the row is trained towards
    if smoothing:
        aim = (1 - smoothing) * aim + smoothing * logits.mean(axis=1)
    odds = xp.exp(logits, out=logits)
    total = odds.sum(axis=1)
    if wants_gradient:
        # p - onehot is (odds - total · onehot) / total: the division waits for the narrower arrays
        odds[each, targets] -= (1 - smoothing) * total
        if smoothing:
            odds -= (smoothing / odds.shape[1] * total)[:, None]
    return Softmax(xp.log(total) - aim, best, total)


def _logits(inputs: Array, head: Head) -> Array:
    logits = linear(inputs, head.weight)
    if head.bias is not None:
        logits += wide(head.bias)
    return logits


def _add_gradients(
    grads: Grads, rows: Array, inputs: Array, dlogits: Array, head: Head, scale: Array
) -> None:
    dhidden = linear_transpose(dlogits, head.weight)
    dhidden *= scale[:, None]
    grads.hidden[rows] = dhidden.astype(grads.hidden.dtype, copy=False)
    if grads.bias is not None:
        grads.bias[...] += matmul(scale, dlogits)
    if grads.weight is None:
        return
    inputs = wide(inputs) * scale[:, None]
    # blocks of classes: the product for all of them would be a second array of the weight's size
    step = max(1, grads.hidden.size // inputs.shape[1])
    for start in range(0, grads.weight.shape[0], step):
        block = slice(start, start + step)
        grads.weight[block] += matmul(dlogits[:, block].T, inputs)
