"""One step of Adam with decoupled weight decay, in PyTorch's form, after clipping the gradients together.

    g <- g · min(1, clip / ‖all g‖)                          ‖·‖ over every element of every gradient
    θ <- θ (1 - lr λ)        m <- β1 m + (1 - β1) g        v <- β2 v + (1 - β2) g²
    θ <- θ - lr / (1 - β1^t) · m / (sqrt(v) / sqrt(1 - β2^t) + eps)

Contract: contracts/ops/adamw.yaml. Source: Loshchilov & Hutter 2017, arXiv:1711.05101, algorithm 2, with the
learning rate inside the decay and eps outside the bias correction, as torch.optim.AdamW computes it;
clipping: Pascanu et al. 2013, arXiv:1211.5063, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lora.backend import Array, array_module, empty
from lora.errors import ShapeError

BLOCK = 2**16  # elements; four blocks of it and the scratch stay in a core's cache


class Scalars(NamedTuple):
    """What an element's update multiplies with, of one step."""

    keep: float  # 1 - lr λ
    beta1: float
    beta2: float
    eps: float
    step_size: float  # lr / (1 - β1^t)
    root_correction: float  # sqrt(1 - β2^t)


def step(
    parameters: Sequence[Array],
    gradients: Sequence[Array],
    moments: Sequence[tuple[Array, Array]],
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    clip: float = 0.0,
) -> float:
    """Move every parameter by one step, in place, with its moments; return the joint norm of the gradients.

    Works block by block: no temporary has the size of a parameter. Where the norm is not finite, nothing is
    moved.

    Args:
        parameters: float32 (float64 in tests), C-contiguous.
        gradients: one for each parameter, of its shape and dtype; they are only read.
        moments: (m, v) for each, the running means of g and g², zeros before the first step.
        step: number of this step, counted from 1.
        lr: learning rate.
        beta1: decay of m per step.
        beta2: decay of v per step.
        eps: added to the root of the corrected v, in the unit of a gradient.
        weight_decay: λ, the share of lr · parameter that is taken away; it never enters the moments.
        clip: the largest joint norm that the gradients enter with; 0 for no limit.

    Returns:
        The Euclidean norm over all elements of all gradients, before clipping.

    Raises:
        ShapeError: the arrays of a parameter differ in shape or dtype, or one is not C-contiguous.
    """
    check_layout(parameters, gradients, moments)
    norm = joint_norm(gradients)
    if not math.isfinite(norm):
        return norm
    factor = clip / norm if clip and norm > clip else 1.0
    scalars = scalars_of(step=step, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)
    for parameter, gradient, (m, v) in zip(parameters, gradients, moments, strict=True):
        _move(parameter, gradient, m, v, factor, scalars)
    return norm


def joint_norm(arrays: Iterable[Array]) -> float:
    """Return the Euclidean norm over all elements of all arrays."""
    return math.sqrt(sum(float(array_module(array).vdot(array, array)) for array in arrays))


def scalars_of(
    *, step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> Scalars:
    """Return the factors of step `step`, taken in float64."""
    return Scalars(1 - lr * weight_decay, beta1, beta2, eps, lr / (1 - beta1**step), (1 - beta2**step) ** 0.5)


def check_layout(
    parameters: Sequence[Array], gradients: Sequence[Array], moments: Sequence[tuple[Array, Array]]
) -> None:
    """Refuse what `step` says it refuses, whatever implements it."""
    for parameter, gradient, (m, v) in zip(parameters, gradients, moments, strict=True):
        array_module(parameter, gradient, m, v)
        for array in (parameter, gradient, m, v):
            if _form(array) != _form(parameter) or not array.flags.c_contiguous:
                raise ShapeError(
                    f"parameter, gradient, m and v must be alike and C-contiguous: the parameter is "
                    f"{parameter.dtype} {list(parameter.shape)}, found {array.dtype} {list(array.shape)}, "
                    f"{'contiguous' if array.flags.c_contiguous else 'not contiguous'}"
                )


def _form(array: Array) -> tuple[object, ...]:
    return array.dtype, array.shape


def _move(parameter: Array, gradient: Array, m: Array, v: Array, factor: float, scalars: Scalars) -> None:
    xp = array_module(parameter)
    size = min(BLOCK, parameter.size)
    scratch, clipped = (empty((size,), parameter.dtype, like=parameter) for _ in range(2))
    for start in range(0, parameter.size, BLOCK):
        block = slice(start, start + BLOCK)
        p, g, mean, square = (array.reshape(-1)[block] for array in (parameter, gradient, m, v))
        share = scratch[: p.size]
        if factor != 1:
            g = xp.multiply(g, factor, out=clipped[: p.size])
        p *= scalars.keep
        mean *= scalars.beta1
        mean += xp.multiply(g, 1 - scalars.beta1, out=share)
        square *= scalars.beta2
        square += xp.multiply(xp.multiply(g, 1 - scalars.beta2, out=share), g, out=share)
        xp.sqrt(square, out=share)
        share /= scalars.root_correction
        share += scalars.eps
        xp.divide(mean, share, out=share)
        share *= scalars.step_size
        p -= share
