"""A model trains, is judged, merged, saved and asked on a device, through the code that the host runs.

Each test runs on a device that is emulated, and with --gpu on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lora
from lora.backend import array_module, bfloat16, to_host
from lora.data.packed import Packed, pack, pack_causal
from lora.dispatch import REFERENCE
from lora.errors import LoraWarning, UnsupportedError
from lora.io.save_checkpoint import save_checkpoint
from lora.model.loading import open_base
from lora.model.model import Model
from lora.train.evaluate import class_probabilities
from lora.train.optimizer import AdamW
from lora.train.state import read_state, restore, write_state
from lora.train.step import train_step
from tests.emulator import requires_emulator
from tests.emulator.device import emulated_device
from tests.harness.bounds import relative
from tests.harness.models import TINY_QWEN2, random_weights

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


def check_it_follows(device: str, base: Path, *, classify: bool) -> None:
    batch = batch_of(classify=classify)
    model, judge = model_on(device, base, classify=classify), reference(base, classify=classify)
    assert distance(model.step(batch).gradients, judge.step(batch).gradients) < AGREES
    np.testing.assert_allclose(
        ten_steps(model, classify=classify), ten_steps(judge, classify=classify), **FOLLOWS
    )


@pytest.mark.parametrize("classify", [False, True])
def test_ten_steps_follow_the_reference(device: str, base: Path, classify: bool) -> None:
    check_it_follows(device, base, classify=classify)


@requires_emulator
def test_the_order_of_threads_changes_no_bit(base: Path) -> None:
    losses = []
    for seed in (1, 2):
        with emulated_device(seed):
            losses.append(ten_steps(model_on("cuda", base, classify=True), classify=True))
    assert losses[0] == losses[1]


BUGS = {
    "attends one token ahead": ("attention.cuh", "place > diagonal :", "place > diagonal + 1 :"),
    "rotates twice": ("rope.cu", "sine = sign * s[i]", "sine = s[i]"),
    "forgets the scale of an adapter": ("lowrank_linear.cu", "<T>(scale * sum)", "<T>(sum)"),
    "leaves out the factor that clips": ("adamw.cu", "g[j] *= factor;", ""),
}


@requires_emulator
@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_a_planted_bug_is_seen(base: Path, bug: tuple[str, str, str]) -> None:
    with emulated_device(edits=[bug]), pytest.raises(AssertionError):
        check_it_follows("cuda", base, classify=False)


def test_every_weight_is_trained_there(device: str, base: Path) -> None:
    models = [
        lora.load(base, device=device, dtype="bfloat16"),
        lora.load(base, dtype="bfloat16"),
    ]
    models[1].ops = REFERENCE
    for model in models:
        model.train_all()
    found, expected = (model.step(batch_of(classify=False)).gradients for model in models)
    assert distance(found, expected) < AGREES


@pytest.mark.parametrize("classify", [False, True])
def test_what_is_trained_there_is_the_same_here(
    device: str, base: Path, tmp_path: Path, classify: bool
) -> None:
    model = model_on(device, base, classify=classify)
    losses = ten_steps(model, classify=classify)
    assert losses[-1] < losses[0] / 1.5
    found = outputs(model)
    with noted(classify):
        model.save_adapter(tmp_path / "adapter")
    again = lora.load(tmp_path / "adapter", dtype="bfloat16")
    for name, array in model.trainable().items():
        # not a bit is lost on the way from the device to the host
        np.testing.assert_array_equal(to_host(array), again.trainable()[name], err_msg=name)
    assert relative(outputs(again), found) < AGREES
    assert model.merge_adapter().max_logit_difference < 0.25
    assert relative(outputs(model), found) < AGREES
    with noted(classify):
        model.save(tmp_path / "merged")
    whole = lora.load(tmp_path / "merged", dtype="bfloat16")
    for name, array in model.parameters.weights.items():
        np.testing.assert_array_equal(to_host(array), whole.parameters.weights[name], err_msg=name)
    model.unmerge_adapter()
    assert relative(outputs(model), found) == 0


def test_what_is_generated_is_what_the_logits_say(device: str, base: Path) -> None:
    model = model_on(device, base, classify=False)
    ids, mask = np.ones((3, 17), int), np.zeros((3, 17), int)
    for row, sequence in enumerate(SEQUENCES):
        ids[row, : len(sequence)], mask[row, : len(sequence)] = sequence, 1
    for prompt, new in zip(SEQUENCES, model.generate(ids, 6, mask), strict=True):
        logits = to_host(model(np.concatenate([prompt, new])[None]))[0, len(prompt) - 1 : -1]
        chosen = logits[np.arange(len(new)), new]
        # a tie may be broken otherwise: over a cache the sums are taken in another order
        assert (logits.max(axis=1) - chosen < 0.1).all()


def test_a_state_goes_on_there_bit_for_bit(device: str, base: Path, tmp_path: Path) -> None:
    batch = batch_of(classify=True)
    model = model_on(device, base, classify=True)
    optimizer = AdamW(model, lr=5e-3)
    optimizer.step(model.step(batch).gradients)
    write_state(tmp_path / "state", optimizer, {})
    optimizer.step(model.step(batch).gradients)
    again = model_on(device, base, classify=True)
    resumed = AdamW(again, lr=5e-3)
    restore(read_state(tmp_path / "state"), resumed)
    resumed.step(again.step(batch).gradients)
    for name, array in model.trainable().items():
        np.testing.assert_array_equal(to_host(array), to_host(again.trainable()[name]), err_msg=name)


def test_models_of_one_base_share_what_lies_there(device: str, base: Path) -> None:
    opened = open_base(base, device, "bfloat16")
    one, two = opened.model(), opened.model(num_labels=2)
    for name, array in one.parameters.weights.items():
        assert array_module(array) is not np
        assert array.dtype == bfloat16
        assert two.parameters.weights[name] is array
    assert two.parameters.weights["score.weight"].dtype == np.float32


def test_another_precision_is_refused(device: str, base: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"computes in bfloat16.*found float32"):
        lora.load(base, device=device)
