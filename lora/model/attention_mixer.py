"""The full-attention mixer of a block: q, k, v projections, rope, attention, output projection."""

from __future__ import annotations

from typing import Any, NamedTuple

from lora.backend import Array
from lora.model.context import Context, Gradients


class Saved(NamedTuple):
    """One record an operation, in the order of the forward."""

    qkv: Any
    rope: Any
    attention: Any
    output: Any


def forward(context: Context, block: str, hidden: Array) -> tuple[Array, Saved]:
    """Return (mixed [N, D], Saved) for the normed hidden states [N, D] of the block named `block`."""
    ops, spec = context.ops, context.spec
    rows, width = hidden.shape[0], spec.head_dim
    parts = tuple(context.parameters.part(module) for module in _qkv(block))
    (q, k, v), qkv = ops.lowrank_linear.forward(hidden, parts)
    q = q.reshape(rows, spec.num_attention_heads, width)
    k = k.reshape(rows, spec.num_key_value_heads, width)
    v = v.reshape(rows, spec.num_key_value_heads, width)
    (q, k), rope = ops.rope.forward(q, k, context.cos, context.sin)
    attended, attention = ops.attention.forward(q, k, v, context.cu_seqlens, scale=width**-0.5)
    part = context.parameters.part(f"{block}.self_attn.o_proj")
    (mixed,), output = ops.lowrank_linear.forward(attended.reshape(rows, -1), (part,))
    return mixed, Saved(qkv, rope, attention, output)


def backward(
    context: Context, block: str, saved: Saved, dmixed: Array, gradients: Gradients, *, wants_input: bool
) -> Array | None:
    """Return the gradient [N, D] for the normed hidden states, or None where nothing below needs it."""
    ops, rows = context.ops, dmixed.shape[0]
    output = ops.lowrank_linear.backward(saved.output, (dmixed,))
    dattended = gradients.linear(output, f"{block}.self_attn.o_proj")
    dqkv = ops.attention.backward(
        saved.attention, dattended.reshape(rows, context.spec.num_attention_heads, -1)
    )
    drope = ops.rope.backward(saved.rope, dqkv.q, dqkv.k)
    dys = tuple(d.reshape(rows, -1) for d in (drope.q, drope.k, dqkv.v))
    return gradients.linear(ops.lowrank_linear.backward(saved.qkv, dys, wants_x=wants_input), *_qkv(block))


def _qkv(block: str) -> tuple[str, str, str]:
    return f"{block}.self_attn.q_proj", f"{block}.self_attn.k_proj", f"{block}.self_attn.v_proj"
