"""One step of Adam with decoupled weight decay, in PyTorch's form.

    θ <- θ (1 - lr λ)        m <- β1 m + (1 - β1) g        v <- β2 v + (1 - β2) g²
    θ <- θ - lr / (1 - β1^t) · m / (sqrt(v) / sqrt(1 - β2^t) + eps)

Contract: contracts/ops/adamw.yaml. Source: Loshchilov & Hutter 2017, arXiv:1711.05101, algorithm 2, with the
learning rate inside the decay and eps outside the bias correction, as torch.optim.AdamW computes it.
"""

from __future__ import annotations

from lora.backend import Array, array_module, empty
from lora.errors import ShapeError

BLOCK = 2**16  # elements; four blocks of it and the scratch stay in a core's cache


def update(
    param: Array,
    grad: Array,
    m: Array,
    v: Array,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Move `param` by one step, in place, with its moments `m` and `v`; `grad` is only read.

    Works block by block: no temporary has the size of the parameter.

    Args:
        param: float32 (float64 in tests), C-contiguous.
        grad: of the same shape and dtype.
        m: running mean of grad, zeros before the first step.
        v: running mean of grad², zeros before the first step.
        step: number of this step, counted from 1.
        lr: learning rate.
        beta1: decay of m per step.
        beta2: decay of v per step.
        eps: added to the root of the corrected v, in the unit of grad.
        weight_decay: λ, the share of lr · param that is taken away; it never enters the moments.

    Raises:
        ShapeError: the arrays differ in shape or dtype, or one is not C-contiguous.
    """
    xp = array_module(param, grad, m, v)
    _check_layout(param, grad, m, v)
    step_size, root_correction = lr / (1 - beta1**step), (1 - beta2**step) ** 0.5
    scratch = empty((min(BLOCK, param.size),), param.dtype, like=param)
    for start in range(0, param.size, BLOCK):
        block = slice(start, start + BLOCK)
        p, g, mean, square = (array.reshape(-1)[block] for array in (param, grad, m, v))
        share = scratch[: p.size]
        p *= 1 - lr * weight_decay
        mean *= beta1
        mean += xp.multiply(g, 1 - beta1, out=share)
        square *= beta2
        square += xp.multiply(xp.multiply(g, 1 - beta2, out=share), g, out=share)
        xp.sqrt(square, out=share)
        share /= root_correction
        share += eps
        xp.divide(mean, share, out=share)
        share *= step_size
        p -= share


def _check_layout(param: Array, *others: Array) -> None:
    for array in (param, *others):
        if array.shape != param.shape or array.dtype != param.dtype or not array.flags.c_contiguous:
            raise ShapeError(
                f"param, grad, m and v must be alike and C-contiguous: param is {param.dtype} "
                f"{list(param.shape)}, found {array.dtype} {list(array.shape)}, "
                f"{'contiguous' if array.flags.c_contiguous else 'not contiguous'}"
            )
