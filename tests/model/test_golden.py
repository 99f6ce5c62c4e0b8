"""Our arithmetic against Transformers and PEFT: the oracle from outside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora.model.loading import load
from lora.model.model import Model
from lora.train.optimizer import AdamW
from tests.harness.bounds import relative
from tests.harness.models import GOLDEN, below, golden, write_golden_adapter, write_golden_model

CASES = sorted(path.stem for path in GOLDEN.glob("qwen*.npz"))
EXACT = 1e-6
FLOAT32_FACTOR = 3.0  # our float32 error over Transformers' own, at most


def golden_model(name: str, folder: Path, dtype: str) -> tuple[Model, dict[str, Any]]:
    arrays = golden(name)
    model = load(write_golden_model(folder / "base", arrays), dtype=dtype)
    if "lora_config" in arrays:
        model.load_adapter(write_golden_adapter(folder / "adapter", arrays))
    else:
        model.train_all()
    return model, arrays


def outcome(model: Model, arrays: dict[str, Any]) -> dict[str, Any]:
    ids, mask = arrays["input_ids"], arrays["attention_mask"]
    loss, gradients = model.loss_and_gradients(ids, arrays["labels"], mask)
    logits = model(ids, mask)
    counted = ~np.isnan(arrays["logits"])
    return {
        "logits": np.where(counted, logits, 0),
        "loss": loss,
        **{f"grad/{name}": gradient for name, gradient in gradients.items()},
    }


def expected(arrays: dict[str, Any]) -> dict[str, Any]:
    gradients = {f"grad/{name}": gradient for name, gradient in below(arrays, "grad").items()}
    return {"logits": np.nan_to_num(arrays["logits"]), "loss": arrays["loss"], **gradients}


@pytest.mark.parametrize("name", CASES)
def test_float64_agrees_with_transformers(name: str, tmp_path: Path) -> None:
    model, arrays = golden_model(name, tmp_path, "float64")
    ours, theirs = outcome(model, arrays), expected(arrays)
    assert ours.keys() == theirs.keys()
    errors = {key: relative(ours[key], theirs[key]) for key in theirs}
    assert max(errors.values()) < EXACT, errors


@pytest.mark.parametrize("name", CASES)
def test_float32_is_as_close_as_transformers(name: str, tmp_path: Path) -> None:
    model, arrays = golden_model(name, tmp_path, "float32")
    ours, theirs = outcome(model, arrays), expected(arrays)
    # a loss may hit its float64 value by luck: then half a float32 rounding is what can be asked
    luck = {"loss": float(np.finfo(np.float32).eps)}
    worse = {
        key: (error, theirs_error)
        for key in theirs
        if (error := relative(ours[key], theirs[key]))
        > FLOAT32_FACTOR * max(theirs_error := float(arrays[f"float32_error/{key}"]), luck.get(key, 0))
    }
    assert not worse


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_adamw_follows_the_trajectory(name: str, dtype: str, tmp_path: Path) -> None:
    model, arrays = golden_model(name, tmp_path, dtype)
    optimizer = AdamW(model, **arrays["adamw"])
    losses = []
    for _ in arrays["trajectory"]:
        loss, gradients = model.loss_and_gradients(
            arrays["input_ids"], arrays["labels"], arrays["attention_mask"]
        )
        losses.append(loss)
        optimizer.step(gradients)
    # an adapter moves in float32: where Transformers' own float32 leaves this path, three times its distance
    drift = float(arrays["float32_error/trajectory"]) * np.linalg.norm(arrays["trajectory"])
    assert np.linalg.norm(losses - arrays["trajectory"]) < max(1e-4, FLOAT32_FACTOR * drift)


def test_a_gate_read_as_the_second_half_is_seen(tmp_path: Path) -> None:
    """Planted: all queries first and all gates behind, where Qwen3.5 interleaves them head by head."""
    model, arrays = golden_model("qwen3_5_grouped", tmp_path, "float64")
    rows = 2 * model.spec.head_dim
    for name, weight in model.parameters.weights.items():
        if name.endswith("self_attn.q_proj.weight"):
            heads = weight.reshape(-1, 2, rows // 2, weight.shape[1])
            model.parameters.weights[name] = heads.swapaxes(0, 1).reshape(weight.shape)
    assert relative(outcome(model, arrays)["logits"], expected(arrays)["logits"]) > 1000 * EXACT
