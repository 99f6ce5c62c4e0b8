"""A classifier of several labels: its loss, what it refuses, and what it writes for Transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lora
from lora.data.packed import pack
from lora.model.head import MULTI_LABEL, SINGLE_LABEL
from lora.model.model import Model
from tests.harness.models import FAMILIES, write_model

IDS = np.arange(1, 13).reshape(2, 6)
LABELS = np.array([[0, 1, 1], [0, 0, 0]])


@pytest.fixture(params=sorted(FAMILIES))
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write_model(tmp_path / "base", FAMILIES[request.param])
    return tmp_path / "base"


def load(base: Path, **named: Any) -> Model:
    return lora.load(base, **{"num_labels": 3, "problem_type": MULTI_LABEL, "dtype": "float64"} | named)


def test_the_loss_is_the_mean_over_rows_and_labels(base: Path) -> None:
    model = load(base)
    loss, gradients = model.loss_and_gradients(IDS, LABELS)
    p = 1 / (1 + np.exp(-model(IDS)))
    assert loss == pytest.approx(-np.log(np.where(LABELS == 1, p, 1 - p)).mean(), rel=1e-12)
    assert {name.rpartition(".")[2] for name in gradients} == {"weight", "bias"}


def test_rows_in_parts_add_up_to_the_batch(base: Path) -> None:
    model = load(base)
    model.add_adapter(lora.LoraConfig(r=2, target_modules="all-linear"))
    rows = [np.arange(1, 1 + length) for length in (5, 2, 7)]
    labels = np.array([[1, 0, 0], [1, 1, 1], [0, 0, 0]])
    whole = model.step(pack(rows, labels))
    parts = [model.step(pack([row], labels[i : i + 1]), normalizer=9.0) for i, row in enumerate(rows)]
    assert sum(part.loss for part in parts) == pytest.approx(whole.loss, rel=1e-12)
    for name, gradient in whole.gradients.items():
        added = sum(part.gradients[name] for part in parts)
        assert np.linalg.norm(added - gradient) <= 1e-12 * max(np.linalg.norm(gradient), 1e-3), name


def test_what_has_no_meaning_with_several_labels_is_refused(base: Path) -> None:
    model = load(base)
    with pytest.raises(lora.UsageError, match="class_weights"):
        model.loss_and_gradients(IDS, LABELS, class_weights=np.ones(3))
    with pytest.raises(lora.UsageError, match="label_smoothing"):
        model.step(pack(IDS, LABELS), label_smoothing=0.1)
    with pytest.raises(lora.ShapeError, match="labels"):
        model.loss_and_gradients(IDS, [0, 1])
    with pytest.raises(lora.ShapeError, match="3 labels"):
        model.loss_and_gradients(IDS, LABELS[:, :2])
    with pytest.raises(lora.DataError, match="label 2 out of range"):
        model.loss_and_gradients(IDS, LABELS * 2)
    with pytest.raises(lora.ShapeError, match="labels"):
        load(base, problem_type=None).loss_and_gradients(IDS, LABELS)
    with pytest.raises(lora.UsageError, match="problem_type 'regression'"):
        load(base, problem_type="regression")


def test_adapter_and_merged_checkpoint_say_what_the_head_decides(base: Path, tmp_path: Path) -> None:
    model = load(base, pooling="last", head_bias=False, class_names=["x", "y", "z"])
    model.add_adapter(lora.LoraConfig(r=2))
    model.save_adapter(tmp_path / "adapter")
    again = lora.load(tmp_path / "adapter", dtype="float64")
    assert (again.head, again.head.problem_type) == (model.head, MULTI_LABEL)
    model.merge_adapter()
    model.save(tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    assert config["id2label"] == {"0": "x", "1": "y", "2": "z"}
    merged = lora.load(tmp_path / "merged", dtype="float64")
    assert merged.head == model.head
    with pytest.raises(lora.UsageError, match="the checkpoint's own head"):
        lora.load(tmp_path / "merged", problem_type=SINGLE_LABEL)


def test_another_problem_type_on_disk_is_refused(base: Path, tmp_path: Path) -> None:
    load(base, pooling="last", head_bias=False).save(tmp_path / "merged")
    path = tmp_path / "merged" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"problem_type": "regression"}))
    with pytest.raises(lora.FileFormatError, match=r"problem_type: expected .*found 'regression'"):
        lora.load(tmp_path / "merged")
