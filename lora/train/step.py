"""One optimizer step: a token weighs the same in every micro-batch; what is not finite stops the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lora.backend import Array
from lora.data.packed import Packed
from lora.data.packing import micro_batches
from lora.errors import DataError, DivergedError
from lora.model.diagnosis import first_non_finite
from lora.model.model import Model
from lora.ops.adamw import joint_norm
from lora.train.optimizer import AdamW


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step saw."""

    loss: float  # per counted token, or per row (weighted by class weights), in nats
    correct: int  # counted tokens, or rows, that were predicted right
    counted: int  # tokens, or rows, that entered the loss
    tokens: int  # that went through the model
    gradient_norm: float  # before clipping, over all trained arrays


def train_step(
    model: Model,
    optimizer: AdamW,
    batches: Sequence[Packed],
    *,
    lr: float,
    clip: float,
    micro_tokens: int,
    packing: bool = True,
    class_weights: Array | None = None,
    label_smoothing: float = 0.0,
    before_move: Callable[[], None] = lambda: None,
) -> StepReport:
    """Add up the gradients of `batches`, clip their joint norm, and move the trained arrays once.

    Every share is divided by the whole step's count before it is added. Averaging the means of the batches
    instead would weigh a token of a short batch more than one of a long batch. For the same reason the rows
    may be run in any micro-batches that fit into memory without changing the result.

    Args:
        model: what is trained.
        optimizer: made for `model`.
        batches: the packed batches of this step (gradient accumulation: more than one).
        lr: this step's learning rate.
        clip: the largest joint norm of the gradients; 0 for no limit.
        micro_tokens: how many tokens are run at once, at most; a longer sequence runs alone.
        packing: False to run every row alone.
        class_weights: [C], a classifier's weight of each class.
        label_smoothing: the share of each target that is spread evenly over all classes or tokens.
        before_move: called once the gradients are whole, before the first array is moved.

    Raises:
        DataError: a batch holds no counted token.
        DivergedError: a loss or gradient is not finite; nothing was moved.
    """
    if any(batch.counted == 0 for batch in batches):
        raise DataError("a batch without one counted token: every label in it is masked")
    normalizer = sum(model.head.normalizer(batch, class_weights) for batch in batches)
    parts = micro_batches(batches, micro_tokens, packing=packing)
    loss, correct, total = 0.0, 0, dict[str, Array]()
    for batch in parts:
        result = model.step(
            batch, normalizer=normalizer, class_weights=class_weights, label_smoothing=label_smoothing
        )
        loss, correct = loss + result.loss, correct + result.correct
        _accumulate(total, result.gradients)
        if not math.isfinite(loss):
            raise DivergedError(
                f"the loss is {loss}: first {first_non_finite(model, batch, result.gradients)}"
            )
        del result  # or one more set of gradients would live through the next micro-batch
    before_move()
    try:
        norm = optimizer.step(total, lr, clip=clip)
    except DivergedError as error:
        # the last micro-batch may be sound: look at each one's own gradients
        where = _broken_micro_batch(model, parts, normalizer)
        raise DivergedError(f"a gradient is not finite: first {where}") from error
    counted, tokens = sum(b.counted for b in batches), sum(b.num_tokens for b in batches)
    return StepReport(loss, correct, counted, tokens, norm)


def _accumulate(total: dict[str, Array], gradients: dict[str, Array]) -> None:
    for name, gradient in gradients.items():
        if name in total:
            total[name] += gradient
        else:
            total[name] = gradient


def _broken_micro_batch(model: Model, parts: Sequence[Packed], normalizer: float) -> str:
    for batch in parts:
        gradients = model.step(batch, normalizer=normalizer).gradients
        if not math.isfinite(joint_norm(gradients.values())):
            return first_non_finite(model, batch, gradients)
    return "in the sum over the micro-batches of the step (each one alone is finite)"
