"""Attempts to falsify contracts/training/device.yaml, on an emulated device and, with --gpu, on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

import lora
import lora.io.peft
import lora.model.merging
import lora.train.state
from lora.backend import array_module, bfloat16, to_host
from lora.backend.device import on_device
from lora.contracts import training_contract
from lora.data.packed import Packed, pack, pack_causal
from lora.dispatch import REFERENCE
from lora.errors import LoraWarning, UnsupportedError
from lora.io.save_checkpoint import save_checkpoint
from lora.model.loading import Base, open_base
from lora.model.model import Model
from lora.train.evaluate import class_probabilities
from lora.train.optimizer import AdamW
from lora.train.state import read_state, restore, write_state
from lora.train.step import train_step
from tests.emulator import requires_emulator
from tests.emulator.device import emulated_device
from tests.harness.bounds import relative
from tests.harness.claims import claimed, planted
from tests.harness.models import TINY_QWEN2, random_weights

CONTRACT = training_contract("device")
CONFIG = TINY_QWEN2 | {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,  # the narrowest that the attention kernels have
    "intermediate_size": 40,
    "torch_dtype": "bfloat16",
}
SEQUENCES = [np.random.default_rng(length).integers(0, CONFIG["vocab_size"], length) for length in (5, 17, 9)]
AGREES = 0.02  # norm-wise, of two orders of rounding to bfloat16: gradients and outputs
FOLLOWS = {"rtol": 0.015, "atol": 0.0015}  # losses of ten steps, in nats


@pytest.fixture(
    params=[pytest.param("emulated", marks=requires_emulator), pytest.param("gpu", marks=pytest.mark.gpu)]
)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Give the name of a device that is there for the test."""
    if request.param == "gpu":
        yield "cuda"
        return
    with emulated_device(seed=11):
        yield "cuda"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of two layers in bfloat16."""
    folder = tmp_path_factory.mktemp("base")
    tame = {name: array if array.ndim == 1 else array / 2 for name, array in random_weights(CONFIG).items()}
    save_checkpoint(folder, {name: array.astype(bfloat16) for name, array in tame.items()}, CONFIG)
    return folder


def model_on(device: str, base: Path, *, classify: bool) -> Model:
    model = lora.load(base, device=device, dtype="bfloat16", num_labels=3 if classify else None)
    model.add_adapter(lora.LoraConfig(r=4, target_modules="all-linear"), seed=1)
    return model


def batch_of(*, classify: bool) -> Packed:
    return pack(SEQUENCES, np.array([0, 2, 1])) if classify else pack_causal(SEQUENCES)


def ten_steps(model: Model, *, classify: bool) -> list[float]:
    optimizer = AdamW(model, lr=5e-3)
    settings = {"lr": 5e-3, "clip": 1.0, "micro_tokens": 20}
    return [train_step(model, optimizer, [batch_of(classify=classify)], **settings).loss for _ in range(10)]


def outputs(model: Model) -> np.ndarray:
    """Return class probabilities [3, C], or the logits of all tokens [N, V]."""
    if model.is_classifier:
        return class_probabilities(model, SEQUENCES)
    return to_host(model.packed_logits(pack(SEQUENCES)))


def noted(classify: bool) -> Any:
    """Expect the note that Transformers would pool otherwise, of a classifier."""
    return pytest.warns(LoraWarning, match="Transformers") if classify else nullcontext()


def reference(base: Path, *, classify: bool) -> Model:
    """Return the same model on the operations as they are defined."""
    model = model_on("cpu", base, classify=classify)
    model.ops = REFERENCE
    return model


def distance(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Return the distance between two gradients of everything, of the norm of `expected`."""
    assert found.keys() == expected.keys()
    apart = [to_host(found[name]).astype("float64") - expected[name] for name in expected]
    return float(
        np.linalg.norm([np.linalg.norm(array) for array in apart])
        / np.linalg.norm([np.linalg.norm(array) for array in expected.values()])
    )


def assert_same_bits(on_device: dict[str, Any], on_host: dict[str, Any]) -> None:
    assert on_device.keys() == on_host.keys()
    for name, array in on_device.items():
        np.testing.assert_array_equal(to_host(array), to_host(on_host[name]), err_msg=name)


def check_it_follows(device: str, base: Path, folder: Path) -> None:
    for classify in (False, True):
        batch = batch_of(classify=classify)
        model, judge = model_on(device, base, classify=classify), reference(base, classify=classify)
        assert distance(model.step(batch).gradients, judge.step(batch).gradients) < AGREES
        losses = (ten_steps(each, classify=classify) for each in (model, judge))
        np.testing.assert_allclose(*losses, **FOLLOWS)


def check_every_weight_is_trained(device: str, base: Path, folder: Path) -> None:
    model, judge = (lora.load(base, device=each, dtype="bfloat16") for each in (device, "cpu"))
    judge.ops = REFERENCE
    for each in (model, judge):
        each.train_all()
    found, expected = (each.step(batch_of(classify=False)).gradients for each in (model, judge))
    assert distance(found, expected) < AGREES


def check_it_comes_back(device: str, base: Path, folder: Path) -> None:
    for classify in (False, True):
        model = model_on(device, base, classify=classify)
        losses = ten_steps(model, classify=classify)
        assert losses[-1] < losses[0] / 1.5
        found = outputs(model)
        with noted(classify):
            model.save_adapter(folder / "adapter")
        again = lora.load(folder / "adapter", dtype="bfloat16")
        assert_same_bits(model.trainable(), again.trainable())
        assert relative(outputs(again), found) < AGREES
        assert model.merge_adapter().max_logit_difference < 0.25
        assert relative(outputs(model), found) < AGREES
        with noted(classify):
            model.save(folder / "merged")
        whole = lora.load(folder / "merged", dtype="bfloat16")
        assert_same_bits(model.parameters.weights, whole.parameters.weights)
        model.unmerge_adapter()
        assert relative(outputs(model), found) == 0


def check_it_continues(device: str, base: Path, folder: Path) -> None:
    # a model that minds what it attends to
    sharp = {name: array.astype(bfloat16) for name, array in random_weights(CONFIG).items()}
    save_checkpoint(folder / "sharp", sharp, CONFIG)
    model = lora.load(folder / "sharp", device=device, dtype="bfloat16")
    ids, mask = np.ones((3, 17), int), np.zeros((3, 17), int)
    for row, sequence in enumerate(SEQUENCES):
        ids[row, : len(sequence)], mask[row, : len(sequence)] = sequence, 1
    for prompt, new in zip(SEQUENCES, model.generate(ids, 8, mask), strict=True):
        logits = to_host(model(np.concatenate([prompt, new])[None]))[0, len(prompt) - 1 : -1]
        chosen = logits[np.arange(len(new)), new]
        # a tie may be broken otherwise: over a cache the sums are taken in another order
        assert (logits.max(axis=1) - chosen < 0.1).all()


def check_it_goes_on(device: str, base: Path, folder: Path) -> None:
    batch = batch_of(classify=True)
    model, again = (model_on(device, base, classify=True) for _ in range(2))
    optimizer, resumed = (AdamW(each, lr=5e-3) for each in (model, again))
    optimizer.step(model.step(batch).gradients)
    write_state(folder / "state", optimizer, {})
    optimizer.step(model.step(batch).gradients)
    restore(read_state(folder / "state"), resumed)
    resumed.step(again.step(batch).gradients)
    assert_same_bits(model.trainable(), again.trainable())


def check_models_share(device: str, base: Path, folder: Path) -> None:
    opened = open_base(base, device, "bfloat16")
    one, two = opened.model(), opened.model(num_labels=2)
    for name, array in one.parameters.weights.items():
        assert array_module(array) is not np
        assert array.dtype == bfloat16
        assert two.parameters.weights[name] is array
    assert two.parameters.weights["score.weight"].dtype == np.float32


CHECKS = {
    "DEVICE-001": check_it_follows,
    "DEVICE-002": check_every_weight_is_trained,
    "DEVICE-003": check_it_comes_back,
    "DEVICE-004": check_it_continues,
    "DEVICE-005": check_it_goes_on,
    "DEVICE-006": check_models_share,
}


@pytest.mark.parametrize("check", claimed(CHECKS))
def test_claim(check: Any, device: str, base: Path, tmp_path: Path) -> None:
    check(device, base, tmp_path)


@requires_emulator
def test_the_order_of_threads_changes_no_bit(base: Path) -> None:
    losses = []
    for seed in (1, 2):
        with emulated_device(seed):
            losses.append(ten_steps(model_on("cuda", base, classify=True), classify=True))
    assert losses[0] == losses[1]


def _kernel_bug(*edit: str) -> Any:
    return lambda: emulated_device(edits=[edit])


def _bug(owner: Any, name: str, wrong: Any) -> Any:
    @contextmanager
    def planted_there() -> Iterator[None]:
        with emulated_device(), patch.object(owner, name, wrong):
            yield

    return planted_there


def _parameters_alone(optimizer: AdamW) -> dict[str, Any]:
    return {f"parameters/{name}": array for name, array in optimizer.model.trainable().items()}


MUTANTS = {
    "attends_one_token_ahead": _kernel_bug("attention.cuh", "place > diagonal :", "place > diagonal + 1 :"),
    "rotates_twice": _kernel_bug("rope.cu", "sine = sign * s[i]", "sine = s[i]"),
    "forgets_the_scale_of_an_adapter": _kernel_bug("lowrank_linear.cu", "<T>(scale * sum)", "<T>(sum)"),
    "leaves_out_the_factor_that_clips": _kernel_bug("adamw.cu", "g[j] *= factor;", ""),
    "loses_the_first_token_of_a_row": _kernel_bug("embedding.cu", "m = chunk; m", "m = chunk + 1; m"),
    "rounds_what_is_saved": _bug(
        lora.io.peft, "to_host", lambda array: to_host(array).astype(bfloat16).astype("float32")
    ),
    "keeps_the_merge": _bug(lora.model.merging, "unmerge", lambda parameters, originals: None),
    "leaves_the_newest_token_out": _kernel_bug(
        "cached_attention.cu", "token < length;", "token < length - 1;"
    ),
    "forgets_the_moments": _bug(lora.train.state, "_live", _parameters_alone),
    "moves_weights_for_each_model": _bug(
        Base, "_placed", lambda self, name, array: on_device(array, self.device)
    ),
}


@requires_emulator
@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS, MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any, base: Path, tmp_path: Path) -> None:
    with mutant(), pytest.raises(AssertionError):
        check("cuda", base, tmp_path)


def test_another_precision_is_refused(device: str, base: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"computes in bfloat16.*found float32"):
        lora.load(base, device=device)
