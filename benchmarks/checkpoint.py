"""Write a case's checkpoint, adapter and batches: `python -m benchmarks.checkpoint CASE ROUNDS SEED FOLDER`.

A process of its own, because a process inherits the peak memory of the one that started it: what measures
must never have held a model.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import models
from benchmarks.cases import ALPHA, CASES, RANK, Case
from benchmarks.data import draw
from lora import LoraConfig
from lora.backend import bfloat16, named_stream
from lora.io.peft import peft_name, save_adapter
from lora.io.safetensors_file import Deferred
from lora.io.save_checkpoint import save_checkpoint
from lora.io.targets import expanded, match_targets
from lora.spec import adaptable_modules, read_spec

ADAPTER, BATCHES = "adapter", "batches.json"  # in the folder of a case


def write_case(case: Case, rounds: int, seed: int, folder: Path) -> None:
    """Write what every contestant of `case` reads; a model that is there already is kept.

    Args:
        case: whose model, adapter and rows.
        rounds: how many turns the rows are for.
        seed: of the rows.
        folder: the cache: a folder for each model, and one for each case.
    """
    config, model, own = models.config(case.model, case.task), model_folder(folder, case), folder / case.name
    if not (model / "config.json").is_file():
        write_model(case, config, model)
    write_adapter(case, config, own / ADAPTER)
    batches = draw(case.lengths, case.task, models.content_ids(config), rounds, seed)
    (own / BATCHES).write_text(json.dumps([batch.as_json() for batch in batches]))


def model_folder(cache: Path, case: Case) -> Path:
    """Return where the checkpoint of `case` lies; cases of one model and task share it."""
    return cache / f"{case.model}-{case.task}"


def write_model(case: Case, config: dict[str, Any], folder: Path) -> None:
    """Write random weights in bfloat16, the dtype that published checkpoints have on disk."""
    spec, tensors = read_spec(config), {}

    def maker(name: str, shape: tuple[int, ...]) -> Callable[[], Any]:
        return lambda: models.random_tensor(spec, name, shape, named_stream(0, name)).astype(bfloat16)

    for name, shape in models.shapes(config, case.task).items():
        tensors[name] = Deferred(shape, bfloat16, maker(name, shape))
    save_checkpoint(folder, tensors, config | {"torch_dtype": "bfloat16"})


def write_adapter(case: Case, config: dict[str, Any], folder: Path) -> None:
    """Write an adapter whose B is not zero: with B = 0 every gradient of A is zero, and proves nothing."""
    modules = adaptable_modules(read_spec(config))
    task_type = "SEQ_CLS" if case.task == "classify" else "CAUSAL_LM"
    chosen = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=case.targets, task_type=task_type)
    chosen = expanded(chosen, modules)
    tensors, rng = {}, np.random.default_rng(1)
    for module in match_targets(chosen, modules):
        rows, columns = modules[module]
        for kind, shape in (("lora_A.weight", (RANK, columns)), ("lora_B.weight", (rows, RANK))):
            tensors[peft_name(module, kind)] = rng.standard_normal(shape, np.float32) / shape[1] ** 0.5
    if case.task == "classify":
        shape = models.shapes(config, case.task)[models.SCORE]
        tensors[peft_name("score", "weight")] = 0.02 * rng.standard_normal(shape, np.float32)
    save_adapter(folder, chosen, tensors, {})


def main(arguments: list[str]) -> None:
    """Run as a command."""
    name, rounds, seed, folder = arguments
    case = next(case for case in CASES if case.name == name)
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_case(case, int(rounds), int(seed), Path(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
