"""The numbers and the geometry behind a report, apart from its page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.errors import FileFormatError, MissingFileError
from lora.model.loading import load
from lora.train.classification_metrics import metrics_from_probabilities
from lora.train.evaluate import evaluate_causal, read_examples_for
from lora.train.report_charts import LEFT, RIGHT, TOP, Chart, Series, line_chart, smoothed, thinned
from lora.train.report_evaluation import calibration, row_losses
from lora.train.report_record import read_record
from tests.cli.conftest import TEXTS, write_base
from tests.data.files import write_jsonl


@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 60))
def test_the_bins_add_up_to_the_calibration_error(seed: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(3, 0.5), rows)
    labels = rng.integers(0, 3, rows)
    bins = calibration(p, labels)
    gap = sum(b.rows * abs(b.accuracy - b.confidence) for b in bins) / rows
    assert gap == pytest.approx(metrics_from_probabilities(p, labels).expected_calibration_error, abs=1e-12)
    assert sum(b.rows for b in bins) == rows
    assert all(i / 10 <= b.confidence <= (i + 1) / 10 for i, b in enumerate(bins) if b.rows)


def test_the_losses_of_rows_average_to_the_loss(tmp_path) -> None:
    base = write_base(tmp_path / "base")
    texts = [{"text": row["text"] * (1 + i % 3)} for i, row in enumerate(TEXTS)]
    model = load(base)
    examples = read_examples_for(model, write_jsonl(tmp_path / "rows.jsonl", texts), 512)
    losses = row_losses(model, examples, batch_size=5)
    tokens = examples.lengths - 1
    assert (losses * tokens).sum() / tokens.sum() == pytest.approx(
        evaluate_causal(model, examples).loss, rel=1e-6
    )
    # the order is that of the rows: alone, a row has the same loss
    alone = evaluate_causal(model, examples.subset(np.array([7]))).loss
    assert losses[7] == pytest.approx(alone, rel=1e-6)


FINITE = st.floats(-1e14, 1e14) | st.sampled_from([0.0, 1e-12, -1e-300, 1e14]) | st.integers(-3, 3).map(float)


def places(chart: Chart) -> list[tuple[float, float]]:
    numbers = [re.split("[ML ]", line.path)[1:] for line in chart.lines]
    pairs = [(float(x), float(y)) for flat in numbers for x, y in zip(flat[::2], flat[1::2], strict=True)]
    return pairs + [(dot.x, dot.y) for line in chart.lines for dot in line.dots]


@given(values=st.lists(FINITE, min_size=1, max_size=30), zero=st.booleans())
def test_everything_is_drawn_inside_the_plot(values: list[float], zero: bool) -> None:
    values = [abs(value) for value in values] if zero else values
    steps = list(range(1, len(values) + 1))
    chart = line_chart(
        "t", "step", [Series("a", "train", steps, values, dots=True)], width=300, height=200, zero=zero
    )
    assert len(places(chart)) == 2 * len(values)
    for x, y in places(chart):
        assert LEFT <= x <= 300 - RIGHT
        assert TOP <= y <= chart.bottom
    labels = [tick.label for tick in chart.y_ticks]
    assert 2 <= len(labels) <= 7
    assert all(LEFT <= tick.at <= 300 - RIGHT for tick in chart.x_ticks)
    assert chart.y_ticks[0].at == chart.bottom
    assert chart.y_ticks[-1].at == TOP


def test_ticks_are_round_and_told_apart() -> None:
    def labels(low: float, high: float) -> list[str]:
        series = [Series("a", "train", [1, 2], [low, high])]
        return [tick.label for tick in line_chart("t", "step", series, width=300, height=200).y_ticks]

    assert labels(0.2, 1.9) == ["0.0", "0.5", "1.0", "1.5", "2.0"]
    assert labels(0.0, 2e-4) == ["0", "5e-5", "1e-4", "1.5e-4", "2e-4"]
    assert labels(0, 12_000) == ["0", "5,000", "10,000", "15,000"]


def test_a_mean_is_smooth_and_starts_without_a_pull() -> None:
    assert smoothed([3.0]) == [3.0]
    assert smoothed([2.0] * 100) == pytest.approx([2.0] * 100)
    noisy = [float(i % 2) for i in range(400)]
    assert np.ptp(smoothed(noisy)[100:]) < 0.1
    assert smoothed(noisy)[-1] == pytest.approx(0.5, abs=0.05)


@given(n=st.integers(1, 5000))
def test_many_values_are_thinned_to_the_same_mean(n: int) -> None:
    values = [1.0] * n
    assert len(thinned(values)) <= 600
    assert set(thinned(values)) == {1.0}
    assert thinned([1.0, 2.0]) == [1.0, 2.0]


STEP = {
    "kind": "step",
    "step": 1,
    "epoch": 1,
    "loss": 0.5,
    "learning_rate": 1e-4,
    "gradient_norm": 1.0,
    "tokens": 9,
    "tokens_per_second": 3.0,
}
FACTS = {"settings": {"epochs": 2, "patience": 1}, "class_names": []}


def write_run(folder: Path, facts: object, metrics: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "metrics.jsonl").write_text(metrics)
    return folder


def test_a_row_that_a_killed_run_had_begun_is_left_out(tmp_path) -> None:
    line = json.dumps(STEP)
    record = read_record(write_run(tmp_path / "run", FACTS, f"{line}\n{line[:20]}"))
    assert (len(record.steps), record.epochs, record.status) == (1, (), "unfinished")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2: expected a step or an epoch"),
        ('{"kind": {}}', "line 2: expected"),
        (json.dumps(STEP | {"loss": "0.5"}), "line 2: expected"),
        (json.dumps(STEP | {"loss": float("nan")}), "line 2: expected"),
        (json.dumps(STEP | {"loss": True}), "line 2: expected"),
        (json.dumps(STEP | {"tokens": 10**400}), "line 2: expected"),
        ("[" * 100_000, "line 2 is not JSON"),
    ],
)
def test_metrics_that_no_run_wrote_are_refused(tmp_path, line: str, said: str) -> None:
    folder = write_run(tmp_path / "run", FACTS, f"{json.dumps(STEP)}\n{line}\n")
    with pytest.raises(FileFormatError, match=said):
        read_record(folder)


@pytest.mark.parametrize("facts", [[], {}, {"settings": {"epochs": "2"}, "class_names": []}])
def test_facts_that_no_run_wrote_are_refused(tmp_path, facts: object) -> None:
    with pytest.raises(FileFormatError, match=r"run\.json"):
        read_record(write_run(tmp_path / "run", facts, ""))


def test_a_folder_without_a_run_is_named(tmp_path) -> None:
    with pytest.raises(MissingFileError, match=r"run\.json"):
        read_record(tmp_path)
