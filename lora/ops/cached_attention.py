"""Attention of the newest token of each sequence over all that the sequence has kept: one step of generation.

    o_s = Σ_m p_m v_m        p = softmax(scale · q_s·k_m)        over the first `lengths[s]` kept tokens m

Query head h reads key-value head h // (H / G). There is no backward: nothing is trained while generating.

Contract: contracts/ops/cached_attention.yaml. Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1.
"""

from __future__ import annotations

from lora.backend import Array, array_module, empty, matmul
from lora.errors import ShapeError


def forward(q: Array, keys: Array, values: Array, lengths: Array, *, scale: float) -> Array:
    """Return o [S, H, E] in q's dtype.

    Args:
        q: [S, H, E] one rotated query a sequence, of its newest token.
        keys: [S, C, G, E] rotated keys, the newest token's too; what stands behind `lengths` is not read.
        values: [S, C, G, E] likewise.
        lengths: [S] how many tokens each sequence has kept, from 1 to C.
        scale: multiplies every score; E^-0.5.

    Raises:
        ShapeError: the arrays do not fit, or a length is out of range.
    """
    xp = array_module(q, keys, values)
    _check_shapes(q, keys, values, lengths)
    _, heads, width = q.shape
    groups = keys.shape[2]
    o = empty(q.shape, q.dtype, like=q)
    for row, length in enumerate(map(int, lengths)):
        grouped = q[row].reshape(groups, heads // groups, width)
        scores = matmul(grouped, keys[row, :length].transpose(1, 2, 0)) * scale  # [G, H / G, length]
        weights = xp.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        o[row] = matmul(weights, values[row, :length].swapaxes(0, 1)).reshape(heads, width)
    return o


def _check_shapes(q: Array, keys: Array, values: Array, lengths: Array) -> None:
    fits = keys.shape == values.shape and len(q) == len(keys) == len(lengths) and q.shape[2] == keys.shape[3]
    fits = fits and q.shape[1] % keys.shape[2] == 0
    if not fits or not all(1 <= int(length) <= keys.shape[1] for length in lengths):
        raise ShapeError(
            "expected q [S, H, E], keys, values [S, C, G, E], G a divisor of H, S lengths from 1 to C; got q "
            f"{list(q.shape)}, keys {list(keys.shape)}, values {list(values.shape)}, "
            f"lengths {list(map(int, lengths))}"
        )
