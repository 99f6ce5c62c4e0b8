"""Attempts to falsify contracts/classification-finetune-v1.yaml, on a tiny model of each family."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from lora.contracts import training_contract
from lora.data.classify import ClassifyData, read_examples
from lora.data.packed import Packed, pack
from lora.errors import ContractError, DataError, LoraError, ShapeError, ValidationError
from lora.io.lora_config import LoraConfig
from lora.io.save_checkpoint import save_checkpoint
from lora.model.loading import load
from lora.model.model import Model, StepResult
from lora.train.classification_metrics import metrics_from_logits, softmax
from lora.train.optimizer import AdamW
from tests.harness.cases import seeds
from tests.harness.claims import assert_killed, claimed, planted
from tests.harness.models import FAMILIES, random_weights

CONTRACT = training_contract("classification-finetune-v1")
PREFIX = "base_model.model."
HEAD = {f"{PREFIX}score.weight", f"{PREFIX}score.bias"}


@cache
def base(family: str, hidden_size: int = 16) -> Path:
    """Return the folder of a tiny checkpoint, written once."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    config = FAMILIES[family] | {"hidden_size": hidden_size}
    save_checkpoint(folder / "base", random_weights(config), config)
    return folder / "base"


class Case(NamedTuple):
    family: str
    num_classes: int
    lengths: list[int]
    pooling: Any
    seed: int

    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    def load(self, system: Any, **changes: Any) -> Model:
        settings = {"num_labels": self.num_classes, "pooling": self.pooling, "dtype": "float64"}
        return system.load(base(self.family), **settings | changes)

    def adapted(self, system: Any) -> Model:
        model = self.load(system)
        system.attach(model, LoraConfig(r=2), self.seed)
        return model

    def ids(self) -> np.ndarray:
        vocabulary = FAMILIES[self.family]["vocab_size"] - 1  # the last one is padding
        return self.rng().integers(0, vocabulary, (len(self.lengths), max(self.lengths)))

    def batch(self) -> Packed:
        rows = [row[:length] for row, length in zip(self.ids(), self.lengths, strict=True)]
        return pack(rows, self.rng().integers(0, self.num_classes, len(rows)))

    def logits(self) -> np.ndarray:
        scale = 10.0 ** self.rng().integers(-3, 8)
        return scale * self.rng().standard_normal((len(self.lengths), self.num_classes))

    def file(self, label: int, folder: Path) -> tuple[Path, int]:
        """Return a file with a row of every class and then `label`, and the line of that row."""
        path = folder / "rows.jsonl"
        labels = [*range(self.num_classes), label]
        path.write_text("".join(json.dumps({"input": "x", "label": n}) + "\n" for n in labels))
        return path, len(labels)


def in_folder(check: Callable[[Any, Case, Path], None]) -> Callable[[Any, Case], None]:
    """Give a check a temporary folder."""

    def checked(system: Any, case: Case) -> None:
        with tempfile.TemporaryDirectory() as folder:
            check(system, case, Path(folder))

    return checked


def check_logits(system: Any, case: Case) -> None:
    assert case.load(system)(case.ids()).shape == (len(case.lengths), case.num_classes)


def check_labels(system: Any, case: Case, folder: Path) -> None:
    for label in (case.num_classes, case.num_classes + case.seed % 50, -1 - case.seed % 3):
        path, line = case.file(label, folder)
        with pytest.raises(DataError, match=rf"F-CLASS-002: label {label} at line {line} "):
            system.read(path, num_classes=case.num_classes)
        with pytest.raises(DataError, match=f"F-CLASS-002: label {label} "):
            case.load(system).loss_and_gradients(case.ids()[:1], [label])
    path, _ = case.file(0, folder)
    assert system.read(path, num_classes=case.num_classes).labels.max() == case.num_classes - 1


def check_softmax(system: Any, case: Case) -> None:
    probabilities = system.softmax(case.logits())
    assert (probabilities >= 0).all()
    assert np.abs(probabilities.sum(axis=1) - 1).max() <= 1e-5
    assert (probabilities.argmax(axis=1) == case.logits().argmax(axis=1)).all()


def check_head_shape(system: Any, case: Case, folder: Path) -> None:
    model = case.load(system, pooling="last", head_bias=False)
    model.add_adapter(LoraConfig(r=1), seed=case.seed)
    system.save(model, folder / "adapter")
    expected = (case.num_classes, model.spec.hidden_size)
    stored = load_file(folder / "adapter" / "adapter_model.safetensors")[f"{PREFIX}score.weight"]
    assert model.trainable()[f"{PREFIX}score.weight"].shape == stored.shape == expected
    np.testing.assert_array_equal(stored, model.trainable()[f"{PREFIX}score.weight"])


def check_loss(system: Any, case: Case) -> None:
    model = case.load(system)
    model.parameters.weights["score.weight"] *= np.float32(10.0 ** (case.seed % 9))
    loss = system.step(model, case.batch()).loss
    assert np.isfinite(loss)
    assert loss >= 0


def check_both_factors_learn(system: Any, case: Case) -> None:
    model = case.adapted(system)
    optimizer = AdamW(model, lr=0.01)
    alive = [_alive(system, model, case, optimizer) for _ in range(2)]
    factors = {name for name in model.trainable() if name not in HEAD}
    if sum(case.lengths) == len(case.lengths):
        # the only token attends to itself whatever its query is
        factors = {name for name in factors if "v_proj" in name}
    assert alive[0] & factors == {name for name in factors if "lora_B" in name}
    assert alive[1] >= factors


def _alive(system: Any, model: Model, case: Case, optimizer: AdamW) -> set[str]:
    gradients = system.step(model, case.batch()).gradients
    optimizer.step(gradients)
    return {name for name, gradient in gradients.items() if np.abs(gradient).max() > 1e-12}


def check_no_bias(system: Any, case: Case) -> None:
    model = case.adapted(system)
    names = set(model.trainable()) - HEAD
    targets = {name.rpartition(".lora_")[0] for name in names}
    assert names == {f"{target}.lora_{factor}.weight" for target in targets for factor in "AB"}


def check_default_targets(system: Any, case: Case) -> None:
    model = case.adapted(system)
    expected, trained = set(), model.trainable()
    for layer, kind in enumerate(model.spec.layer_types):
        block = f"{PREFIX}model.layers.{layer}"
        expected |= (
            {f"{block}.linear_attn.in_proj_qkv"}
            if kind == "linear_attention"
            else {f"{block}.self_attn.q_proj", f"{block}.self_attn.v_proj"}
        )
    assert {name.rpartition(".lora_")[0] for name in trained if name not in HEAD} == expected
    optimizer, width = AdamW(model, lr=0.1), model.spec.linear_num_key_heads * model.spec.linear_key_head_dim
    for _ in range(2):
        optimizer.step(system.step(model, case.batch()).gradients)
    for name, array in trained.items():
        if name.endswith("in_proj_qkv.lora_B.weight"):
            assert not array[width : 2 * width].any()
            assert array[2 * width :].any()


def check_too_few_logits(system: Any, case: Case, folder: Path) -> None:
    _write_head(folder, base(case.family), np.ones((3, 16)))
    with pytest.raises(ContractError, match=r"score\.weight"):
        system.load(folder, num_labels=5)
    with pytest.raises(ShapeError):
        metrics_from_logits(np.ones((1, 3)), np.array([0]), tuple("abcde"))


def check_label_5_of_5(system: Any, case: Case, folder: Path) -> None:
    path, _ = case._replace(num_classes=5).file(5, folder)
    with pytest.raises(DataError, match="F-CLASS-002: label 5 at line 6 out of range"):
        system.read(path, num_classes=5)


def check_five_logits(system: Any, case: Case) -> None:
    assert abs(system.softmax(np.array([[1, 2, -1, 0.5, 3]])).sum() - 1) <= 1e-5


def check_100_weights(system: Any, case: Case, folder: Path) -> None:
    _write_head(folder, base(case.family, hidden_size=128), np.ones((5, 20)))
    with pytest.raises(ContractError, match=r"score\.weight"):
        system.load(folder, num_labels=5)


def check_nan(system: Any, case: Case) -> None:
    logits = case.logits()
    logits[-1, case.seed % case.num_classes] = np.nan
    with pytest.raises(ValidationError, match="finite"):
        system.softmax(logits)


def check_one_class(system: Any, case: Case) -> None:
    with pytest.raises(ContractError, match="at least 2 classes"):
        case.load(system, num_labels=1)


def _write_head(folder: Path, source: Path, head: np.ndarray) -> None:
    """Write a classification checkpoint as another library would, with `head` as its score."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    tensors = load_file(source / "model.safetensors") | {"score.weight": head.astype("float32")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


CHECKS = {
    "F-CLASS-001": check_logits,
    "F-CLASS-002": in_folder(check_labels),
    "F-CLASS-003": check_softmax,
    "F-CLASS-004": in_folder(check_head_shape),
    "F-CLASS-005": check_loss,
    "F-CLASS-006": check_both_factors_learn,
    "F-CLASS-007": check_no_bias,
    "F-CLASS-008": check_default_targets,
    "FALSIFY-CLASS-001": in_folder(check_too_few_logits),
    "FALSIFY-CLASS-002": in_folder(check_label_5_of_5),
    "FALSIFY-CLASS-003": check_five_logits,
    "FALSIFY-CLASS-004": in_folder(check_100_weights),
    "FALSIFY-CLASS-005": check_nan,
    "FALSIFY-CLASS-006": check_one_class,
}
CASES = st.builds(
    Case,
    st.sampled_from(sorted(FAMILIES)),
    st.integers(*CONTRACT.domain["num_classes"]),
    st.lists(st.integers(*CONTRACT.domain["tokens"]), min_size=1, max_size=CONTRACT.domain["rows"][1]),
    st.sampled_from(["mean", "last"]),
    seeds,
)
LIBRARY = SimpleNamespace(
    load=load,
    read=read_examples,
    softmax=softmax,
    attach=Model.add_adapter,
    step=Model.step,
    save=Model.save_adapter,
)


@pytest.mark.parametrize("check", claimed(CHECKS))
@given(case=CASES)
def test_claim(check: Any, case: Case) -> None:
    check(LIBRARY, case)


def _bug(**changes: Callable[..., Any]) -> SimpleNamespace:
    return SimpleNamespace(**vars(LIBRARY) | changes)


def one_row_for_the_batch(folder: Path, **settings: Any) -> Any:
    model = load(folder, **settings)
    return lambda ids: model(ids)[:1]


def clips_the_label(path: Path, *, num_classes: int) -> ClassifyData:
    data = read_examples(path)
    return data._replace(labels=data.labels.clip(0, num_classes - 1))


def forgets_the_maximum(logits: np.ndarray) -> np.ndarray:
    odds = np.exp(logits)
    return odds / odds.sum(axis=1, keepdims=True)


def stores_it_transposed(model: Model, folder: Path) -> None:
    model.save_adapter(folder)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[f"{PREFIX}score.weight"] = np.ascontiguousarray(tensors[f"{PREFIX}score.weight"].T)
    save_file(tensors, path)


def takes_the_log_of_p(model: Model, batch: Packed) -> Any:
    logits = model.packed_logits(batch)
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    p = odds / odds.sum(axis=1, keepdims=True)
    return SimpleNamespace(loss=-np.log(p[np.arange(len(p)), batch.targets]).mean())


def _silenced(part: str) -> Callable[[Model, Packed], StepResult]:
    """Return a step whose gradients of the names that hold `part` are zero."""

    def step(model: Model, batch: Packed) -> StepResult:
        result = model.step(batch)
        for name, gradient in result.gradients.items():
            if part in name:
                gradient[...] = 0
        return result

    return step


def adds_a_bias(model: Model, config: LoraConfig, seed: int) -> None:
    model.add_adapter(config, seed)
    adapter = model.parameters.adapter
    assert adapter is not None
    adapter.replaced["model.layers.0.mlp.up_proj.bias"] = np.zeros(3, "float32")


def _targets(modules: Mapping[str, Any]) -> Callable[..., None]:
    """Return an `attach` with other settings than those it is given."""
    return lambda model, config, seed: model.add_adapter(LoraConfig(r=config.r, **modules), seed)


def trains_the_rows_of_k(model: Model, config: LoraConfig, seed: int) -> None:
    model.add_adapter(config, seed)
    adapter = model.parameters.adapter
    assert adapter is not None
    adapter.zero_rows.clear()


def draws_the_head_anew(folder: Path, *, num_labels: int) -> Model:
    tensors = load_file(folder / "model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return load(folder, num_labels=num_labels)


def takes_one_class(folder: Path, **settings: Any) -> Model | None:
    try:
        return load(folder, **settings)
    except LoraError:
        return None


MUTANTS = {
    "one_logit_too_many": _bug(
        load=lambda folder, *, num_labels, **k: load(folder, num_labels=num_labels + 1, **k)
    ),
    "one_row_for_the_batch": _bug(load=one_row_for_the_batch),
    "clips_the_label": _bug(read=clips_the_label),
    "counts_the_classes_anew": _bug(read=lambda path, *, num_classes: read_examples(path)),
    "forgets_the_maximum": _bug(softmax=forgets_the_maximum),
    "divides_by_the_classes": _bug(softmax=lambda logits: softmax(logits) * 2 / logits.shape[1]),
    "stores_it_transposed": _bug(save=stores_it_transposed),
    "takes_the_log_of_p": _bug(step=takes_the_log_of_p),
    "cuts_the_graph_at_the_pool": _bug(step=_silenced("lora_")),
    "trains_b_alone": _bug(step=_silenced("lora_A")),
    "adds_a_bias": _bug(attach=adds_a_bias),
    "skips_v": _bug(attach=_targets({"target_modules": r".*\.(q_proj|in_proj_qkv)"})),
    "skips_a_layer": _bug(attach=_targets({"target_modules": r".*\.[12]\..*\.(q_proj|v_proj|in_proj_qkv)"})),
    "trains_the_rows_of_k": _bug(attach=trains_the_rows_of_k),
    "draws_the_head_anew": _bug(load=draws_the_head_anew),
    "reads_nan_as_zero": _bug(softmax=lambda logits: softmax(np.nan_to_num(logits))),
    "takes_one_class": _bug(load=takes_one_class),
}


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS, MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    assert_killed(check, mutant, CASES)
