"""What is trained and in which precision: all that memory depends on, beside how many tokens run at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Literal

from lora.backend import accumulation_dtype, compute_dtype
from lora.io.lora_config import LoraConfig
from lora.io.targets import FactorSizes, match_targets
from lora.spec import ModelSpec, adaptable_modules, tensor_shapes

Task = Literal["classify", "causal", "instruct"]
Method = Literal["full", "lora", "head"]
Device = Literal["cpu", "cuda"]

TRAINED_BYTES = 4  # of one trained parameter: adapters, heads and fully trained weights are float32
MOMENT_BYTES = 8  # of one trained parameter: AdamW's two float32 moments
STORED_BYTES: Mapping[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Workload:
    """A model, and what is trained of it."""

    spec: ModelSpec
    task: Task = "causal"
    method: Method = "lora"  # "head": a classifier's head alone
    adapter: LoraConfig = field(default_factory=LoraConfig)  # read under "lora" alone
    num_classes: int = 5  # outputs of a classifier's head
    head_bias: bool = True
    dtype: str = "float32"  # of activations
    weight_dtype: str = "bfloat16"  # that the base is stored in
    device: Device = "cpu"

    @property
    def activation_bytes(self) -> int:
        """Bytes of one element of an activation."""
        return compute_dtype(self.dtype).itemsize

    @property
    def wide_bytes(self) -> int:
        """Bytes of one element of a sum, a product or a gradient."""
        return accumulation_dtype(compute_dtype(self.dtype)).itemsize

    @cached_property
    def modules(self) -> dict[str, tuple[int, int]]:
        """The (O, I) of every module that may carry an adapter, by canonical name."""
        return adaptable_modules(self.spec)

    @cached_property
    def base_parameters(self) -> int:
        """Parameters of the base that take part: a classifier has no use for an untied language head."""
        return sum(prod(shape) for name, shape in tensor_shapes(self.spec).items() if self._takes_part(name))

    @property
    def head_parameters(self) -> int:
        """Parameters of a classifier's head; a language model's belongs to the base."""
        if self.task != "classify":
            return 0
        return self.num_classes * (self.spec.hidden_size + self.head_bias)

    @cached_property
    def factors(self) -> dict[str, FactorSizes]:
        """The rank of every module that carries an adapter, by canonical name."""
        return match_targets(self.adapter, self.modules) if self.method == "lora" else {}

    @property
    def adapter_parameters(self) -> int:
        """Elements of A [R, I] and B [O, R] over all adapted modules, as stored."""
        return sum(size.r * sum(self.modules[name]) for name, size in self.factors.items())

    @property
    def untrained_adapter_parameters(self) -> int:
        """Elements of B that stay zero: under "qv", the K rows of a gated-delta layer's in_proj_qkv."""
        if self.adapter.target_modules != "qv":
            return 0
        key_rows = self.spec.linear_num_key_heads * self.spec.linear_key_head_dim
        return sum(key_rows * size.r for name, size in self.factors.items() if name.endswith(".in_proj_qkv"))

    @property
    def held_parameters(self) -> int:
        """Elements of every array that has a gradient and moments."""
        trained_base = self.base_parameters if self.method == "full" else 0
        return trained_base + self.adapter_parameters + self.head_parameters

    @property
    def trained_parameters(self) -> int:
        """Parameters that training moves."""
        return self.held_parameters - self.untrained_adapter_parameters

    @property
    def model_bytes(self) -> int:
        """Bytes of the base: as stored, or under full training as the float32 copy that is trained."""
        width = TRAINED_BYTES if self.method == "full" else STORED_BYTES[self.weight_dtype]
        return self.base_parameters * width

    def _takes_part(self, name: str) -> bool:
        return self.task != "classify" or name != "lm_head.weight"
