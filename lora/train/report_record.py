"""What a run left in its folder, read for a report: run.json, metrics.jsonl, and which states there are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora.errors import FileFormatError, MissingFileError
from lora.io.checkpoint import read_json_object
from lora.train.recipe import RECIPE_FILE
from lora.train.run import RUN_FILE

METRICS_FILE = "metrics.jsonl"
_NUMBERS = {
    "step": ("step", "epoch", "loss", "learning_rate", "gradient_norm", "tokens", "tokens_per_second"),
    "epoch": (
        "epoch",
        "train_loss",
        "val_loss",
        "train_accuracy",
        "val_accuracy",
        "learning_rate",
        "epoch_time_ms",
        "samples_per_sec",
    ),
}


@dataclass(frozen=True)
class Record:
    """A run so far, finished or not."""

    folder: Path
    facts: dict[str, Any]  # run.json
    steps: tuple[dict[str, Any], ...]  # the rows of metrics.jsonl
    epochs: tuple[dict[str, Any], ...]

    @property
    def settings(self) -> dict[str, Any]:
        """The run's settings by name."""
        return self.facts["settings"]

    @property
    def best(self) -> dict[str, Any] | None:
        """The epoch with the lowest validation loss, the first of equals; None before any has ended."""
        return min(self.epochs, key=lambda epoch: epoch["val_loss"], default=None)

    @property
    def status(self) -> str:
        """How far the run came: "complete", "stopped early" or "unfinished"."""
        if len(self.epochs) >= self.settings["epochs"]:
            return "complete"
        if self.best and self.epochs[-1]["epoch"] - self.best["epoch"] >= self.settings["patience"]:
            return "stopped early"
        return "unfinished"

    @property
    def state(self) -> Path | None:
        """The folder of the best state; of an interrupted run's last one where no epoch has ended."""
        return next((path for path in (self.folder / "best", self.folder / "last") if path.is_dir()), None)

    @property
    def recipe(self) -> Path:
        """The run's own recipe."""
        return self.folder / RECIPE_FILE


def read_record(folder: Path) -> Record:
    """Return what the run in `folder` left.

    Raises:
        MissingFileError: the folder holds no run.
        FileFormatError: a file of it is not what a run writes.
    """
    path = folder / RUN_FILE
    if not path.is_file():
        raise MissingFileError(f"{folder}: expected the folder of a run, which holds {RUN_FILE}")
    facts = read_json_object(path)
    settings = facts.get("settings")
    whole = isinstance(settings, dict) and all(type(settings.get(n)) is int for n in ("epochs", "patience"))
    if not whole or not isinstance(facts.get("class_names"), list):
        raise FileFormatError(f"{path}: expected the settings and class_names of a run")
    rows = _read_metrics(folder / METRICS_FILE)
    steps, epochs = (tuple(row for row in rows if row["kind"] == kind) for kind in ("step", "epoch"))
    return Record(folder, facts, steps, epochs)


def _read_metrics(path: Path) -> Sequence[dict[str, Any]]:
    if not path.is_file():
        return ()
    try:
        lines = path.read_bytes().decode().split("\n")
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{path}: expected UTF-8: {error}") from error
    # what stands after the last line end is nothing, or a row that a killed run had begun
    return [_row(path, number, line) for number, line in enumerate(lines[:-1], start=1)]


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: line {number} is not JSON: {error}") from error
    kind = row.get("kind") if isinstance(row, dict) else None
    names = _NUMBERS.get(kind, ()) if isinstance(kind, str) else ()
    if not names or not all(_is_number(row.get(name)) for name in names):
        raise FileFormatError(f"{path}: line {number}: expected a step or an epoch with all of its numbers")
    return row


def _is_number(value: Any) -> bool:
    # beyond this no run has been; a NaN is not below it either
    return type(value) in (int, float) and abs(value) < 1e15
