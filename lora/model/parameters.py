"""The arrays of a model: the frozen base, and what is trained beside it or instead of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lora.backend import Array, array_module
from lora.errors import AdapterError
from lora.io.lora_config import LoraConfig
from lora.io.peft import peft_name
from lora.ops.lowrank_linear import Factors, Part, PartGrads

HEAD = ("score.weight", "score.bias")


@dataclass
class Adapter:
    """One adapter: low-rank factors by module, and full copies of the tensors that it replaces."""

    config: LoraConfig
    factors: dict[str, Factors]
    replaced: dict[str, Array]  # canonical tensor name -> trained copy, float32
    zero_rows: dict[str, slice] = field(default_factory=dict)  # rows of B that are not trained, by module
    facts: dict[str, Any] = field(default_factory=dict)  # what lora_metadata.json said of a loaded one

    def tensors(self, layout: str) -> dict[str, Array]:
        """Return the live arrays by PEFT's names: lora_A [R, I], lora_B [O, R], then the replaced tensors."""
        named: dict[str, Array] = {}
        for module, factors in self.factors.items():
            named[peft_name(module, "lora_A.weight", layout)] = factors.a
            named[peft_name(module, "lora_B.weight", layout)] = factors.b
        return named | {peft_tensor_name(name, layout): array for name, array in self.replaced.items()}


@dataclass
class Parameters:
    """Every array of a model, looked up by its canonical tensor name or by its module.

    A weight is frozen unless the active adapter replaces it, it is a classifier's head, or `full` is set.
    """

    weights: dict[str, Array]
    layout: str = "text"  # of the checkpoint: what PEFT's names are spelled for
    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: str | None = None
    merged: str | None = None  # the adapter whose change the weights hold now
    full: bool = False

    @property
    def adapter(self) -> Adapter | None:
        """The adapter that takes part in the forward now: none while its change is merged."""
        return self.adapters[self.active] if self.active is not None and self.merged is None else None

    def __contains__(self, name: str) -> bool:
        return self.get(name) is not None

    def __getitem__(self, name: str) -> Array:
        array = self.get(name)
        if array is None:
            raise KeyError(name)
        return array

    def get(self, name: str) -> Array | None:
        """Return the tensor `name`, or None where the model has none of that name."""
        replaced = self.adapter.replaced if self.adapter is not None else {}
        return replaced.get(name, self.weights.get(name))

    def is_trained(self, name: str) -> bool:
        """Whether the tensor `name` itself gets a gradient."""
        if self.adapter is not None:
            return name in self.adapter.replaced
        return self.full or name in HEAD

    def part(self, module: str) -> Part:
        """Return what lowrank_linear needs of `module`: weight, bias, factors."""
        factors = self.adapter.factors.get(module) if self.adapter is not None else None
        weight, bias = f"{module}.weight", f"{module}.bias"
        return Part(
            self[weight],
            self.get(bias),
            factors,
            trained=self.is_trained(weight),
        )

    def trains_below(self, prefix: str) -> bool:
        """Whether anything whose name starts with `prefix` is trained."""
        if self.adapter is not None:
            return any(name.startswith(prefix) for name in (*self.adapter.factors, *self.adapter.replaced))
        return any(name.startswith(prefix) and self.is_trained(name) for name in self.weights)

    def trainable(self) -> dict[str, Array]:
        """Return every trained array, live, by the name that its gradient has."""
        if self.adapter is not None:
            return self.adapter.tensors(self.layout)
        return {
            self.gradient_name(name): array for name, array in self.weights.items() if self.is_trained(name)
        }

    def gradient_name(self, name: str) -> str:
        """Return the name of the gradient of the tensor `name`: PEFT's, or under full training its own."""
        return name if self.full else peft_tensor_name(name, self.layout)

    def named_gradients(self, module: str, part: PartGrads) -> Iterator[tuple[str, Array]]:
        """Yield (name, gradient) for what `module` trains."""
        if part.a is not None:
            yield peft_name(module, "lora_A.weight", self.layout), part.a
            yield peft_name(module, "lora_B.weight", self.layout), self._without_zero_rows(module, part.b)
        if part.weight is not None:
            yield self.gradient_name(f"{module}.weight"), part.weight
        if part.bias is not None:
            yield self.gradient_name(f"{module}.bias"), part.bias

    def _without_zero_rows(self, module: str, db: Array) -> Array:
        if self.adapter is not None and module in self.adapter.zero_rows:
            db[self.adapter.zero_rows[module]] = 0
        return db

    def activate(self, name: str) -> None:
        """Make the adapter `name` the one that runs and trains.

        Raises:
            AdapterError: there is no such adapter, or the weights hold the change of one now.
        """
        if name not in self.adapters:
            raise AdapterError(f"no adapter named {name!r}; there are {sorted(self.adapters) or 'none'}")
        if self.merged is not None:
            raise AdapterError(f"the adapter {self.merged!r} is merged; call unmerge_adapter() first")
        self.active = name

    def train_all(self) -> None:
        """Make every weight trainable: float32 (or float64) copies that the optimizer may write.

        Raises:
            AdapterError: an adapter is attached; full training changes what it was made for.
        """
        if self.adapters:
            raise AdapterError(
                f"full training of a model with adapters {sorted(self.adapters)}; load it without"
            )
        self.weights = {name: master_copy(array) for name, array in self.weights.items()}
        self.full = True


def peft_tensor_name(name: str, layout: str) -> str:
    """Return PEFT's name of a tensor that is trained whole, such as `score.weight`."""
    module, _, kind = name.rpartition(".")
    return peft_name(module, kind, layout)


def master_copy(array: Array) -> Array:
    """Return a writable copy in float32, in which weights are trained whatever dtype they are stored in."""
    return array_module(array).array(array, dtype=np.float32)


def by_name(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Return the same arrays in the order of their names: sums over them are the same in every run."""
    return {name: tensors[name] for name in sorted(tensors)}
