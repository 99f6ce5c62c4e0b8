"""The whole model: gradients against differences, packing, stopping, heads, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora.data.packed import Packed, pack, pack_causal
from lora.errors import (
    AdapterError,
    ContractError,
    DataError,
    DeviceError,
    UnsupportedError,
    UsageError,
    ValidationError,
)
from lora.io.lora_config import LoraConfig
from lora.model import attention_mixer
from lora.model.loading import load
from lora.model.model import Model
from lora.ops import lowrank_linear
from lora.train.optimizer import AdamW
from tests.harness.bounds import relative
from tests.harness.models import FAMILIES, TINY_QWEN2, TINY_QWEN3_5, write_model

ALL = LoraConfig(r=3, target_modules="all-linear")
LENGTHS = (7, 1, 12, 4)


@pytest.fixture(params=FAMILIES)
def base(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return write_model(tmp_path / "base", FAMILIES[request.param])


def adapted(base: Path, config: LoraConfig = ALL, dtype: str = "float64", **head: Any) -> Model:
    """Return a model whose B's are not zero, so that every gradient is alive."""
    model = load(base, dtype=dtype, **head)
    model.add_adapter(config, seed=1)
    rng = np.random.default_rng(2)
    for name, array in model.trainable().items():
        if "lora_B" in name:
            array[...] = 0.2 * rng.standard_normal(array.shape)
    return model


def sequences(seed: int = 3, lengths: tuple[int, ...] = LENGTHS) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, TINY_QWEN2["vocab_size"], length) for length in lengths]


def padded(rows: list[np.ndarray], fill: int = 5) -> tuple[np.ndarray, np.ndarray]:
    longest = max(map(len, rows))
    ids = np.full((len(rows), longest), fill)
    mask = np.zeros_like(ids)
    for row, (sequence, i) in enumerate(zip(rows, mask, strict=True)):
        ids[row, : len(sequence)], i[: len(sequence)] = sequence, 1
    return ids, mask


def widen_adapter(model: Model) -> None:
    """Put float64 copies in the place of the adapter's arrays: differences need more than float32 holds."""
    adapter = model.parameters.adapter
    assert adapter is not None
    for module, f in adapter.factors.items():
        adapter.factors[module] = f._replace(a=f.a.astype("float64"), b=f.b.astype("float64"))
    adapter.replaced = {name: array.astype("float64") for name, array in adapter.replaced.items()}


def directional(model: Model, batch: Packed, name: str, direction: np.ndarray, h: float = 2e-5) -> float:
    array = model.trainable()[name]
    start, losses = array.copy(), []
    for t in (h, -h, 2 * h, -2 * h):
        array[...] = start + t * direction
        losses.append(model.step(batch).loss)
    array[...] = start
    return (8 * (losses[0] - losses[1]) - (losses[2] - losses[3])) / (12 * h)


@pytest.mark.parametrize(
    "head", [{}, {"num_labels": 3}, {"num_labels": 4, "pooling": "last", "head_bias": False}]
)
def test_every_gradient_matches_differences(base: Path, head: dict[str, Any]) -> None:
    model = adapted(base, **head)
    widen_adapter(model)
    batch = pack(sequences(), [2, 0, 1, 2]) if head else pack_causal(sequences())
    gradients = model.step(batch).gradients
    assert gradients.keys() == model.trainable().keys()
    rng = np.random.default_rng(4)
    for name, gradient in gradients.items():
        direction = rng.standard_normal(gradient.shape)
        numeric, analytic = directional(model, batch, name, direction), float((gradient * direction).sum())
        assert abs(numeric - analytic) < 1e-7 * (1 + np.abs(gradient * direction).sum()), name


@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-12), ("float32", 2e-5)])
@pytest.mark.parametrize("head", [{}, {"num_labels": 3}])
def test_packing_and_padding_change_no_sample(
    base: Path, dtype: str, bound: float, head: dict[str, Any]
) -> None:
    model, rows = adapted(base, dtype=dtype, **head), sequences()
    ids, mask = padded(rows)
    labels: Any = np.array([2, 0, 1, 2]) if head else np.where(mask == 1, ids, -100)
    normalizer = float(len(rows)) if head else float(sum(len(row) - 1 for row in rows))
    loss, gradients = model.loss_and_gradients(ids, labels, mask, normalizer=normalizer)
    alone = []
    for row, label in zip(rows, labels, strict=True):
        if not head and len(row) == 1:
            continue  # one token predicts nothing
        own = label[None] if head else label[None, : len(row)]
        alone.append(model.loss_and_gradients(row[None], own, normalizer=normalizer))
    assert relative(sum(part[0] for part in alone), loss) < bound
    for name, gradient in gradients.items():
        assert relative(sum(part[1][name] for part in alone), gradient) < bound, name
    logits = model(ids, mask)
    for index, row in enumerate(rows):
        own = model(row[None])[0]
        assert relative(logits[index] if head else logits[index, : len(row)], own) < bound


def test_padding_gives_zero_logits_and_its_ids_do_not_matter(base: Path) -> None:
    model, rows = adapted(base), sequences()
    first, second = (model(*padded(rows, fill)) for fill in (5, 9))
    np.testing.assert_array_equal(first, second)
    assert (first[1, 1:] == 0).all()


def test_backward_stops_at_the_first_trained_layer(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LoraConfig(r=2, target_modules=["v_proj"], layers_to_transform=[2])
    model, visited = adapted(base, config), []
    backward = attention_mixer.backward

    def spy(context: Any, block: str, *args: Any, **kwargs: Any) -> Any:
        visited.append((block, kwargs["wants_input"]))
        return backward(context, block, *args, **kwargs)

    monkeypatch.setattr(attention_mixer, "backward", spy)
    model.step(pack_causal(sequences()))
    assert visited == [("model.layers.2", False)]


def test_a_frozen_weight_has_no_gradient_and_keeps_its_bits(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(base, LoraConfig(r=2))
    before = {name: array.copy() for name, array in model.parameters.weights.items()}
    formed = []
    part_grads = lowrank_linear.PartGrads
    monkeypatch.setattr(lowrank_linear, "PartGrads", lambda *a: formed.append(part_grads(*a)) or formed[-1])
    model.step(pack_causal(sequences()))
    assert formed
    assert all(grads.weight is None and grads.bias is None for grads in formed)
    for name, array in before.items():
        np.testing.assert_array_equal(model.parameters.weights[name], array)
        assert not model.parameters.weights[name].flags.writeable


def test_full_training_reaches_every_weight(base: Path) -> None:
    model = load(base, dtype="float64")
    model.train_all()
    gradients = model.step(pack_causal(sequences())).gradients
    assert gradients.keys() == model.parameters.weights.keys()
    # a key's bias shifts all scores of a query alike, which softmax does not see
    dead = [name for name, gradient in gradients.items() if np.linalg.norm(gradient) < 1e-12]
    assert not dead or all(name.endswith("k_proj.bias") for name in dead)


def test_full_training_of_a_classifier_leaves_no_language_head(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", TINY_QWEN2 | {"tie_word_embeddings": False})
    model = load(base, num_labels=3)
    model.train_all()
    _, gradients = model.loss_and_gradients(np.ones((2, 4), int), [0, 2])
    assert gradients.keys() == model.trainable().keys()
    assert not [name for name in gradients if "lm_head" in name]


def test_head_alone_runs_no_decoder_backward(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(base, num_labels=3)
    monkeypatch.setattr(attention_mixer, "backward", lambda *a, **k: pytest.fail("the decoder is frozen"))
    _, gradients = model.loss_and_gradients(np.ones((2, 4), int), [0, 2])
    assert list(gradients) == ["base_model.model.score.bias", "base_model.model.score.weight"]


def test_class_weights_weigh_rows(base: Path) -> None:
    model, rows = adapted(base, num_labels=2), sequences(lengths=(5, 5))
    ids = np.stack(rows)
    losses = [model.loss_and_gradients(ids[i : i + 1], [i])[0] for i in range(2)]
    loss, _ = model.loss_and_gradients(ids, [0, 1], class_weights=np.array([3.0, 1.0]))
    assert loss == pytest.approx((3 * losses[0] + losses[1]) / 4, rel=1e-12)


def test_zero_b_is_the_base(base: Path) -> None:
    ids = np.stack(sequences(lengths=(9, 9)))
    model = load(base)
    plain = model(ids)
    model.add_adapter(ALL)
    np.testing.assert_array_equal(model(ids), plain)


def test_under_qv_the_keys_of_a_fused_projection_are_not_trained(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", TINY_QWEN3_5)
    model = load(base)
    model.add_adapter(LoraConfig(r=2))  # qv
    name = "base_model.model.model.layers.0.linear_attn.in_proj_qkv.lora_B.weight"
    keys = slice(2 * 6, 2 * 2 * 6)
    optimizer = AdamW(model, lr=0.1)
    for _ in range(2):
        optimizer.step(model.step(pack_causal(sequences())).gradients)
    trained = model.trainable()[name]
    assert (trained[keys] == 0).all()
    assert (np.delete(trained, np.r_[keys], axis=0) != 0).all()
    model.save_adapter(tmp_path / "adapter")
    again = load(tmp_path / "adapter")
    assert (again.step(pack_causal(sequences())).gradients[name][keys] == 0).all()
    whole = load(base)
    whole.add_adapter(LoraConfig(r=2, target_modules=["in_proj_qkv"]))
    optimizer = AdamW(whole, lr=0.1)
    optimizer.step(whole.step(pack_causal(sequences())).gradients)
    assert (whole.trainable()[name][keys] != 0).all()


def test_a_new_target_moves_no_other_start(base: Path) -> None:
    few, many = load(base), load(base)
    few.add_adapter(LoraConfig(target_modules=["v_proj"]), seed=7)
    many.add_adapter(LoraConfig(target_modules="all-linear"), seed=7)
    for name, array in few.trainable().items():
        np.testing.assert_array_equal(many.trainable()[name], array)


def test_starts_are_as_the_configuration_says(base: Path) -> None:
    for init, std in (("gaussian", 1 / 16), (True, 1 / (3 * 16) ** 0.5)):
        model = load(base)
        model.add_adapter(LoraConfig(r=16, target_modules="all-linear", init_lora_weights=init))
        down = [a for n, a in model.trainable().items() if "lora_A" in n and a.shape[1] == 16]
        assert np.std(np.concatenate([a.ravel() for a in down])) == pytest.approx(std, rel=0.1)
        assert all((a == 0).all() for n, a in model.trainable().items() if "lora_B" in n)


def test_bfloat16_base_trains_in_float32(tmp_path: Path) -> None:
    import ml_dtypes

    base = write_model(tmp_path / "narrow", dtype=ml_dtypes.bfloat16)
    narrow, exact = adapted(base, dtype="float32"), adapted(base, dtype="float64")
    batch = pack_causal(sequences())
    ours, truth = narrow.step(batch), exact.step(batch)
    for name, gradient in truth.gradients.items():
        assert relative(ours.gradients[name], gradient) < 1e-4, name


def test_bfloat16_arithmetic_stays_near(base: Path) -> None:
    ids = np.stack(sequences(lengths=(9, 9)))
    # a rounding is 2^-9, and some dozens of them lie between the ids and the logits; a recurrence has more
    narrow, exact = adapted(base, dtype="bfloat16"), adapted(base)
    assert relative(narrow(ids), exact(ids)) < {"qwen2": 0.05, "qwen3_5": 0.1}[exact.spec.family]


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda m: m.loss_and_gradients([[1, 2]], [[1, 2]]), AdapterError),
        (lambda m: m([[61]]), DataError),
        (lambda m: m([[-1]]), DataError),
        (lambda m: m([[1, 2]], [[0, 1]]), ValidationError),
        (lambda m: m([[1.5, 2]]), ValidationError),
        (lambda m: m.save_adapter("nowhere"), AdapterError),
        (lambda m: m.set_adapter("other"), AdapterError),
        (lambda m: m.unmerge_adapter(), AdapterError),
        (lambda m: m.add_adapter(LoraConfig(target_modules=["q_porj"])), AdapterError),
    ],
)
def test_bad_calls_get_one_clear_error(base: Path, call: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        call(load(base))


def test_a_batch_without_a_counted_token_is_refused(base: Path) -> None:
    with pytest.raises(DataError, match="no token"):
        adapted(base).loss_and_gradients([[1, 2, 3]], [[-100, -100, -100]])


def test_a_label_outside_the_head_is_refused(base: Path) -> None:
    with pytest.raises(DataError, match="F-CLASS-002"):
        load(base, num_labels=3).loss_and_gradients([[1, 2]], [3])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"num_labels": 1}, ContractError),
        ({"num_labels": 3, "class_names": ["a", "b"]}, UsageError),
        ({"dtype": "float16"}, UsageError),
        ({"device": "cuda"}, DeviceError),
        ({"quantize": "nf4"}, UnsupportedError),
    ],
)
def test_bad_load_arguments(base: Path, arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        load(base, **arguments)


def test_last_pooling_without_a_mask_skips_trailing_padding(base: Path) -> None:
    model = adapted(base, num_labels=3, pooling="last")
    pad = TINY_QWEN2["pad_token_id"]
    np.testing.assert_allclose(model([[4, pad, 6, pad, pad]]), model([[4, pad, 6]]), rtol=1e-12)
