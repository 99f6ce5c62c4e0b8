"""The gated activation of a feed-forward block, on a GPU.

Contract: contracts/ops/swiglu.yaml. Source: kernels/swiglu.cu; the reference is lora/ops/swiglu.py.
"""

from __future__ import annotations

from lora.backend import Array, Kernel, empty, launch
from lora.cuda._instances import CPP_TYPES, contiguous, cpp_type, pack_blocks
from lora.ops.swiglu import Grads, Saved

_THREADS = 256


def _kernel(direction: str, cpp: str) -> Kernel:
    return Kernel("swiglu.cu", f"swiglu_{direction}<{cpp}>", _THREADS)


KERNELS = tuple(
    _kernel(direction, cpp) for direction in ("forward", "backward") for cpp in CPP_TYPES.values()
)


def forward(gate: Array, up: Array) -> tuple[Array, Saved]:
    """Return y [N, F] in gate's dtype, for `gate` and `up` [N, F] of one dtype, bfloat16 or float32."""
    gate, up = contiguous(gate), contiguous(up)
    y = empty(gate.shape, gate.dtype, like=gate)
    kernel = _kernel("forward", cpp_type("swiglu", gate))
    launch(kernel, pack_blocks(gate, _THREADS), gate, up, y, gate.size)
    return y, Saved(gate, up)


def backward(saved: Saved, dy: Array) -> Grads:
    """Return the gradients for gate and up, given `dy` [N, F]."""
    gate, up = saved
    dgate, dup = (empty(gate.shape, gate.dtype, like=gate) for _ in range(2))
    kernel = _kernel("backward", cpp_type("swiglu", gate))
    launch(kernel, pack_blocks(gate, _THREADS), gate, up, contiguous(dy), dgate, dup, gate.size)
    return Grads(dgate, dup)
