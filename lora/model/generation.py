"""Greedy generation: the prompts once, then a token at a time over what the blocks remember."""

from __future__ import annotations

from typing import Any

import numpy as np

from lora.backend import Array
from lora.data.packed import Packed, pack
from lora.dispatch import Ops
from lora.model import decoder
from lora.model.cache import Cache
from lora.model.head import CausalHead
from lora.model.parameters import Parameters
from lora.spec import ModelSpec


def generate(
    ops: Ops,
    parameters: Parameters,
    spec: ModelSpec,
    dtype: np.dtype[Any],
    prompts: Packed,
    max_new_tokens: int,
) -> list[np.ndarray]:
    """Return the new tokens of each prompt, at most `max_new_tokens`, with the end token where it came."""
    longest = int(prompts.lengths.max())
    cache = Cache(longest + max_new_tokens, np.zeros(prompts.num_sequences, np.int64))
    new: list[list[int]] = [[] for _ in range(prompts.num_sequences)]
    batch = prompts
    for _ in range(max_new_tokens):
        hidden, _ = decoder.forward(ops, parameters, spec, batch, dtype, record=False, cache=cache)
        tokens = _best(ops, parameters, hidden, batch)
        for row, token in zip(new, tokens, strict=True):
            if not _ended(row, spec):
                row.append(int(token))
        if all(_ended(row, spec) for row in new):
            break
        # a row that has ended runs on beside the others: what it would say is not kept
        batch = pack(list(tokens[:, None]))
    return [np.array(row, np.int64) for row in new]


def _best(ops: Ops, parameters: Parameters, hidden: Array, batch: Packed) -> np.ndarray:
    """Return the likeliest next token of each sequence, [S] int64."""
    last = hidden[batch.cu_seqlens[1:] - 1]
    return np.asarray(CausalHead.logits(ops, parameters, last, batch).argmax(axis=-1))


def _ended(row: list[int], spec: ModelSpec) -> bool:
    return bool(row) and row[-1] in spec.eos_token_ids
