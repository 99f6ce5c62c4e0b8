"""Runs one tiny random model in Transformers and PEFT and records what it computed.

The keys of the recorded arrays are listed in README.md beside this file. Weights and adapters are read back
from the files that `save_pretrained` wrote, so their names and `config.json` are the ones found on disk.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import peft
import torch
import transformers
from cases import Batch, Case
from float64_judge import check_that_the_guard_bites, float64_only
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.numpy import load_file
from summation_orders import reordered
from transformers import PreTrainedModel

FOLDER = Path(__file__).parent
TRAJECTORY_STEPS = 25
WEIGHT_DECAY = 0.01
SUMMATION_ORDERS = 8  # in which float32 is run, to record its largest error and not a lucky one

Arrays = dict[str, np.ndarray]
# (parameter name, shape, generator) -> float32 values
Initializer = Callable[[str, torch.Size, torch.Generator], torch.Tensor]


class Result(NamedTuple):
    """What one run in one precision gave."""

    logits: np.ndarray  # [B, T, V], NaN where the mask is 0; a classifier: [B, num_labels]
    loss: np.ndarray  # []
    gradients: Arrays  # by the name on disk
    trajectory: np.ndarray  # [TRAJECTORY_STEPS], the loss before each update


def write(case: Case, initializer: Initializer, *, peft_folder: Path | None = None) -> None:
    """Record a case as `<name>.npz` beside this file, and its adapter as PEFT saves it in `peft_folder`."""
    arrays = record(case, initializer, peft_folder=peft_folder)
    path = FOLDER / f"{case.name}.npz"
    np.savez_compressed(path, **arrays)
    worst = max(error for key, error in arrays.items() if key.startswith("float32_error/grad/"))
    print(
        f"{path.name}: {path.stat().st_size / 1024:.0f} KiB, loss {arrays['loss']:.4f} down to"
        f" {arrays['trajectory'][-1]:.4f}, float32 error: logits"
        f" {arrays['float32_error/logits']:.1e}, worst gradient {worst:.1e}, trajectory"
        f" {arrays['float32_error/trajectory']:.1e}"
    )


def record(case: Case, initializer: Initializer, *, peft_folder: Path | None = None) -> Arrays:
    """All arrays of a case: the checkpoint, the adapter, the batch, the float64 results, float32's errors."""
    model = case.model_class(copy.deepcopy(case.config))
    model.name_or_path = case.name  # PEFT writes it as base_model_name_or_path
    generator = torch.Generator().manual_seed(case.seed)
    randomize(model, initializer, generator)
    arrays = _saved_checkpoint(model) | _batch_arrays(case.batch) | _settings(case)
    if case.lora is not None:
        model = get_peft_model(model, copy.deepcopy(case.lora))
        randomize(model, initializer, generator)
        arrays |= _saved_adapter(model, peft_folder)
    state = model.state_dict()
    check_that_the_guard_bites(lambda: _forward(_built(case, state).double(), case.batch))
    return arrays | _results(case, state)


def randomize(model: torch.nn.Module, initializer: Initializer, generator: torch.Generator) -> None:
    """Draw every trainable parameter; under PEFT those are the adapter's, and the base keeps its values."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(initializer(name, parameter.shape, generator))


def _saved_checkpoint(model: PreTrainedModel) -> Arrays:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        weights = load_file(Path(folder, "model.safetensors"))
        config = Path(folder, "config.json").read_text()
    return {"config": np.array(config)} | {f"weight/{name}": weight for name, weight in weights.items()}


def _saved_adapter(model: PeftModel, folder: Path | None) -> Arrays:
    with tempfile.TemporaryDirectory() as temporary:
        folder = folder or Path(temporary)
        model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink()  # a model card full of placeholders
        adapter = load_file(folder / "adapter_model.safetensors")
        config = (folder / "adapter_config.json").read_text()
    return {"lora_config": np.array(config)} | {f"adapter/{name}": tensor for name, tensor in adapter.items()}


def _settings(case: Case) -> Arrays:
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft, np)}
    optimizer = {"lr": case.learning_rate, "weight_decay": WEIGHT_DECAY}
    return {"versions": np.array(json.dumps(versions)), "adamw": np.array(json.dumps(optimizer))}


def _batch_arrays(batch: Batch) -> Arrays:
    return {name: tensor.numpy() for name, tensor in vars(batch).items()}


def _results(case: Case, state: dict[str, torch.Tensor]) -> Arrays:
    exact = _evaluated(case, state, in_float64=True)
    _require_informative_gradients(exact.gradients)
    errors = [_float32_errors(case, state, exact)]
    for seed in range(1, SUMMATION_ORDERS):
        other = _reordered(case, state, seed)
        other_exact = _evaluated(case, other, in_float64=True)
        _require_same_logits(other_exact, exact)
        errors.append(_float32_errors(case, other, other_exact))
    largest = {f"float32_error/{key}": np.max([drawn[key] for drawn in errors]) for key in errors[0]}
    return _flattened(exact) | largest


def _float32_errors(case: Case, state: dict[str, torch.Tensor], exact: Result) -> Arrays:
    rounded, arrays = _flattened(_evaluated(case, state, in_float64=False)), _flattened(exact)
    return {key: _relative_error(value, arrays[key]) for key, value in rounded.items()}


def _reordered(case: Case, state: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    sizes = {name: getattr(case.config, name) for name in ("hidden_size", "intermediate_size")}
    return reordered(state, **sizes, seed=seed)


def _evaluated(case: Case, state: dict[str, torch.Tensor], *, in_float64: bool) -> Result:
    with float64_only() if in_float64 else nullcontext():
        model = _built(case, state)
        output = _forward(model, case.batch)
        output.loss.backward()
        gradients = _by_name_on_disk(model)
        trajectory = _trajectory(model, case)
    logits = output.logits.detach().numpy().copy()
    if case.batch.labels.ndim == 2:
        # what a model says after the padding means nothing, and Qwen3.5 in other layouts says something else
        logits[case.batch.attention_mask.numpy() == 0] = np.nan
    return Result(logits, output.loss.detach().numpy().copy(), gradients, trajectory)


def _built(case: Case, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    model = case.model_class(copy.deepcopy(case.config))
    if case.lora is not None:
        model = get_peft_model(model, copy.deepcopy(case.lora))
    model.load_state_dict(state)
    return model.eval()


def _forward(model: torch.nn.Module, batch: Batch) -> transformers.utils.ModelOutput:
    return model(**vars(batch), use_cache=False)


def _by_name_on_disk(model: torch.nn.Module) -> Arrays:
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    if isinstance(model, PeftModel):
        gradients = get_peft_model_state_dict(model, state_dict=gradients, save_embedding_layers=False)
    return {name: gradient.numpy() for name, gradient in gradients.items()}


def _trajectory(model: torch.nn.Module, case: Case) -> np.ndarray:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=case.learning_rate, weight_decay=WEIGHT_DECAY)
    losses = []
    for _ in range(TRAJECTORY_STEPS):
        optimizer.zero_grad()
        loss = _forward(model, case.batch).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return np.array(losses)


def _flattened(result: Result) -> Arrays:
    gradients = {f"grad/{name}": gradient for name, gradient in result.gradients.items()}
    return {"logits": result.logits, "loss": result.loss, "trajectory": result.trajectory} | gradients


def _relative_error(rounded: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """||rounded - exact|| / ||exact|| in the Frobenius norm, over the positions that are not padding."""
    counted = ~np.isnan(exact)
    difference = rounded.astype(np.float64)[counted] - exact[counted]
    return np.array(np.linalg.norm(difference) / np.linalg.norm(exact[counted]))


def _require_same_logits(reordered: Result, exact: Result) -> None:
    """Sums in another order may differ by float64's rounding and no more: it must be the same function."""
    difference = _relative_error(reordered.logits, exact.logits)
    if not 0 < difference < 1e-12:
        raise AssertionError(
            f"reordering must move float64 logits by rounding alone, below 1e-12; found {difference:.1e}"
        )


def _require_informative_gradients(gradients: Arrays) -> None:
    """Every tensor must have a gradient that is finite and not zero: a comparison of zeros proves nothing."""
    empty = [name for name, gradient in gradients.items() if not 0 < np.linalg.norm(gradient) < np.inf]
    if empty:
        raise AssertionError(f"expected finite gradients that are not zero, found none for {empty}")
