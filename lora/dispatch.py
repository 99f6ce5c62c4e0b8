"""Which implementation of an operation runs: chosen once for a model, and said aloud."""

from __future__ import annotations

from typing import Any, NamedTuple

from lora.errors import DeviceError
from lora.ops import (
    adamw,
    attention,
    cached_attention,
    causal_conv1d,
    embedding,
    gated_delta_rule,
    gated_norm,
    lowrank_linear,
    pool,
    rmsnorm,
    rope,
    sigmoid_gate,
    softmax_xent,
    swiglu,
)


class Ops(NamedTuple):
    """The modules that run each operation; model code calls `ops.rmsnorm.forward` and names no device."""

    adamw: Any
    attention: Any
    cached_attention: Any
    causal_conv1d: Any
    embedding: Any
    gated_delta_rule: Any
    gated_norm: Any
    lowrank_linear: Any
    pool: Any
    rmsnorm: Any
    rope: Any
    sigmoid_gate: Any
    softmax_xent: Any
    swiglu: Any


class Choice(NamedTuple):
    """What runs one operation, and why."""

    operation: str
    implementation: str
    reason: str


REFERENCE = Ops(
    adamw=adamw,
    attention=attention,
    cached_attention=cached_attention,
    causal_conv1d=causal_conv1d,
    embedding=embedding,
    gated_delta_rule=gated_delta_rule,
    gated_norm=gated_norm,
    lowrank_linear=lowrank_linear,
    pool=pool,
    rmsnorm=rmsnorm,
    rope=rope,
    sigmoid_gate=sigmoid_gate,
    softmax_xent=softmax_xent,
    swiglu=swiglu,
)


def implementations(device: str) -> Ops:
    """Return the modules that run on `device`.

    Raises:
        DeviceError: there is no implementation for the device; nothing falls back in silence.
    """
    if device != "cpu":
        raise DeviceError(f"device must be 'cpu'; got {device!r}: CUDA kernels are not part of this version")
    return REFERENCE


def choices(device: str) -> tuple[Choice, ...]:
    """Return what `implementations(device)` chose for each operation, with the reason."""
    implementations(device)
    return tuple(Choice(name, "reference", "NumPy on the host") for name in Ops._fields)
