"""The gated-delta mixer of a block (Qwen3.5): projections, causal convolution, gated delta rule, gated norm.

q | k | v = silu(conv(x W_qkvᵀ))        o = delta_rule(q, k, v, a, b)        y = (norm(o) · silu(z)) W_outᵀ
"""

from __future__ import annotations

from typing import Any, NamedTuple

from lora.backend import Array, array_module
from lora.model.context import Context, Gradients
from lora.spec import ModelSpec


class Saved(NamedTuple):
    """One record an operation, in the order of the forward."""

    projections: Any
    conv: Any
    delta_rule: Any
    norm: Any
    output: Any


def forward(context: Context, block: str, hidden: Array) -> tuple[Array, Saved]:
    """Return (mixed [N, D], Saved) for the normed hidden states [N, D] of the block named `block`."""
    ops, parameters, spec = context.ops, context.parameters, context.spec
    name, rows = f"{block}.linear_attn", hidden.shape[0]
    parts = tuple(parameters.part(module) for module in _projections(name))
    (qkv, z, b, a), projections = ops.lowrank_linear.forward(hidden, parts)
    window, state = context.memory(block)
    weight = parameters[f"{name}.conv1d.weight"]
    (mixed, window), conv = ops.causal_conv1d.forward(qkv, weight, context.cu_seqlens, window)
    q, k, v = _heads(spec, mixed)
    decay = (parameters[f"{name}.A_log"], parameters[f"{name}.dt_bias"])
    (o, state), delta_rule = ops.gated_delta_rule.forward(
        q, k, v, a, b, *decay, context.cu_seqlens, state, wants_state=context.cache is not None
    )
    context.remember(block, window, state)
    gate, weight = z.reshape(o.shape), parameters[f"{name}.norm.weight"]
    gated, norm = ops.gated_norm.forward(o, gate, weight, eps=spec.rms_norm_eps)
    part = parameters.part(f"{name}.out_proj")
    (out,), output = ops.lowrank_linear.forward(gated.reshape(rows, -1), (part,))
    return out, Saved(projections, conv, delta_rule, norm, output)


def backward(
    context: Context, block: str, saved: Saved, dmixed: Array, gradients: Gradients, *, wants_input: bool
) -> Array | None:
    """Return the gradient [N, D] for the normed hidden states, or None where nothing below needs it."""
    ops, spec, trained = context.ops, context.spec, context.parameters.is_trained
    name, rows = f"{block}.linear_attn", dmixed.shape[0]
    output = ops.lowrank_linear.backward(saved.output, (dmixed,))
    dgated = gradients.linear(output, f"{name}.out_proj")
    dgated = dgated.reshape(rows, spec.linear_num_value_heads, spec.linear_value_head_dim)
    wants_norm = trained(f"{name}.norm.weight")
    norm = ops.gated_norm.backward(saved.norm, dgated, wants_weight=wants_norm)
    gradients.tensor(f"{name}.norm.weight", norm.weight)

    rule = ops.gated_delta_rule.backward(saved.delta_rule, norm.x, wants_decay=trained(f"{name}.A_log"))
    gradients.tensor(f"{name}.A_log", rule.A_log)
    gradients.tensor(f"{name}.dt_bias", rule.dt_bias)

    xp = array_module(dmixed)
    dqkv = xp.concatenate([d.reshape(rows, -1) for d in (rule.q, rule.k, rule.v)], axis=1)
    conv = ops.causal_conv1d.backward(saved.conv, dqkv, wants_weight=trained(f"{name}.conv1d.weight"))
    gradients.tensor(f"{name}.conv1d.weight", conv.weight)
    dys = (conv.x, norm.gate.reshape(rows, -1), rule.b, rule.a)
    projections = ops.lowrank_linear.backward(saved.projections, dys, wants_x=wants_input)
    return gradients.linear(projections, *_projections(name))


def _projections(name: str) -> tuple[str, ...]:
    return tuple(f"{name}.in_proj_{part}" for part in ("qkv", "z", "b", "a"))


def _heads(spec: ModelSpec, mixed: Array) -> tuple[Array, Array, Array]:
    """Cut [N, 2 · key width + value width] into q, k [N, key heads, K] and v [N, value heads, W]."""
    rows, keys = mixed.shape[0], spec.linear_num_key_heads * spec.linear_key_head_dim
    q, k = (
        part.reshape(rows, spec.linear_num_key_heads, -1)
        for part in (mixed[:, :keys], mixed[:, keys : 2 * keys])
    )
    return q, k, mixed[:, 2 * keys :].reshape(rows, spec.linear_num_value_heads, -1)
