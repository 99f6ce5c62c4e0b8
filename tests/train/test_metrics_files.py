"""metrics.csv and TensorBoard's event files say what metrics.jsonl says, value for value."""

from __future__ import annotations

import csv
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lora
from lora.errors import UnsupportedError, WriteError
from lora.train.callbacks import EpochDone, StepDone
from lora.train.metrics_csv import COLUMNS, MetricsCsv
from tests.cli.conftest import LABELLED, write_base
from tests.data.files import write_jsonl

SETTINGS = {"epochs": 2, "batch_size": 4, "learning_rate": 0.02}


def train(folder: Path, **settings: Any) -> Path:
    base, data = write_base(folder / "base"), write_jsonl(folder / "rows.jsonl", LABELLED)
    return lora.finetune(base, data, output=folder / "run", **SETTINGS | settings).output


def jsonl_rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def csv_rows(path: Path) -> list[dict[str, Any]]:
    """Return each row's own columns, read as JSON reads them."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, strict=True))
    assert all(tuple(row) == COLUMNS for row in rows)
    cells = [{name: cell for name, cell in row.items() if cell != ""} for row in rows]
    return [
        {name: cell if name == "kind" else json.loads(cell) for name, cell in row.items()} for row in cells
    ]


def test_the_csv_holds_the_rows_of_the_jsonl(tmp_path) -> None:
    run = train(tmp_path)
    rows = jsonl_rows(run)
    assert [row["kind"] for row in rows].count("step") == 8
    assert csv_rows(run / "metrics.csv") == rows


def test_earlier_rows_stand_before_new_ones(tmp_path) -> None:
    step = StepDone(2, 1, 0.5, 1e-4, 1.0, 64, 10.0, None)
    epoch = EpochDone(1, 0.5, float("inf"), 0.75, 0.5, 1e-4, 12, 3.0, True)
    earlier = [{"kind": "step", **vars(step), "step": 1, "note": "of a later version"}]
    metrics = MetricsCsv(tmp_path / "metrics.csv", earlier)
    metrics.step_done(step)
    metrics.epoch_done(epoch)
    metrics.close()
    rows = csv_rows(tmp_path / "metrics.csv")
    assert [(row["kind"], row.get("step")) for row in rows] == [("step", 1), ("step", 2), ("epoch", None)]
    assert rows[2] == {"kind": "epoch", **vars(epoch)}
    assert "peak_memory" not in rows[1]  # nobody told


def test_a_csv_that_cannot_be_written_is_named(tmp_path) -> None:
    with pytest.raises(WriteError, match=r"metrics\.csv"):
        MetricsCsv(tmp_path / "none" / "metrics.csv")


def test_memory_is_told_with_every_step(tmp_path) -> None:
    peaks = [row["peak_memory"] for row in jsonl_rows(train(tmp_path)) if row["kind"] == "step"]
    assert all(2**24 < peak < 2**40 for peak in peaks)  # an interpreter with NumPy, in bytes


def events(path: Path) -> Iterator[Any]:
    """Yield the events of a file of records: u64 length, its CRC, the bytes, their CRC."""
    from tensorboardX.proto.event_pb2 import Event

    raw, at = path.read_bytes(), 0
    while at < len(raw):
        (size,) = struct.unpack_from("<Q", raw, at)
        yield Event.FromString(raw[at + 12 : at + 12 + size])
        at += 12 + size + 4


def test_event_files_hold_the_same_numbers(tmp_path) -> None:
    pytest.importorskip("tensorboardX", reason="the extra `tensorboard` is not installed")
    run = train(tmp_path, tensorboard=True)
    (file,) = (run / "tensorboard").iterdir()
    found = {
        (value.tag, event.step): value.simple_value for event in events(file) for value in event.summary.value
    }
    expected, step = {}, 0
    for row in jsonl_rows(run):
        step = row.get("step", step)
        for name in ("loss", "learning_rate", "gradient_norm", "tokens_per_second"):
            if row["kind"] == "step":
                expected[f"train/{name}", step] = row[name]
        for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
            if row["kind"] == "epoch":
                expected[f"epoch/{name}", step] = row[name]
    assert found == pytest.approx(expected, rel=1e-6)  # stored in single precision


def test_without_the_extra_nothing_is_written_and_it_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'lora-numpy\[tensorboard\]'"):
        train(tmp_path, tensorboard=True)
    assert not (tmp_path / "run").exists()
