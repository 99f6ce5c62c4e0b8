"""Rows with several labels, from the command line: train, evaluate, predict, report, merge, inspect, plan."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import lora as library
from lora.cli.predict import LabelPrediction, print_predictions
from lora.io.peft import load_adapter
from lora.train.finetune import finetune
from tests.data.files import write_jsonl

WORDS = ("fire", "rain", "wind")
# every combination of the words, four times
ROWS = [
    {
        "input": " and ".join(word for i, word in enumerate(WORDS) if bits >> i & 1) + f" on day {day}",
        "labels": [word for i, word in enumerate(WORDS) if bits >> i & 1],
    }
    for day in range(4)
    for bits in range(8)
]
LAST = {"pooling": "last", "head_bias": False}


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("several") / "rows.jsonl", ROWS)


@pytest.fixture(scope="module")
def run(base: Path, several: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("labels") / "run"
    settings = {"method": "lora", "epochs": 8, "batch_size": 8, "learning_rate": 0.02}
    return finetune(base, several, output=output, **settings, **LAST).output


def test_a_run_is_told_by_its_rows_and_says_how_it_splits(lora, base, several, tmp_path) -> None:
    outcome = lora("finetune", base, "-d", several, "-o", tmp_path / "run", "--epochs", "2", "--json")
    document = outcome.document
    assert (document["task"], document["class_names"]) == ("classify", list(WORDS))
    assert "the split is drawn by the seed alone" in outcome.err
    _, _, facts = load_adapter(tmp_path / "run" / "best")
    assert facts["problem_type"] == "multi_label_classification"
    first, last = (document["epoch_metrics"][i]["train_loss"] for i in (0, 1))
    assert 0.3 < first < 1.2
    assert last < first
    assert (
        'problem_type="multi_label_classification"' in (tmp_path / "run" / "best" / "README.md").read_text()
    )


def test_what_needs_one_class_a_row_is_refused_by_name(lora, base, several, tmp_path) -> None:
    for flags in (
        ["--class-weights", "inverse_freq"],
        ["--oversample"],
        ["--label-smoothing", "0.1"],
    ):
        outcome = lora("finetune", base, "-d", several, "-o", tmp_path / "run", *flags)
        assert outcome.exit_code == 2
        assert flags[0][2:].replace("-", "_") in outcome.err
    assert not (tmp_path / "run").exists()
    fine = ("--class-weights", "uniform", "--epochs", "1", "-q")
    assert lora("finetune", base, "-d", several, "-o", tmp_path / "run", *fine).exit_code == 0


def test_eval_scores_each_label(lora, run, several) -> None:
    document = lora("eval", run / "best", "-d", several, "--json").document
    assert [score["name"] for score in document["per_class"]] == list(WORDS)
    assert [score["support"] for score in document["per_class"]] == [16, 16, 16]
    assert document["none_baseline"] == 1 / 8
    assert document["micro_f1"] > 0.9  # half of the labels are there: guessing gives at most 2/3
    assert document["subset_accuracy"] > document["none_baseline"]
    text = lora("eval", run / "best", "-d", several).out
    for shown in ("Label", "fire", "Micro-F1", "Macro-F1", "Subset accuracy", f"{document['micro_f1']:.4f}"):
        assert shown in text


def test_rows_of_the_other_kind_are_refused(lora, run, several, adapter, rows) -> None:
    for model, data, expected in (
        (run / "best", rows, "input and labels"),
        (adapter, several, "input and label;"),
    ):
        outcome = lora("eval", model, "-d", data)
        assert outcome.exit_code == 5
        assert expected in outcome.err


def test_predict_gives_the_probability_of_every_label(lora, run, several) -> None:
    document = lora("predict", run / "best", "--data", several, "--json").document
    assert document["class_names"] == list(WORDS)
    predictions = document["predictions"]
    for prediction in predictions:
        assert list(prediction["probabilities"]) == list(WORDS)
        likely = [name for name, p in prediction["probabilities"].items() if p > 0.5]
        assert prediction["labels"] == likely
        assert all(0 < p < 1 for p in prediction["probabilities"].values())
    right = sum(p["labels"] == row["labels"] for p, row in zip(predictions, ROWS, strict=True))
    scores = lora("eval", run / "best", "-d", several, "--json").document
    assert right / len(ROWS) == scores["subset_accuracy"]
    # no softmax: a row with all three has three likely labels
    assert sum(predictions[7]["probabilities"].values()) > 1.5


def test_predictions_are_a_line_each(lora, run, several, capsys) -> None:
    text = ROWS[7]["input"]
    (prediction,) = lora("predict", run / "best", text, "--json").document["predictions"]
    listed = "  ".join(f"{name} {p:.4f}" for name, p in prediction["probabilities"].items())
    line = f"{', '.join(prediction['labels'])}  {listed}  {text}\n"
    assert lora("predict", run / "best", text).out == line
    capsys.readouterr()
    print_predictions(
        [LabelPrediction("a", ["x", "y"], {"x": 0.9, "y": 0.6}), LabelPrediction("b", [], {"x": 0.1})]
    )
    assert capsys.readouterr().out == "x, y    x 0.9000  y 0.6000  a\n(none)  x 0.1000  b\n"


def test_the_report_shows_each_label(lora, run) -> None:
    outcome = lora("report", run, "--json")
    assert set(WORDS) == {score["name"] for score in outcome.document["scores"]["per_class"]}
    page = (run / "report.html").read_text()
    for shown in ("<h2>Labels</h2>", "Micro F1", "Subset accuracy", "Hardest rows", *WORDS):
        assert shown in page
    for absent in ("Confusion", "Calibration"):
        assert absent not in page
    validated = outcome.document["scores"]
    epochs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = min((row for row in epochs if row["kind"] == "epoch"), key=lambda row: row["val_loss"])
    assert validated["log_loss"] == pytest.approx(best["val_loss"], rel=1e-4)
    assert validated["subset_accuracy"] == pytest.approx(best["val_accuracy"])


def test_a_merged_model_predicts_the_same(lora, run, several, tmp_path) -> None:
    assert lora("merge", "--adapter", run / "best", "-o", tmp_path / "merged").exit_code == 0
    merged, apart = (
        lora("eval", model, "-d", several, "--json").document for model in (tmp_path / "merged", run / "best")
    )
    assert merged["per_class"] == apart["per_class"]
    assert merged["log_loss"] == pytest.approx(apart["log_loss"], rel=1e-4)


def test_inspect_and_plan_know_the_rows(lora, base, several) -> None:
    document = lora("inspect", "data", several, "--json").document
    assert document["task"] == "classify"
    assert document["classes"] == dict.fromkeys(WORDS, 16)
    plan = lora("finetune", base, "-d", several, "--plan", "--json").document
    assert plan["status"] == "planned"
    assert "3" in json.dumps(plan)


def test_a_loaded_model_must_decide_what_the_rows_say(base, several, rows, tmp_path) -> None:
    model = library.load(base, class_names=WORDS)
    with pytest.raises(library.UsageError, match="multi_label_classification"):
        library.finetune(model, several, output=tmp_path / "run", epochs=1)
    assert not (tmp_path / "run").exists()


def test_training_stops_by_the_validation_loss(base, several, tmp_path) -> None:
    settings = {"epochs": 4, "patience": 1, "learning_rate": 30.0, "clip": 0.0, "warmup": 0.0}
    stopped = library.finetune(base, several, output=tmp_path / "run", batch_size=32, **settings)
    assert stopped.best_val_loss == min(epoch.val_loss for epoch in stopped.epochs)
    assert np.isfinite(stopped.best_val_loss)
    assert stopped.stopped_early
