"""Fine-tune Qwen models with LoRA, with nothing between you and the arithmetic but NumPy and CuPy.

    import lora

    model = lora.load("Qwen/Qwen2.5-Coder-0.5B")
    run = lora.finetune(model, "train.jsonl", task="classify", output="checkpoints")

`import lora` itself loads the errors and nothing else: a name below is imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lora import blas_start
from lora.errors import (
    AdapterError,
    ContractError,
    DataError,
    DeviceError,
    DivergedError,
    FileFormatError,
    KernelError,
    LoadError,
    LoraError,
    LoraWarning,
    MissingFileError,
    ShapeError,
    UnsupportedError,
    UsageError,
    ValidationError,
    WriteError,
)

if TYPE_CHECKING:
    from lora.estimate import Plan, plan
    from lora.io.lora_config import LoraConfig
    from lora.model.loading import load
    from lora.model.model import Model
    from lora.train.callbacks import Callback
    from lora.train.config import FinetuneConfig
    from lora.train.finetune import finetune
    from lora.train.optimizer import AdamW
    from lora.train.recipe import read_recipe
    from lora.train.run import Run
    from lora.train.several import finetune_each

blas_start.prepare()

__version__ = "0.1.0"

_HOMES = {
    "AdamW": "lora.train.optimizer",
    "Callback": "lora.train.callbacks",
    "FinetuneConfig": "lora.train.config",
    "LoraConfig": "lora.io.lora_config",
    "Model": "lora.model.model",
    "Plan": "lora.estimate",
    "Run": "lora.train.run",
    "finetune": "lora.train.finetune",
    "finetune_each": "lora.train.several",
    "load": "lora.model.loading",
    "plan": "lora.estimate",
    "read_recipe": "lora.train.recipe",
}

__all__ = [
    "AdamW",
    "AdapterError",
    "Callback",
    "ContractError",
    "DataError",
    "DeviceError",
    "DivergedError",
    "FileFormatError",
    "FinetuneConfig",
    "KernelError",
    "LoadError",
    "LoraConfig",
    "LoraError",
    "LoraWarning",
    "MissingFileError",
    "Model",
    "Plan",
    "Run",
    "ShapeError",
    "UnsupportedError",
    "UsageError",
    "ValidationError",
    "WriteError",
    "finetune",
    "finetune_each",
    "load",
    "plan",
    "read_recipe",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lora' has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
