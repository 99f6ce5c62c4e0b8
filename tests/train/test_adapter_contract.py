"""Attempts to falsify contracts/training/adapter.yaml."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.backend import named_stream
from lora.contracts import training_contract
from lora.data.packed import Packed, pack, pack_causal
from lora.errors import LoraWarning
from lora.io.base_hash import base_hash
from lora.io.checkpoint import Checkpoint
from lora.io.lora_config import LoraConfig
from lora.io.save_checkpoint import save_checkpoint
from lora.model.loading import load
from lora.model.model import Model
from lora.train.optimizer import AdamW
from lora.train.step import train_step
from tests.harness.bounds import relative
from tests.harness.cases import seeds
from tests.harness.claims import assert_killed, claimed, planted
from tests.train.tiny import CLASSES, VOCABULARY, base

CONTRACT = training_contract("adapter")


class Case(NamedTuple):
    targets: Any
    rank: int
    steps: int
    classify: bool
    seed: int

    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    def model(self, folder: Path | None = None) -> Model:
        return load(folder or base(), dtype="float64", num_labels=CLASSES if self.classify else None)

    def config(self, targets: Any = None) -> LoraConfig:
        return LoraConfig(r=self.rank, target_modules=targets or self.targets)

    def batch(self) -> Packed:
        rng = self.rng()
        rows = [rng.integers(0, VOCABULARY, length) for length in (5, 3)]
        return pack(rows, rng.integers(0, CLASSES, 2)) if self.classify else pack_causal(rows)

    def ids(self) -> np.ndarray:
        return self.rng().integers(0, VOCABULARY, (2, 6))


def trained(system: Any, case: Case, folder: Path | None = None) -> Model:
    """Return a model whose adapter was trained for the case's steps, and is seen in the logits."""
    model = case.model(folder)
    system.attach(model, case.config(), case.seed)
    system.train(model, case)
    return model


def base_bytes(model: Model) -> dict[str, bytes]:
    """Return every weight but the head's, which is trained."""
    weights = model.parameters.weights
    return {name: np.array(a).tobytes() for name, a in weights.items() if not name.startswith("score.")}


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_base_stays(system: Any, case: Case) -> None:
    before, files = base_bytes(case.model()), file_bytes(base())
    with TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(base(), folder, dirs_exist_ok=True))
        model = trained(system, case, copy)
        assert file_bytes(copy) == files
    moved = [array for name, array in model.trainable().items() if "lora_B" in name and array.any()]
    assert moved, "nothing was trained: that the base stays says nothing"
    assert base_bytes(model) == before


def check_starts_as_the_base(system: Any, case: Case) -> None:
    model = case.model()
    logits = model(case.ids())
    system.attach(model, case.config(), case.seed)
    assert relative(model(case.ids()), logits) < 1e-12


def check_start_of_each(system: Any, case: Case) -> None:
    def starts(targets: Any, seed: int) -> dict[str, np.ndarray]:
        model = case.model()
        system.attach(model, case.config(targets), seed)
        return {name: array for name, array in model.trainable().items() if "lora_A" in name}

    few, many = starts(["v_proj"], case.seed), starts("all-linear", case.seed)
    other = starts(["v_proj"], case.seed + 1)
    for name, array in few.items():
        np.testing.assert_array_equal(many[name], array)
        assert (other[name] != array).any()


def check_merge(system: Any, case: Case) -> None:
    model = trained(LIBRARY, case)
    plain, logits = case.model()(case.ids()), model(case.ids())
    if not case.classify:
        assert relative(plain, logits) > 1e-3, "the adapter must be seen, or merging nothing would do"
    system.merge(model)
    assert relative(model(case.ids()), logits) < 1e-5
    assert model.parameters.adapter is None


def check_unmerge(system: Any, case: Case) -> None:
    model = trained(LIBRARY, case)
    before, logits = base_bytes(model), model(case.ids())
    for _ in range(2):
        model.merge_adapter()
        system.unmerge(model)
    assert base_bytes(model) == before
    np.testing.assert_array_equal(model(case.ids()), logits)


def check_base_is_known(system: Any, case: Case) -> None:
    with TemporaryDirectory() as parent, pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora.io.base_hash.base_hash", system.base_hash)
        folder = Path(shutil.copytree(base(), Path(parent) / "base"))
        model = case.model(folder)
        model.add_adapter(case.config())
        facts = {"base_hash": system.base_hash(model.checkpoint)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LoraWarning)  # a mean-pooled head
            model.save_adapter(Path(parent) / "adapter", metadata=facts)
        weights, config = dict(model.checkpoint.tensors), dict(model.checkpoint.config)
        save_checkpoint(Path(parent) / "shards", weights, config, shard_bytes=5_000)
        load(Path(parent) / "adapter")
        load(Path(parent) / "adapter", base=Path(parent) / "shards")  # a warning is an error here
        name = sorted(weights)[case.seed % len(weights)]
        moved = weights | {name: weights[name] * np.float32(1 + 1e-6)}
        longer = config | {"rope_theta": 2 * config["rope_theta"]}
        for number, changed in enumerate(((moved, config), (weights, longer))):
            save_checkpoint(Path(parent) / f"changed-{number}", *changed)
            with pytest.warns(LoraWarning, match=f"changed-{number} is not the base that was trained on"):
                load(Path(parent) / "adapter", base=Path(parent) / f"changed-{number}")


CHECKS = {
    "ADAPTER-001": check_base_stays,
    "ADAPTER-002": check_starts_as_the_base,
    "ADAPTER-003": check_start_of_each,
    "ADAPTER-004": check_merge,
    "ADAPTER-005": check_unmerge,
    "ADAPTER-006": check_base_is_known,
}
CASES = st.builds(
    Case,
    st.sampled_from(["qv", "attention", "mlp", "all-linear", ["o_proj"]]),
    st.integers(*CONTRACT.domain["rank"]),
    st.integers(*CONTRACT.domain["steps"]),
    st.booleans(),
    seeds,
)


def train(model: Model, case: Case) -> None:
    optimizer = AdamW(model, lr=0.1)
    for _ in range(case.steps):
        train_step(model, optimizer, [case.batch()], lr=0.1, clip=1.0, micro_tokens=100)


LIBRARY = SimpleNamespace(
    attach=Model.add_adapter,
    train=train,
    merge=Model.merge_adapter,
    unmerge=Model.unmerge_adapter,
    base_hash=base_hash,
)


@pytest.mark.parametrize("check", claimed(CHECKS))
@given(case=CASES)
def test_claim(check: Any, case: Case) -> None:
    check(LIBRARY, case)


def _bug(**changes: Callable[..., Any]) -> SimpleNamespace:
    return SimpleNamespace(**vars(LIBRARY) | changes)


def moves_the_base(model: Model, case: Case) -> None:
    train(model, case)
    name = "model.layers.0.mlp.up_proj.weight"
    model.parameters.weights[name] = np.nextafter(model.parameters.weights[name], np.float32(1))


def moves_the_file(model: Model, case: Case) -> None:
    train(model, case)
    path = model.checkpoint.folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def draws_b_too(model: Model, config: LoraConfig, seed: int) -> None:
    model.add_adapter(config, seed)
    for name, array in model.trainable().items():
        if "lora_B" in name:
            array[...] = 1e-6 * np.random.default_rng(seed).standard_normal(array.shape)


def draws_from_one_stream(model: Model, config: LoraConfig, seed: int) -> None:
    model.add_adapter(config, seed)
    rng = named_stream(seed, "A")
    for name, array in model.trainable().items():
        if "lora_A" in name:
            array[...] = rng.standard_normal(array.shape)


def merges_without_the_scale(model: Model) -> None:
    factors = _factors(model)
    factors |= {module: f._replace(scale=1.0) for module, f in factors.items()}
    model.merge_adapter()


def merges_one_module_less(model: Model) -> None:
    factors = _factors(model)
    del factors[max(factors)]
    model.merge_adapter()


def leaves_the_adapter_on(model: Model) -> None:
    model.merge_adapter()
    model.parameters.merged = None


def subtracts_the_product(model: Model) -> None:
    adapter = next(iter(model.parameters.adapters.values()))
    for module, f in adapter.factors.items():
        merged = model.parameters.weights[f"{module}.weight"]
        model.parameters.weights[f"{module}.weight"] = merged - np.float32(f.scale) * (f.b @ f.a)
    model.parameters.merged = None


def hashes_the_headers(checkpoint: Checkpoint) -> str:
    headers = {name: (str(array.dtype), array.shape) for name, array in checkpoint.tensors.items()}
    return str((dict(checkpoint.config), sorted(headers.items())))


def hashes_the_weights_alone(checkpoint: Checkpoint) -> str:
    return str({name: checkpoint.tensors[name].tobytes() for name in sorted(checkpoint.tensors)})


def hashes_the_files(checkpoint: Checkpoint) -> str:
    return str(sorted(file_bytes(checkpoint.folder).items()))


def _factors(model: Model) -> dict[str, Any]:
    adapter = model.parameters.adapter
    assert adapter is not None
    return adapter.factors


MUTANTS = {
    "moves_the_base": _bug(train=moves_the_base),
    "moves_the_file": _bug(train=moves_the_file),
    "draws_b_too": _bug(attach=draws_b_too),
    "draws_from_one_stream": _bug(attach=draws_from_one_stream),
    "ignores_the_seed": _bug(attach=lambda model, config, seed: model.add_adapter(config, 0)),
    "merges_without_the_scale": _bug(merge=merges_without_the_scale),
    "merges_one_module_less": _bug(merge=merges_one_module_less),
    "leaves_the_adapter_on": _bug(merge=leaves_the_adapter_on),
    "subtracts_the_product": _bug(unmerge=subtracts_the_product),
    "hashes_the_headers": _bug(base_hash=hashes_the_headers),
    "hashes_the_weights_alone": _bug(base_hash=hashes_the_weights_alone),
    "hashes_the_files": _bug(base_hash=hashes_the_files),
}


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS, MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    assert_killed(check, mutant, CASES)
