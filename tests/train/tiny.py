"""Tiny models to train: every case gets a fresh one, from checkpoints that are written once."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lora.errors import DivergedError
from lora.io.lora_config import LoraConfig
from lora.io.save_checkpoint import save_checkpoint
from lora.model.loading import load
from lora.model.model import Model
from lora.ops import adamw
from tests.harness.models import TINY_QWEN2, random_weights

VOCABULARY = TINY_QWEN2["vocab_size"]
CLASSES = 3
BOUNDS = {"float64": 1e-12, "float32": 2e-5}  # norm-wise


@cache
def base() -> Path:
    """Return the folder of a checkpoint of two layers, so tame that float32 keeps 5 digits of a gradient."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    config = TINY_QWEN2 | {"num_hidden_layers": 2}
    weights = random_weights(config)
    tame = {name: array if name.endswith("norm.weight") else array / 2 for name, array in weights.items()}
    save_checkpoint(folder / "base", tame, config)
    return folder / "base"


def untrained(*, classify: bool, dtype: str = "float64", targets: Any = "all-linear", seed: int = 1) -> Model:
    """Return a model with an adapter at its start: B is zero."""
    model = load(base(), dtype=dtype, num_labels=CLASSES if classify else None)
    model.add_adapter(LoraConfig(r=2, target_modules=targets), seed=seed)
    return model


def trained(*, classify: bool, dtype: str = "float64", targets: Any = "all-linear") -> Model:
    """Return a model whose B's are random, so that every gradient is alive."""
    model = untrained(classify=classify, dtype=dtype, targets=targets)
    rng = np.random.default_rng(2)
    for name, array in model.trainable().items():
        if "lora_B" in name:
            array[...] = 0.05 * rng.standard_normal(array.shape)
    return model


class Recorder:
    """Stands in for the optimizer: keeps the gradients as they enter its arithmetic, and moves nothing."""

    def __init__(self) -> None:
        self.gradients: dict[str, np.ndarray] | None = None

    def step(self, gradients: dict[str, np.ndarray], lr: float | None = None, *, clip: float = 0.0) -> float:
        arrays = [np.ascontiguousarray(gradient) for gradient in gradients.values()]
        still = [np.zeros_like(array) for array in arrays]
        # with beta1 = 0 the first moment is the gradient of the step
        moments = [(np.zeros_like(array), np.zeros_like(array)) for array in arrays]
        scalars = {"beta1": 0.0, "beta2": 0.0, "eps": 1.0, "weight_decay": 0.0}
        norm = adamw.step(still, arrays, moments, step=1, lr=0.0, **scalars, clip=clip)
        if not np.isfinite(norm):
            raise DivergedError(f"the norm is {norm}")
        self.gradients = {name: m for name, (m, _) in zip(gradients, moments, strict=True)}
        return norm
