"""A short causal convolution of every channel with its own taps, then silu, over packed sequences.

    y_n = silu(Σ_j w_j x_{n-J+1+j})        j = 0 ... J-1, channel by channel, with zeros before each sequence

Contract: contracts/ops/causal_conv1d.yaml. Source: Gu & Dao 2023, arXiv:2312.00752.
"""

from __future__ import annotations

from typing import NamedTuple

from lora.backend import Array, array_module, wide
from lora.errors import ShapeError
from lora.ops._logistic import sigmoid


class Saved(NamedTuple):
    """What silu was applied to is J multiplications away from `padded`, and is not kept."""

    padded: Array  # [N + S (J-1), D] the J-1 rows before each sequence, then its own; dtype of x
    slots: Array  # [N] the place of each token in it
    weight: Array  # [D, 1, J]


class Grads(NamedTuple):
    """The weight is frozen unless asked for; the window before a sequence serves generation, not training."""

    x: Array  # [N, D] dtype of x
    weight: Array | None  # [D, 1, J] accumulation dtype


def forward(
    x: Array, weight: Array, cu_seqlens: Array, window: Array | None = None
) -> tuple[tuple[Array, Array], Saved]:
    """Return ((y, window), Saved): y [N, D] in x's dtype, and the last J-1 rows [S, J-1, D] of each sequence.

    Args:
        x: [N, D] channels of every token.
        weight: [D, 1, J] taps, the last one for the token itself, as torch's Conv1d stores them.
        cu_seqlens: [S+1] integer boundaries of the sequences, from 0 to N.
        window: [S, J-1, D] the rows before each sequence, or None for zeros.

    Raises:
        ShapeError: the arrays do not fit.
    """
    xp = array_module(x, weight, cu_seqlens, window)
    before, sequences = weight.shape[-1] - 1, cu_seqlens.size - 1
    check_shapes(x, weight, cu_seqlens, window)
    starts = cu_seqlens[:-1] + xp.arange(sequences) * before
    slots = xp.arange(x.shape[0]) + xp.repeat(xp.arange(1, sequences + 1) * before, xp.diff(cu_seqlens))
    padded = xp.zeros((x.shape[0] + sequences * before, x.shape[1]), x.dtype)
    padded[slots] = x
    if window is not None:
        padded[starts[:, None] + xp.arange(before)] = window
    saved = Saved(padded, slots, weight)
    mixed = _mixed(saved)
    mixed *= sigmoid(mixed)
    ends = cu_seqlens[1:] + xp.arange(1, sequences + 1) * before
    last = padded[ends[:, None] + xp.arange(-before, 0)]
    return (mixed.astype(x.dtype, copy=False), last), saved


def backward(saved: Saved, dy: Array, *, wants_weight: bool = False) -> Grads:
    """Return the gradients, given `dy` [N, D]."""
    padded, slots, weight = saved
    xp, taps = array_module(padded, dy), weight.shape[-1]
    mixed = _mixed(saved)
    open_ = sigmoid(mixed)
    # silu'(m) = sigmoid(m) (1 + m (1 - sigmoid(m)))
    mixed *= 1 - open_
    mixed += 1
    mixed *= open_
    mixed *= wide(dy)
    # at the places of `padded`, with J-1 rows of zeros behind: nothing flows into or out of a window
    rows, before = padded.shape[0], taps - 1
    dmixed = xp.zeros((rows + before, padded.shape[1]), mixed.dtype)
    dmixed[slots] = mixed
    by_tap = wide(weight[:, 0]).T  # [J, D]
    dpadded = by_tap[before] * dmixed[:rows]
    for j in range(before):
        dpadded += by_tap[j] * dmixed[before - j : before - j + rows]
    dweight = None
    if wants_weight:
        shares = [(mixed * wide(padded[slots - before + j])).sum(axis=0) for j in range(taps)]
        dweight = xp.stack(shares, axis=-1)[:, None]
    return Grads(dpadded[slots].astype(padded.dtype, copy=False), dweight)


def check_shapes(x: Array, weight: Array, cu_seqlens: Array, window: Array | None) -> None:
    """Check that the arrays of `forward` fit each other, and that the boundaries run from 0 to N."""
    shape = (cu_seqlens.size - 1, weight.shape[-1] - 1, x.shape[1])
    fits = weight.shape[:2] == (x.shape[1], 1) and (window is None or window.shape == shape)
    if not fits or int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != x.shape[0]:
        raise ShapeError(
            "expected x [N, D], weight [D, 1, J], boundaries from 0 to N and window [S, J-1, D]; got "
            f"{list(x.shape)}, {list(weight.shape)}, {int(cu_seqlens[0])} to {int(cu_seqlens[-1])} and "
            f"{None if window is None else list(window.shape)}"
        )


def _mixed(saved: Saved) -> Array:
    """Return what silu is applied to, [N, D] in the accumulation dtype."""
    padded, slots, weight = saved
    taps, rows = weight.shape[-1], padded.shape[0] - weight.shape[-1] + 1
    by_tap = wide(weight[:, 0]).T  # [J, D]
    mixed = by_tap[0] * wide(padded[:rows])
    for j in range(1, taps):
        mixed += by_tap[j] * wide(padded[j : j + rows])
    return mixed[slots - (taps - 1)]
