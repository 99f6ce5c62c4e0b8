"""Generation: the prompts once, then a token at a time over what the blocks remember."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from lora.backend import to_host
from lora.data.packed import Packed, pack
from lora.dispatch import Ops
from lora.model import decoder
from lora.model.cache import Cache
from lora.model.head import CausalHead
from lora.model.parameters import Parameters
from lora.model.sampling import Sampling, choose, stream_of
from lora.spec import ModelSpec

Step = list[tuple[int, int]]  # (prompt, its next token), of every prompt that has not ended
Ended = Callable[
    [int, Sequence[int]], bool
]  # (prompt, its new tokens): whether it ends with the last of them


def steps(
    ops: Ops,
    parameters: Parameters,
    spec: ModelSpec,
    dtype: np.dtype[Any],
    prompts: Packed,
    max_new_tokens: int,
    sampling: Sampling,
    ended: Ended,
) -> Iterator[Step]:
    """Yield the next token of each prompt, step by step; a prompt that has ended leaves the batch.

    Args:
        ops: what runs the operations.
        parameters: with the active adapter.
        spec: the model's sizes.
        dtype: of the arithmetic.
        prompts: S sequences.
        max_new_tokens: where a continuation stops that does not end before.
        sampling: how a token is chosen.
        ended: asked of every prompt at every step, before the step is yielded.
    """
    cache = Cache(int(prompts.lengths.max()) + max_new_tokens, np.zeros(prompts.num_sequences, np.int64))
    streams = [
        stream_of(sampling, prompts.input_ids[start:stop]) for start, stop in pairwise(prompts.cu_seqlens)
    ]
    new: list[list[int]] = [[] for _ in streams]
    running, batch = list(range(prompts.num_sequences)), prompts
    for _ in range(max_new_tokens):
        last = batch.cu_seqlens[1:] - 1  # what follows each sequence
        hidden, _ = decoder.forward(ops, parameters, spec, batch, dtype, record=False, cache=cache, read=last)
        logits = to_host(CausalHead.logits(ops, parameters, hidden, batch.at(last)))
        for row, row_logits in zip(running, logits, strict=True):
            new[row].append(choose(row_logits, sampling, streams[row]))
        going_on = [place for place, row in enumerate(running) if not ended(row, new[row])]
        yield [(row, new[row][-1]) for row in running]
        if not going_on:
            return
        if len(going_on) < len(running):
            cache.keep_rows(going_on)
            running = [running[place] for place in going_on]
        batch = pack([new[row][-1:] for row in running])
