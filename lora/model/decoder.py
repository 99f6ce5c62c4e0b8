"""The decoder over packed sequences: embedding, blocks, final norm; and its backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lora.backend import Array, accumulation_dtype, beside
from lora.data.packed import Packed
from lora.dispatch import Ops
from lora.model import block
from lora.model.cache import Cache
from lora.model.context import Context, Gradients
from lora.model.parameters import Parameters
from lora.spec import ModelSpec

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"


@dataclass
class Tape:
    """What a forward leaves for its backward. Records of blocks are dropped as the backward consumes them."""

    context: Context
    first: int  # the first block that was recorded: nothing below it is trained
    embedding: Any
    blocks: list[Any]
    final_norm: Any


def forward(
    ops: Ops,
    parameters: Parameters,
    spec: ModelSpec,
    batch: Packed,
    dtype: np.dtype[Any],
    *,
    record: bool,
    cache: Cache | None = None,
    read: np.ndarray | None = None,
) -> tuple[Array, Tape]:
    """Return (hidden [N, D], Tape): the normed output of the last block, in `dtype`.

    With `record` false nothing is kept for a backward; with it, only from the first trained block on. With a
    `cache` the tokens follow those that it holds, and are added to it. With `read`, the places [R] of the
    tokens whose output is wanted, `hidden` is [R, D], and the last block computes no more than these need.
    """
    context = context_of(ops, parameters, spec, batch, dtype, cache)
    first = first_trained_block(parameters, spec) if record else spec.num_hidden_layers + 1
    delta, embedding = ops.embedding.forward(batch.input_ids, parameters[EMBEDDING], dtype=dtype)
    blocks: list[Any] = []
    stream: Array | None = None
    wanted = None if read is None else beside(read, parameters[EMBEDDING])
    for layer in range(spec.num_hidden_layers):
        is_last = layer == spec.num_hidden_layers - 1
        delta, stream, saved = block.forward(context, layer, delta, stream, wanted if is_last else None)
        if layer >= first:
            blocks.append(saved)
        del saved  # a block that is not recorded frees its memory before the next one runs
    if cache is not None:
        cache.advance()
    (hidden, _), final_norm = ops.rmsnorm.forward(
        delta, parameters[FINAL_NORM], stream, eps=spec.rms_norm_eps, zero_centred=spec.zero_centred_norm
    )
    return hidden, Tape(context, first, embedding, blocks, final_norm)


def backward(tape: Tape, dhidden: Array, gradients: Gradients) -> None:
    """Add the gradients of everything trained in the decoder to `gradients`, given `dhidden` as `hidden`."""
    context, parameters = tape.context, tape.context.parameters
    layers = context.spec.num_hidden_layers
    if tape.first > layers:
        return
    trains_embedding = parameters.is_trained(EMBEDDING)
    dstream = gradients.norm(context.ops.rmsnorm, tape.final_norm, dhidden, None, FINAL_NORM)
    for layer in range(layers - 1, tape.first - 1, -1):
        wants_input = trains_embedding or layer > tape.first
        saved = tape.blocks.pop()
        dstream = block.backward(context, layer, saved, dstream, dstream, gradients, wants_input=wants_input)
    if trains_embedding:
        table = context.ops.embedding.backward(tape.embedding, dstream).table
        gradients.add(parameters.gradient_name(EMBEDDING), table)


def first_trained_block(parameters: Parameters, spec: ModelSpec) -> int:
    """Return the first block that the backward must reach.

    That is 0 when the embedding is trained, L when only the final norm is, and L + 1 when nothing is.
    """
    if parameters.is_trained(EMBEDDING):
        return 0
    for layer in range(spec.num_hidden_layers):
        if parameters.trains_below(f"model.layers.{layer}."):
            return layer
    return spec.num_hidden_layers + (0 if parameters.is_trained(FINAL_NORM) else 1)


def context_of(
    ops: Ops,
    parameters: Parameters,
    spec: ModelSpec,
    batch: Packed,
    dtype: np.dtype[Any],
    cache: Cache | None = None,
) -> Context:
    """Return what every block of a forward over `batch` shares."""
    positions = batch.positions
    if cache is not None:
        positions = positions + np.repeat(cache.lengths, batch.lengths)
        cache.expect(batch.cu_seqlens, parameters[EMBEDDING])
    # what every block reads is brought beside the weights once
    positions, cu_seqlens = (beside(array, parameters[EMBEDDING]) for array in (positions, batch.cu_seqlens))
    cos, sin = ops.rope.angles(
        positions, theta=spec.rope_theta, rotary_dim=spec.rotary_dim, dtype=accumulation_dtype(dtype)
    )
    return Context(ops, parameters, spec, cu_seqlens, cos, sin, cache)
