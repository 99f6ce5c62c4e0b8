"""Which implementation of an operation runs: chosen once for a model, and said aloud."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import lora.cuda.adamw
import lora.cuda.attention
import lora.cuda.cached_attention
import lora.cuda.embedding
import lora.cuda.lowrank_linear
import lora.cuda.pool
import lora.cuda.rmsnorm
import lora.cuda.rope
import lora.cuda.softmax_xent
import lora.cuda.swiglu
import lora.host.attention
import lora.host.causal_conv1d
import lora.host.gated_delta_rule
import lora.host.gated_norm
import lora.host.rmsnorm
import lora.host.rope
import lora.host.sigmoid_gate
import lora.host.softmax_xent
import lora.host.swiglu
from lora.backend import bfloat16
from lora.backend.device import current_gpu
from lora.errors import DeviceError, UnsupportedError
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
    sigmoid_bce,
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
    sigmoid_bce: Any
    sigmoid_gate: Any
    softmax_xent: Any
    swiglu: Any


class Choice(NamedTuple):
    """What runs one operation, and why."""

    operation: str
    implementation: str
    reason: str


class Unbuilt:
    """Stands where an operation has no kernel: what is asked of it is refused by the operation's name."""

    def __init__(self, operation: str) -> None:
        self._operation = operation

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python itself asks of any object
            raise AttributeError(name)
        raise UnsupportedError(_unbuilt([self._operation]))


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
    sigmoid_bce=sigmoid_bce,
    sigmoid_gate=sigmoid_gate,
    softmax_xent=softmax_xent,
    swiglu=swiglu,
)

HOST = REFERENCE._replace(
    attention=lora.host.attention,
    causal_conv1d=lora.host.causal_conv1d,
    gated_delta_rule=lora.host.gated_delta_rule,
    gated_norm=lora.host.gated_norm,
    rmsnorm=lora.host.rmsnorm,
    rope=lora.host.rope,
    sigmoid_gate=lora.host.sigmoid_gate,
    softmax_xent=lora.host.softmax_xent,
    swiglu=lora.host.swiglu,
)

# one line an operation: lora.cuda's module of its name, once that is there
CUDA = Ops(
    adamw=lora.cuda.adamw,
    attention=lora.cuda.attention,
    cached_attention=lora.cuda.cached_attention,
    causal_conv1d=Unbuilt("causal_conv1d"),
    embedding=lora.cuda.embedding,
    gated_delta_rule=Unbuilt("gated_delta_rule"),
    gated_norm=Unbuilt("gated_norm"),
    lowrank_linear=lora.cuda.lowrank_linear,
    pool=lora.cuda.pool,
    rmsnorm=lora.cuda.rmsnorm,
    rope=lora.cuda.rope,
    sigmoid_bce=Unbuilt("sigmoid_bce"),
    sigmoid_gate=Unbuilt("sigmoid_gate"),
    softmax_xent=lora.cuda.softmax_xent,
    swiglu=lora.cuda.swiglu,
)

_TABLES = {"cpu": HOST, "cuda": CUDA}


def implementations(device: str) -> Ops:
    """Return the modules that run on `device`, "cpu" or "cuda".

    Raises:
        DeviceError: the device has another name, or there is no GPU that kernels run on. Nothing falls back
            in silence: an operation without a kernel is refused when it is used, and by `require`.
    """
    table = _table(device)
    if device == "cuda":
        current_gpu()
    return table


def require(device: str, operations: Iterable[str]) -> None:
    """Check, before anything is loaded, that each of `operations` has an implementation on `device`.

    Raises:
        UnsupportedError: one has none; the message names all that have none.
    """
    table = _table(device)
    absent = sorted(name for name in operations if isinstance(getattr(table, name), Unbuilt))
    if absent:
        raise UnsupportedError(_unbuilt(absent))


def require_dtype(device: str, dtype: Any) -> None:
    """Check, before anything is loaded, that the operations of `device` compute in `dtype`.

    Raises:
        UnsupportedError: they do not: attention runs on a GPU's tensor cores, which read bfloat16.
    """
    if device == "cuda" and dtype != bfloat16:
        raise UnsupportedError(
            f"device 'cuda' computes in bfloat16: expected dtype='bfloat16' (--dtype bfloat16), found {dtype}"
        )


def choices(device: str) -> tuple[Choice, ...]:
    """Return what runs each operation on `device`, with the reason; also where that device is not there."""
    return chosen(_table(device))


def chosen(ops: Ops) -> tuple[Choice, ...]:
    """Return what runs each operation in `ops`, with the reason."""
    return tuple(_choice(name, module) for name, module in ops._asdict().items())


def _choice(name: str, module: Any) -> Choice:
    if isinstance(module, Unbuilt):
        return Choice(name, "none", "no CUDA kernel in this version; runs on the CPU alone")
    if module is getattr(REFERENCE, name):
        return Choice(name, "reference", "NumPy, as it is defined")
    if module is getattr(HOST, name):
        return Choice(name, "host", "NumPy in blocks that stay in the caches, on all threads")
    files = sorted({f"kernels/{kernel.file}" for kernel in module.KERNELS})
    return Choice(name, "cuda", f"compiled from {' and '.join(files)}")


def _table(device: str) -> Ops:
    if device not in _TABLES:
        raise DeviceError(f"device must be one of {', '.join(map(repr, _TABLES))}; got {device!r}")
    return _TABLES[device]


def _unbuilt(operations: list[str]) -> str:
    return f"no CUDA kernel in this version for {', '.join(operations)}; use device='cpu'"
