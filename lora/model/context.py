"""What every block of a forward shares, and where the gradients of a backward are gathered."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lora.backend import Array
from lora.dispatch import Ops
from lora.model.parameters import Parameters
from lora.spec import ModelSpec


@dataclass(frozen=True)
class Context:
    """One forward over packed sequences: the model's parts, and the batch's geometry."""

    ops: Ops
    parameters: Parameters
    spec: ModelSpec
    cu_seqlens: Array  # [S + 1] where each sequence starts, and the end
    cos: Array  # [N, rotary_dim / 2]
    sin: Array  # [N, rotary_dim / 2]


@dataclass
class Gradients:
    """Gathers gradients by name while a backward runs; a tensor that is used twice gets the sum."""

    parameters: Parameters
    arrays: dict[str, Array] = field(default_factory=dict)

    def add(self, name: str, gradient: Array) -> None:
        """Add `gradient` to what is held under `name`."""
        self.arrays[name] = self.arrays[name] + gradient if name in self.arrays else gradient

    def linear(self, grads: Any, *modules: str) -> Array:
        """Gather what a lowrank_linear trained, one entry of `grads.parts` a module; return its dx."""
        for module, part in zip(modules, grads.parts, strict=True):
            for name, gradient in self.parameters.named_gradients(module, part):
                self.add(name, gradient)
        return grads.x

    def norm(self, rmsnorm: Any, saved: Any, dy: Array, dstream: Array | None, name: str) -> Array:
        """Run a norm's backward, gather its weight's gradient where it is trained, and return dx [N, D]."""
        wants_weight = self.parameters.is_trained(name)
        grads = rmsnorm.backward(saved, dy, dstream, wants_weight=wants_weight)
        if wants_weight:
            self.add(self.parameters.gradient_name(name), grads.weight)
        return grads.x
