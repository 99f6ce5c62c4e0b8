"""Merging, unmerging, saving and loading back."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lora.errors import AdapterError, LoraWarning, UnsupportedError
from lora.io.lora_config import LoraConfig
from lora.model.loading import load
from tests.harness.bounds import relative
from tests.harness.models import TINY_QWEN2, write_model
from tests.model.test_model import adapted, sequences

IDS = np.stack(sequences(lengths=(9, 9, 9)))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_unmerge_restores_the_base_bit_for_bit(tmp_path: Path, dtype: Any) -> None:
    model = adapted(write_model(tmp_path / "base", dtype=dtype), dtype="float32")
    before = {name: np.array(array).tobytes() for name, array in model.parameters.weights.items()}
    logits = model(IDS)
    report = model.merge_adapter()
    assert report.merged_modules == 3 * 7
    changed = [n for n, a in model.parameters.weights.items() if np.array(a).tobytes() != before[n]]
    assert len(changed) == 3 * 7
    model.unmerge_adapter()
    assert {n: np.array(a).tobytes() for n, a in model.parameters.weights.items()} == before
    np.testing.assert_array_equal(model(IDS), logits)


def test_the_report_measures_what_rounding_changed(tmp_path: Path) -> None:
    exact = adapted(write_model(tmp_path / "wide"), dtype="float64")
    rounded = adapted(write_model(tmp_path / "narrow", dtype=ml_dtypes.bfloat16), dtype="float64")
    assert exact.merge_adapter().max_logit_difference < 1e-5
    assert 1e-4 < rounded.merge_adapter().max_logit_difference < 1
    adapter_logits = adapted(tmp_path / "narrow", dtype="float64")(IDS)
    report = adapted(tmp_path / "narrow", dtype="float64").merge_adapter(probe=IDS)
    assert report.max_logit_difference == pytest.approx(np.abs(rounded(IDS) - adapter_logits).max(), rel=1e-9)


def test_a_merged_weight_is_rounded_once(tmp_path: Path) -> None:
    model = adapted(write_model(tmp_path / "base", dtype=ml_dtypes.bfloat16), dtype="float32")
    name = "model.layers.1.self_attn.q_proj"
    weight, factors = (
        np.array(model.parameters.weights[f"{name}.weight"]),
        model.parameters.adapter.factors[name],
    )
    model.merge_adapter()
    exact = weight.astype("float64") + factors.scale * factors.b.astype("float64") @ factors.a.astype(
        "float64"
    )
    step = np.abs(exact) * 2.0**-8 * 1.001 + 1e-30  # half a unit in the last place of bfloat16, at most
    assert (np.abs(model.parameters.weights[f"{name}.weight"].astype("float64") - exact) <= step).all()


def test_a_saved_merge_loads_back(tmp_path: Path) -> None:
    model = adapted(write_model(tmp_path / "base", dtype=ml_dtypes.bfloat16), dtype="float64")
    with pytest.raises(AdapterError, match="merge_adapter"):
        model.save(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    model.merge_adapter()
    model.save(tmp_path / "merged")
    again = load(tmp_path / "merged", dtype="float64")
    np.testing.assert_array_equal(again(IDS), model(IDS))
    assert {a.dtype for a in again.parameters.weights.values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_adapters_round_trip_and_switch(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    model = adapted(base)
    model.save_adapter(tmp_path / "one", metadata={"base": "x"})
    again = load(base, dtype="float64")
    plain = again(IDS)
    again.load_adapter(tmp_path / "one")
    np.testing.assert_array_equal(again(IDS), model(IDS))
    again.add_adapter(LoraConfig(r=2), name="two")
    np.testing.assert_array_equal(again(IDS), plain)
    again.set_adapter("default")
    np.testing.assert_array_equal(again(IDS), model(IDS))
    with pytest.raises(AdapterError, match="'two'"):
        again.load_adapter(tmp_path / "one", name="two")
    from_folder = load(tmp_path / "one", dtype="float64")
    np.testing.assert_array_equal(from_folder(IDS), model(IDS))


def test_an_adapter_with_dropout_runs_and_merges_and_is_not_trained(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    adapted(base).save_adapter(tmp_path / "one")
    path = tmp_path / "one" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_dropout": 0.05}))
    model = load(tmp_path / "one", dtype="float64")
    np.testing.assert_array_equal(model(IDS), adapted(base)(IDS))
    with pytest.raises(UnsupportedError, match="lora_dropout"):
        model.loss_and_gradients(IDS, IDS)
    model.merge_adapter()


def test_a_merged_adapter_blocks_what_would_confuse(tmp_path: Path) -> None:
    model = adapted(write_model(tmp_path / "base"))
    model.merge_adapter()
    for call in (
        model.merge_adapter,
        lambda: model.add_adapter(LoraConfig(), name="b"),
        lambda: model.save_adapter("x"),
    ):
        with pytest.raises(AdapterError, match="unmerge_adapter"):
            call()


def test_a_tied_head_that_is_trained_is_untied_on_disk(tmp_path: Path) -> None:
    config = LoraConfig(r=2, modules_to_save=["lm_head"])
    model = adapted(write_model(tmp_path / "base"), config)
    model.trainable()["base_model.model.lm_head.weight"][...] += 0.5
    logits = model(IDS)
    report = model.merge_adapter()
    assert report.replaced_tensors == 1
    model.save(tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    assert relative(load(tmp_path / "merged", dtype="float64")(IDS), logits) < 1e-6


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("head_bias", [True, False])
def test_a_classifier_round_trips_with_its_head(tmp_path: Path, pooling: Any, head_bias: bool) -> None:
    base = write_model(tmp_path / "base", TINY_QWEN2 | {"tie_word_embeddings": False})
    names = ("no", "maybe", "yes")
    model = adapted(base, class_names=names, pooling=pooling, head_bias=head_bias)
    agrees = pooling == "last" and not head_bias
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.save_adapter(tmp_path / "adapter")
        model.merge_adapter()
        model.save(tmp_path / "merged")
    assert [w.category for w in said] == ([] if agrees else [LoraWarning, LoraWarning])
    again = load(tmp_path / "adapter", dtype="float64")
    merged = load(tmp_path / "merged", dtype="float64")
    for other in (again, merged):
        assert other.head == model.head
        assert relative(other(IDS), model(IDS)) < 1e-6
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForSequenceClassification"]
    assert config["id2label"] == {"0": "no", "1": "maybe", "2": "yes"}
