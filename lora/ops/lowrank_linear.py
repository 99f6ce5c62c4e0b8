"""Linear layers that read one input, each with an optional trainable low-rank correction.

    y_p = x W_pᵀ + bias_p + scale_p · (x A_pᵀ) B_pᵀ        for every part p: q, k and v; gate and up; or one

W and bias are frozen unless a part is `trained`; A and B are trained. The A's of all parts form one product.

Contract: contracts/ops/lowrank_linear.yaml. Source: Hu et al. 2021, arXiv:2106.09685, eq. 3.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from lora.backend import Array, array_module, linear, linear_transpose, matmul, matmul_into, wide
from lora.errors import ShapeError


class Factors(NamedTuple):
    """The trained correction of one weight, scale · B A."""

    a: Array  # [R, I] PEFT's lora_A.weight
    b: Array  # [O, R] PEFT's lora_B.weight; zeros at the start of training
    scale: float  # alpha / R, or alpha / sqrt(R) under rsLoRA


class Part(NamedTuple):
    """One linear layer over the shared input."""

    weight: Array  # [O, I] stored dtype; rows are output features, as Hugging Face stores it
    bias: Array | None  # [O]
    factors: Factors | None
    trained: bool = False  # weight and bias get gradients of their own


class Saved(NamedTuple):
    """`low` is kept because it is R columns wide; x Wᵀ is not, because backward never reads it."""

    x: Array | None  # [N, I]; None where every part is plain and frozen, and only dx can be asked for
    lows: tuple[Array | None, ...]  # each [N, R_p] x A_pᵀ, accumulation dtype
    parts: tuple[Part, ...]
    dtype: Any  # of x


class PartGrads(NamedTuple):
    """Of one part, in the accumulation dtype; None for what it does not have or does not train."""

    a: Array | None  # [R, I]
    b: Array | None  # [O, R]
    weight: Array | None  # [O, I]
    bias: Array | None  # [O]


class Grads(NamedTuple):
    """`parts` in the order of the forward."""

    x: Array | None  # [N, I] dtype of x; None where it was not wanted
    parts: tuple[PartGrads, ...]


def forward(x: Array, parts: tuple[Part, ...]) -> tuple[tuple[Array, ...], Saved]:
    """Return the outputs [N, O_p] of every part in x's dtype, for `x` [N, I].

    Raises:
        ShapeError: the arrays of a part do not chain with x or with each other.
        DeviceError: they do not live in one library.
    """
    for index, part in enumerate(parts):
        check_chain(x, index, part)
    rows = wide(x)  # once for all parts
    lows = _lows(rows, parts)
    ys = []
    for part, low in zip(parts, lows, strict=True):
        y = linear(rows, part.weight)
        if part.bias is not None:
            y += wide(part.bias)
        if part.factors is not None and low is not None:
            matmul_into(y, low, part.factors.b.T, scale=part.factors.scale, accumulate=True)
        ys.append(y.astype(x.dtype, copy=False))
    keeps_x = any(part.factors is not None or part.trained for part in parts)
    return tuple(ys), Saved(x if keeps_x else None, lows, parts, x.dtype)


def backward(saved: Saved, dys: tuple[Array, ...], *, wants_x: bool = True) -> Grads:
    """Return the gradients for x and for what is trained, given `dys`, each [N, O_p].

    The gradient of a frozen weight is never formed. Without `wants_x`, neither is that of x: below the first
    trainable layer nobody reads it.
    """
    parts, dys = saved.parts, tuple(wide(dy) for dy in dys)
    dlows = tuple(
        matmul(dy, part.factors.b) * part.factors.scale if part.factors is not None else None
        for part, dy in zip(parts, dys, strict=True)
    )
    das = _da(saved, dlows)
    grads = tuple(
        _part_grads(saved.x, part, low, da, dy)
        for part, low, da, dy in zip(parts, saved.lows, das, dys, strict=True)
    )
    return Grads(_dx(saved, dys, dlows) if wants_x else None, grads)


def check_chain(x: Array, index: int, part: Part) -> None:
    """Check that the arrays of part `index` chain with x and with each other, and live in one library."""
    weight, bias, factors, _ = part
    arrays: tuple[Array | None, ...] = (x, weight, bias, *((factors.a, factors.b) if factors else ()))
    array_module(*arrays)
    chains = weight.shape[1:] == x.shape[1:] and (bias is None or bias.shape == weight.shape[:1])
    if factors is not None:
        a, b = factors.a, factors.b
        chains = chains and a.shape[1:] == x.shape[1:] and b.shape == (weight.shape[0], a.shape[0])
    if not chains:
        shapes = [None if array is None else list(array.shape) for array in arrays]
        raise ShapeError(
            f"part {index}: x [N, I], weight [O, I], bias [O], A [R, I], B [O, R] do not chain: {shapes}"
        )


def _lows(x: Array, parts: tuple[Part, ...]) -> tuple[Array | None, ...]:
    """Return x Aᵀ [N, R_p] of every part that has factors, as columns of one product."""
    factors = [part.factors for part in parts if part.factors is not None]
    if not factors:
        return (None,) * len(parts)
    low = matmul(x, stacked([f.a for f in factors]).T)
    return dealt(low.T, parts, transposed=True)


def _da(saved: Saved, dlows: tuple[Array | None, ...]) -> tuple[Array | None, ...]:
    """Return the gradient [R_p, I] of every A, as rows of one product."""
    present = [dlow for dlow in dlows if dlow is not None]
    if not present:
        return dlows
    return dealt(matmul(stacked(present, axis=1).T, saved.x), saved.parts)


def _dx(saved: Saved, dys: tuple[Array, ...], dlows: tuple[Array | None, ...]) -> Array:
    dx = linear_transpose(dys[0], saved.parts[0].weight)
    for part, dy in zip(saved.parts[1:], dys[1:], strict=True):
        linear_transpose(dy, part.weight, onto=dx)
    present = [dlow for dlow in dlows if dlow is not None]
    if present:
        a = stacked([part.factors.a for part in saved.parts if part.factors is not None])
        matmul_into(dx, stacked(present, axis=1), a, accumulate=True)
    return dx.astype(saved.dtype, copy=False)


def _part_grads(x: Array | None, part: Part, low: Array | None, da: Array | None, dy: Array) -> PartGrads:
    db = matmul(dy.T, low) * part.factors.scale if part.factors is not None and low is not None else None
    dweight = matmul(dy.T, x) if part.trained else None
    dbias = wide(dy).sum(axis=0) if part.trained and part.bias is not None else None
    return PartGrads(da, db, dweight, dbias)


def stacked(arrays: list[Array], axis: int = 0) -> Array:
    """Return `arrays` one behind the other along `axis`; a single one as it is."""
    return arrays[0] if len(arrays) == 1 else array_module(*arrays).concatenate(arrays, axis=axis)


def dealt(rows: Array, parts: tuple[Part, ...], *, transposed: bool = False) -> tuple[Array | None, ...]:
    """Cut `rows` [sum of R_p, ...] into the shares of the parts that have factors; None for the others."""
    shares: list[Array | None] = []
    start = 0
    for part in parts:
        stop = start + (part.factors.a.shape[0] if part.factors is not None else 0)
        share = rows[start:stop] if part.factors is not None else None
        shares.append(share.T if transposed and share is not None else share)
        start = stop
    return tuple(shares)
