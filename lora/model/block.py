"""One decoder block, forward and backward: norm, mixer, norm, SwiGLU MLP, with the residual stream between.

A block receives the stream and the last block's contribution to it apart (`delta`), so that adding them is
part of the norm that reads the sum. At the border of two blocks the gradients for both are the same array.

Of the last block's output the head may read few rows: one of each sequence, or those that have a target. Its
mixer then sees all rows, and what follows only those.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

from lora.backend import Array, array_module
from lora.model import attention_mixer, delta_mixer
from lora.model.context import Context, Gradients
from lora.spec import ModelSpec


class Saved(NamedTuple):
    """What the backward of one block needs: one record an operation."""

    input_norm: Any
    mixer: Any
    read: Array | None  # [R] the rows that go on from here; None for all
    post_norm: Any
    gate_up: Any
    swiglu: Any
    down: Any


def forward(
    context: Context, layer: int, delta: Array, stream: Array | None, read: Array | None = None
) -> tuple[Array, Array, Saved]:
    """Return (delta, stream, Saved) after block `layer`, [N, D], or [R, D] of the rows `read` [R] alone.

    `stream` is None before the first block.
    """
    ops, parameters, spec = context.ops, context.parameters, context.spec
    name = f"model.layers.{layer}"
    norm = {"eps": spec.rms_norm_eps, "zero_centred": spec.zero_centred_norm}

    weight = parameters[f"{name}.input_layernorm.weight"]
    (hidden, summed), input_norm = ops.rmsnorm.forward(delta, weight, stream, **norm)
    mixed, mixer = _mixer(spec, layer).forward(context, name, hidden)
    if read is not None:
        mixed, summed = mixed[read], summed[read]
    weight = parameters[f"{name}.post_attention_layernorm.weight"]
    (hidden, stream), post_norm = ops.rmsnorm.forward(mixed, weight, summed, **norm)

    parts = (parameters.part(f"{name}.mlp.gate_proj"), parameters.part(f"{name}.mlp.up_proj"))
    (gate, up), gate_up = ops.lowrank_linear.forward(hidden, parts)
    activated, swiglu = ops.swiglu.forward(gate, up)
    (delta,), down = ops.lowrank_linear.forward(activated, (parameters.part(f"{name}.mlp.down_proj"),))
    return delta, stream, Saved(input_norm, mixer, read, post_norm, gate_up, swiglu, down)


def backward(
    context: Context,
    layer: int,
    saved: Saved,
    ddelta: Array,
    dstream: Array,
    gradients: Gradients,
    *,
    wants_input: bool,
) -> Array | None:
    """Return the gradient [N, D] for the block's inputs, delta and stream alike; add the rest to `gradients`.

    `ddelta` and `dstream` have the rows of the block's outputs.

    With `wants_input` false nothing below this block is trained, and the backward stops inside it.
    """
    ops = context.ops
    name = f"model.layers.{layer}"

    dactivated = gradients.linear(ops.lowrank_linear.backward(saved.down, (ddelta,)), f"{name}.mlp.down_proj")
    dgate_up = ops.swiglu.backward(saved.swiglu, dactivated)
    dhidden = gradients.linear(
        ops.lowrank_linear.backward(saved.gate_up, (dgate_up.gate, dgate_up.up)),
        f"{name}.mlp.gate_proj",
        f"{name}.mlp.up_proj",
    )
    dmixed = gradients.norm(
        ops.rmsnorm, saved.post_norm, dhidden, dstream, f"{name}.post_attention_layernorm.weight"
    )

    if saved.read is not None:
        dmixed = _among_all_rows(dmixed, saved.read, len(context.cos))

    trains_mixer = any(
        context.parameters.trains_below(f"{name}.{mixer}.") for mixer in ("self_attn", "linear_attn")
    )
    if not (wants_input or trains_mixer):
        return None
    wants_norm = wants_input or context.parameters.is_trained(f"{name}.input_layernorm.weight")
    dhidden = _mixer(context.spec, layer).backward(
        context, name, saved.mixer, dmixed, gradients, wants_input=wants_norm
    )
    if not wants_norm:
        return None
    return gradients.norm(ops.rmsnorm, saved.input_norm, dhidden, dmixed, f"{name}.input_layernorm.weight")


def _among_all_rows(rows: Array, places: Array, count: int) -> Array:
    """Return [count, D] that holds `rows` [R, D] at `places` [R], and zeros elsewhere."""
    spread = array_module(rows, places).zeros((count, rows.shape[1]), rows.dtype)
    spread[places] = rows
    return spread


def _mixer(spec: ModelSpec, layer: int) -> ModuleType:
    return attention_mixer if spec.layer_types[layer] == "full_attention" else delta_mixer
