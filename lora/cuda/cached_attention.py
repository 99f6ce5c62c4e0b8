"""Attention of the newest token of each sequence over what the sequence has kept, on a GPU; bfloat16.

Contract: contracts/ops/cached_attention.yaml. Source: kernels/cached_attention.cu; the reference is
lora/ops/cached_attention.py.
"""

from __future__ import annotations

from itertools import product

from lora.backend import Array, Kernel, empty, launch
from lora.cuda._heads import WIDTHS, check_heads
from lora.cuda._instances import contiguous
from lora.errors import ShapeError

_HEADS = (1, 4, 8)  # query heads that a block serves at once
_WARPS = 8


def _kernel(width: int, heads: int) -> Kernel:
    return Kernel("cached_attention.cu", f"cached_attention<{width}, {heads}, {_WARPS}>", 32 * _WARPS)


KERNELS = tuple(_kernel(*each) for each in product(WIDTHS, _HEADS))


def forward(q: Array, keys: Array, values: Array, lengths: Array, *, scale: float) -> Array:
    """Return o [S, H, E] in q's dtype.

    Args:
        q: [S, H, E] one rotated query a sequence, of its newest token; bfloat16, and E is 64, 128 or 256.
        keys: [S, C, G, E] rotated keys, the newest token's too; what stands behind `lengths` is not read.
        values: [S, C, G, E] likewise.
        lengths: [S] how many tokens each sequence has kept, from 1 to C. They stay on the device, unchecked;
            none leads out of the cache.
        scale: multiplies every score; E^-0.5.

    Raises:
        ShapeError: the arrays do not fit.
        UnsupportedError: there is no kernel for the dtype or the width.
    """
    _check(q, keys, values, lengths)
    (sequences, heads, width), (capacity, groups) = q.shape, keys.shape[1:3]
    q, keys, values, lengths = *map(contiguous, (q, keys, values)), contiguous(lengths, "int64")
    share, o = heads // groups, empty(q.shape, q.dtype, like=q)
    at_once = next((least for least in _HEADS if least >= share), _HEADS[-1])
    grid = (sequences * groups * -(-share // at_once),)
    launch(_kernel(width, at_once), grid, q, keys, values, lengths, o, scale, capacity, heads, groups)
    return o


def _check(q: Array, keys: Array, values: Array, lengths: Array) -> None:
    fits = keys.shape == values.shape and len(q) == len(keys) == len(lengths) and q.shape[2] == keys.shape[3]
    if not fits or q.shape[1] % keys.shape[2]:
        raise ShapeError(
            "expected q [S, H, E], keys, values [S, C, G, E], G a divisor of H, S lengths; got q "
            f"{list(q.shape)}, keys {list(keys.shape)}, values {list(values.shape)}, {len(lengths)} lengths"
        )
    check_heads("cached_attention", q, keys, values)
