"""Rows of a table by index; its gradient is a scatter-add.

    x_n = table[ids_n]

Contract: contracts/ops/embedding.yaml. Source: Bengio et al. 2003, JMLR 3:1137, section 2 (the mapping C).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from lora.backend import Array, accumulation_dtype, array_module, wide
from lora.errors import DataError


class Saved(NamedTuple):
    """The table itself is not read again, only its shape."""

    ids: Array  # [N] integer
    table_shape: tuple[int, int]  # V, D


class Grads(NamedTuple):
    """Asked for under full fine-tuning alone: a frozen table has no use for backward."""

    table: Array  # [V, D] accumulation dtype


def forward(ids: Array, table: Array, *, dtype: Any) -> tuple[Array, Saved]:
    """Return rows `ids` [N] of `table` [V, D] as x [N, D] in `dtype`.

    Raises:
        DataError: an id is outside [0, V). A negative index would otherwise read from the end of the table.
    """
    array_module(ids, table)
    rows = table.shape[0]
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
        raise DataError(
            f"token ids must lie in [0, {rows}), the rows of the embedding table; found {int(ids.min())} to "
            f"{int(ids.max())}: does the tokenizer belong to this model?"
        )
    return table[ids].astype(dtype, copy=False), Saved(ids, table.shape)


def backward(saved: Saved, dx: Array) -> Grads:
    """Return the gradient for the whole table, given `dx` [N, D]; an id that occurs twice gets both rows."""
    xp = array_module(saved.ids, dx)
    dtable = xp.zeros(saved.table_shape, accumulation_dtype(dx.dtype))
    xp.add.at(dtable, saved.ids, wide(dx))
    return Grads(dtable)
