"""The full-attention mixer of a block: q, k, v projections, rope, attention, output projection.

In Qwen3.5 the heads of q and k are normed before they are rotated, and q_proj holds, head by head, the query
and a gate that the attention's output passes through.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from lora.backend import Array, array_module
from lora.model.context import Context, Gradients


class Saved(NamedTuple):
    """One record an operation, in the order of the forward."""

    qkv: Any
    rope: Any
    attention: Any
    gate: Any  # None in a family without an output gate
    output: Any


def forward(context: Context, block: str, hidden: Array) -> tuple[Array, Saved]:
    """Return (mixed [N, D], Saved) for the normed hidden states [N, D] of the block named `block`."""
    ops, parameters, spec = context.ops, context.parameters, context.spec
    rows, width = hidden.shape[0], spec.head_dim
    parts = tuple(parameters.part(module) for module in _qkv(block))
    (q, k, v), qkv = ops.lowrank_linear.forward(hidden, parts)
    q = q.reshape(rows, spec.num_attention_heads, -1)
    k = k.reshape(rows, spec.num_key_value_heads, width)
    v = v.reshape(rows, spec.num_key_value_heads, width)
    q, gate = q[..., :width], q[..., width:]
    norms = (parameters.get(f"{block}.self_attn.{norm}.weight") for norm in ("q_norm", "k_norm"))
    (q, k), rope = ops.rope.forward(q, k, context.cos, context.sin, *norms, eps=spec.rms_norm_eps)
    attended, attention = context.attend(block, q, k, v, scale=width**-0.5)
    saved_gate = None
    if spec.attn_output_gate:
        attended, saved_gate = ops.sigmoid_gate.forward(attended, gate)
    part = parameters.part(f"{block}.self_attn.o_proj")
    (mixed,), output = ops.lowrank_linear.forward(attended.reshape(rows, -1), (part,))
    return mixed, Saved(qkv, rope, attention, saved_gate, output)


def backward(
    context: Context, block: str, saved: Saved, dmixed: Array, gradients: Gradients, *, wants_input: bool
) -> Array | None:
    """Return the gradient [N, D] for the normed hidden states, or None where nothing below needs it."""
    ops, rows = context.ops, dmixed.shape[0]
    output = ops.lowrank_linear.backward(saved.output, (dmixed,))
    dattended = gradients.linear(output, f"{block}.self_attn.o_proj")
    dattended = dattended.reshape(rows, context.spec.num_attention_heads, -1)
    dgate = None
    if saved.gate is not None:
        dattended, dgate = ops.sigmoid_gate.backward(saved.gate, dattended)
    dqkv = ops.attention.backward(saved.attention, dattended)
    wants_norms = context.parameters.is_trained(f"{block}.self_attn.q_norm.weight")
    drope = ops.rope.backward(saved.rope, dqkv.q, dqkv.k, wants_norms=wants_norms)
    gradients.tensor(f"{block}.self_attn.q_norm.weight", drope.q_norm)
    gradients.tensor(f"{block}.self_attn.k_norm.weight", drope.k_norm)
    dq = drope.q if dgate is None else array_module(dgate).concatenate([drope.q, dgate], axis=-1)
    dys = tuple(d.reshape(rows, -1) for d in (dq, drope.k, dqkv.v))
    return gradients.linear(ops.lowrank_linear.backward(saved.qkv, dys, wants_x=wants_input), *_qkv(block))


def _qkv(block: str) -> tuple[str, str, str]:
    return f"{block}.self_attn.q_proj", f"{block}.self_attn.k_proj", f"{block}.self_attn.v_proj"
