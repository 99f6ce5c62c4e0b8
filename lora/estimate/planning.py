"""What a fine-tuning run will need, and whether it fits, from a model's sizes alone: nothing is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from lora.errors import UnsupportedError, UsageError
from lora.estimate.memory import HOST_ACTIVATION_BYTES, Memory, memory, micro_batch_tokens, most_tokens
from lora.estimate.workload import STORED_BYTES, Device, Method, Task, Workload
from lora.io.apr_folder import open_folder
from lora.io.checkpoint import read_config
from lora.io.lora_config import LoraConfig
from lora.spec import ModelSpec, parameter_count, read_spec, size_spec

GB = 10**9
USABLE_SHARE = 0.85  # of a budget: the rest is for the system, other libraries and fragmentation
NOT_BUILT: Mapping[str, tuple[str, ...]] = {"method": ("qlora",)}


@dataclass(frozen=True)
class Settings:
    """The settings of `lora.plan`, under the names and with the defaults of `lora.finetune`."""

    task: Task = "classify"
    method: Method | Literal["auto"] = (
        "auto"  # an adapter; or "lora", "full", or "head": a classifier's alone
    )
    rank: int = 16
    alpha: float | None = None  # None: 2 · rank
    targets: str | tuple[str, ...] = "qv"
    num_classes: int = 5
    head_bias: bool = True
    device: Device = "cpu"  # there a frozen base stays in mapped files; on "cuda" memory holds everything
    dtype: str = "float32"  # of activations
    weight_dtype: str | None = None  # of the stored base; None: what config.json says, bfloat16 without one
    vram_gb: float = 16.0  # memory of the device (under "cpu", of the machine), in 10^9 bytes
    batch_size: int = 32  # rows
    max_seq_len: int = 512  # tokens; every row is reckoned as long as this
    grad_accum: int = 1  # batches per optimizer step
    packing: bool = True  # False: one row at a time
    epochs: int = 3  # said in the plan; memory does not depend on it, nor on the learning rate
    learning_rate: float = 2e-4

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            UsageError: some are out of range; all of them are named.
            UnsupportedError: a method or task that is not built.
        """
        for name, values in NOT_BUILT.items():
            if getattr(self, name) in values:
                raise UnsupportedError(f"{name} {getattr(self, name)!r} is not built in this version")
        problems = [
            f"{name} = {getattr(self, name)!r}: expected {expected}"
            for name, valid, expected in self._rules()
            if not valid
        ]
        if problems:
            raise UsageError("; ".join(problems))

    @property
    def usable_bytes(self) -> float:
        """What a run may take of the budget."""
        return USABLE_SHARE * self.vram_gb * GB

    @property
    def batch_tokens(self) -> int:
        """The tokens of one batch of rows as long as may be."""
        return self.batch_size * self.max_seq_len

    def _rules(self) -> list[tuple[str, bool, str]]:
        counts = ("batch_size", "max_seq_len", "grad_accum", "epochs")
        return [
            ("task", self.task in get_args(Task), "classify, causal or instruct"),
            ("method", self.method in ("auto", *get_args(Method)), "auto, full, lora or head"),
            (
                "method",
                self.method != "head" or self.task == "classify",
                f"another one: task {self.task!r} has no head of its own",
            ),
            ("num_classes", self.num_classes >= 2, "2 or more"),
            ("device", self.device in get_args(Device), "cpu or cuda"),
            ("dtype", self.dtype in ("float64", "float32", "bfloat16"), "float64, float32 or bfloat16"),
            ("weight_dtype", self.weight_dtype in (None, *STORED_BYTES), ", ".join(STORED_BYTES)),
            ("vram_gb", 0 < self.vram_gb < float("inf"), "more than 0"),
            ("learning_rate", 0 < self.learning_rate < float("inf"), "more than 0"),
            *((name, getattr(self, name) >= 1, "1 or more") for name in counts),
        ]


@dataclass(frozen=True)
class Plan:
    """A run before it starts: what is trained, what it takes, and how."""

    workload: Workload
    vram_gb: float  # the budget, in 10^9 bytes
    batch_size: int  # rows
    max_seq_len: int  # tokens
    micro_batch_tokens: int  # that run at once, at most
    epochs: int
    learning_rate: float
    memory: Memory
    full_memory: Memory  # the same run under full fine-tuning

    @property
    def fits(self) -> bool:
        """Whether the run stays within 85 % of the budget."""
        return self.memory.resident <= USABLE_SHARE * self.vram_gb * GB

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        workload, adapted = self.workload, self.workload.method == "lora"
        base = parameter_count(workload.spec)
        return {
            "task": workload.task,
            "model_params": base,
            "hidden_size": workload.spec.hidden_size,
            "num_layers": workload.spec.num_hidden_layers,
            "num_classes": workload.num_classes if workload.task == "classify" else None,
            "recommended_method": workload.method,
            "recommended_rank": workload.adapter.r if adapted else None,
            "recommended_alpha": workload.adapter.alpha if adapted else None,
            "lora_rank": workload.adapter.r if adapted else None,
            "lora_adapters": len(workload.factors),
            "adapter_params_stored": workload.adapter_parameters,
            "adapter_params_trained": workload.adapter_parameters - workload.untrained_adapter_parameters,
            "head_params": workload.head_parameters,
            "trainable_params": workload.trained_parameters,
            "trainable_percent": 100 * workload.trained_parameters / base,
            "device": workload.device,
            "dtype": workload.dtype,
            "weight_dtype": workload.weight_dtype,
            "vram_gb": self.vram_gb,
            "memory_gb": self.memory.resident / GB,
            "utilization_percent": 100 * self.memory.resident / (self.vram_gb * GB),
            "fits": self.fits,
            "batch_size": self.batch_size,
            "max_seq_len": self.max_seq_len,
            "micro_batch_tokens": self.micro_batch_tokens,
            "epochs": self.epochs,
            "learning_rate": self.learning_rate,
            "plan_only": True,
            "memory_breakdown": {
                "model_bytes": self.memory.model,
                "adapter_bytes": self.memory.adapter,
                "optimizer_bytes": self.memory.optimizer,
                "gradient_bytes": self.memory.gradient,
                "activation_bytes": self.memory.activation,
                "logits_bytes": self.memory.logits,
                "total_bytes": self.memory.total,
                "mapped_bytes": self.memory.mapped,
                "resident_bytes": self.memory.resident,
                "savings_percent": 100 * (1 - self.memory.resident / self.full_memory.resident),
            },
        }


def plan(model: ModelSpec | str | Path, **settings: Any) -> Plan:
    """Return what fine-tuning `model` takes: parameters exactly, and memory at the peak of a training step.

    A batch runs in micro-batches of as many tokens as fit into 85 % of the budget, but at least one sequence.

    Args:
        model: the name of a published size, a checkpoint's folder (its config.json is read), or the sizes.
        **settings: fields of `Settings`.

    Raises:
        UsageError: a setting is unknown or out of range, or no size has the name.
        UnsupportedError: a method or task that is not built.
        AdapterError: the targets match nothing.
        LoraError: the folder's config.json is not as it must be.
    """
    unknown = sorted(settings.keys() - Settings.__dataclass_fields__.keys())
    if unknown:
        raise UsageError(
            f"unknown settings {', '.join(unknown)}; known: {', '.join(Settings.__dataclass_fields__)}"
        )
    chosen = Settings(**settings)
    spec, stored = _sizes(model)
    return _planned(_workload(spec, chosen, chosen.weight_dtype or stored), chosen)


def _sizes(model: ModelSpec | str | Path) -> tuple[ModelSpec, str]:
    """Return the sizes of `model` and the dtype that its weights are stored in."""
    if isinstance(model, ModelSpec):
        return model, "bfloat16"
    if isinstance(model, str) and Path(model).name == model and not Path(model).exists():
        return size_spec(model), "bfloat16"
    config = read_config(open_folder(model))
    text = {**config, **config.get("text_config", {})}
    # without an entry Transformers reads float32
    stored = text.get("dtype") or text.get("torch_dtype") or "float32"
    if stored not in STORED_BYTES:
        raise UnsupportedError(f"{model}: weights of dtype {stored!r}; built: {', '.join(STORED_BYTES)}")
    return read_spec(config), stored


def _workload(spec: ModelSpec, settings: Settings, weight_dtype: str) -> Workload:
    """Return the workload of `settings`; "auto" is an adapter, which is what this library is asked for."""
    adapter = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=settings.targets)
    adapter.validate()
    return Workload(
        spec,
        settings.task,
        "lora" if settings.method == "auto" else settings.method,
        adapter,
        num_classes=settings.num_classes,
        head_bias=settings.head_bias,
        dtype=settings.dtype,
        weight_dtype=weight_dtype,
        device=settings.device,
    )


def _planned(workload: Workload, settings: Settings) -> Plan:
    tokens = _micro_batch(workload, settings)
    return Plan(
        workload=workload,
        vram_gb=settings.vram_gb,
        batch_size=settings.batch_size,
        max_seq_len=settings.max_seq_len,
        micro_batch_tokens=tokens,
        epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        memory=_memory(workload, settings, tokens),
        full_memory=_memory(replace(workload, method="full"), settings, tokens),
    )


def _micro_batch(workload: Workload, settings: Settings) -> int:
    """Return the tokens that run at once: a whole batch where that fits, never less than one sequence.

    Without packing that is one sequence always.
    """
    budget, longest = settings.usable_bytes, settings.max_seq_len
    if not settings.packing:
        return longest
    fitting = most_tokens(
        lambda tokens: _memory(workload, settings, tokens).resident, budget, limit=settings.batch_tokens
    )
    if workload.device == "cpu":
        fitting = min(fitting, micro_batch_tokens(workload, HOST_ACTIVATION_BYTES, longest=longest))
    return max(fitting, longest)


def _memory(workload: Workload, settings: Settings, tokens: int) -> Memory:
    accumulates = settings.grad_accum > 1 or tokens < settings.batch_tokens
    return memory(workload, tokens, longest=settings.max_seq_len, accumulates=accumulates)
