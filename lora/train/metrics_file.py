"""metrics.jsonl: one JSON object a line, for each step and each epoch, written as they happen."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora.errors import WriteError
from lora.train.callbacks import Callback, EpochDone, StepDone


class MetricsFile(Callback):
    """Writes what happens to a file that a reader may follow."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("w", encoding="utf-8")
        except OSError as error:
            raise WriteError(f"{path}: cannot be written: {error.strerror}") from error

    def step_done(self, event: StepDone) -> None:
        """Write a row {"kind": "step", ...}."""
        self._write("step", asdict(event))

    def epoch_done(self, event: EpochDone) -> None:
        """Write a row {"kind": "epoch", ...}."""
        self._write("epoch", event.as_dict())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, kind: str, fields: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps({"kind": kind, **fields}) + "\n")
            self._file.flush()
        except OSError as error:
            raise WriteError(f"{self._path}: cannot be written: {error.strerror}") from error
