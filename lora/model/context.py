"""What every block of a forward shares, and where the gradients of a backward are gathered."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lora.backend import Array
from lora.dispatch import Ops
from lora.model.cache import Cache
from lora.model.parameters import Parameters
from lora.spec import ModelSpec


@dataclass(frozen=True)
class Context:
    """One forward over packed sequences: the model's parts, the batch's geometry, and what came before it."""

    ops: Ops
    parameters: Parameters
    spec: ModelSpec
    cu_seqlens: Array  # [S + 1] where each sequence starts, and the end
    cos: Array  # [N, rotary_dim / 2]
    sin: Array  # [N, rotary_dim / 2]
    cache: Cache | None = None  # of the tokens before these, in generation

    def attend(self, block: str, q: Array, k: Array, v: Array, *, scale: float) -> tuple[Array, Any]:
        """Return (o [N, H, E], Saved) of attention over these tokens and the cached ones before them."""
        if self.cache is None:
            return self.ops.attention.forward(q, k, v, self.cu_seqlens, scale=scale)
        return self.cache.attend(self.ops, block, q, k, v, self.cu_seqlens, scale=scale), None

    def memory(self, block: str) -> tuple[Array | None, Array | None]:
        """Return what a gated-delta block remembers of the tokens before these: (conv window, state)."""
        return (None, None) if self.cache is None else self.cache.memory(block)

    def remember(self, block: str, window: Array, state: Array | None) -> None:
        """Keep a gated-delta block's window and state for the tokens that follow."""
        if self.cache is not None and state is not None:
            self.cache.remember(block, window, state)


@dataclass
class Gradients:
    """Gathers gradients by name while a backward runs; a tensor that is used twice gets the sum."""

    parameters: Parameters
    arrays: dict[str, Array] = field(default_factory=dict)

    def add(self, name: str, gradient: Array) -> None:
        """Add `gradient` to what is held under `name`."""
        self.arrays[name] = self.arrays[name] + gradient if name in self.arrays else gradient

    def tensor(self, name: str, gradient: Array | None) -> None:
        """Add the gradient of the weight `name`, which an operation leaves out where it is frozen."""
        if gradient is not None:
            self.add(self.parameters.gradient_name(name), gradient)

    def linear(self, grads: Any, *modules: str) -> Array:
        """Gather what a lowrank_linear trained, one entry of `grads.parts` a module; return its dx."""
        for module, part in zip(modules, grads.parts, strict=True):
            for name, gradient in self.parameters.named_gradients(module, part):
                self.add(name, gradient)
        return grads.x

    def norm(self, rmsnorm: Any, saved: Any, dy: Array, dstream: Array | None, name: str) -> Array:
        """Run a norm's backward, gather its weight's gradient where it is trained, and return dx [N, D]."""
        grads = rmsnorm.backward(saved, dy, dstream, wants_weight=self.parameters.is_trained(name))
        self.tensor(name, grads.weight)
        return grads.x
