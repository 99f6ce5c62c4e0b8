"""metrics.jsonl: one JSON object a line, for each step and each epoch, written as they happen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from lora.errors import FileFormatError
from lora.train.callbacks import Callback, EpochDone, StepDone
from lora.train.row_file import RowFile

_BLOCK = 2**20


class MetricsFile(Callback):
    """Writes what happens to a file that a reader may follow."""

    def __init__(self, path: Path, counted: Mapping[str, Any] | None = None) -> None:
        """Open the file; of what a run that goes on has written, the rows that `settled` counted stay.

        Raises:
            FileFormatError: those rows are not in the file as they were written.
            WriteError: the file cannot be written.
        """
        if counted is not None and not path.is_file():
            raise FileFormatError(f"{path}: expected the rows that the state counts on, found no file")
        self._path, self._digest, self._bytes = path, sha256(), 0
        self._file = RowFile(path, anew=counted is None)
        if counted is not None:
            self._keep(counted)

    def step_done(self, event: StepDone) -> None:
        """Write a row {"kind": "step", ...}."""
        self._write("step", asdict(event))

    def epoch_done(self, event: EpochDone) -> None:
        """Write a row {"kind": "epoch", ...}."""
        self._write("epoch", event.as_dict())

    def settled(self) -> dict[str, Any]:
        """Bring all rows to the disk, and return what a state that counts on them has to remember."""
        self._file.sync()
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _keep(self, counted: Mapping[str, Any]) -> None:
        size = counted["bytes"]
        while block := self._file.read(min(_BLOCK, size - self._bytes)):
            self._digest.update(block)
            self._bytes += len(block)
        if self._digest.hexdigest() != counted["sha256"]:
            self.close()
            raise FileFormatError(
                f"{self._path}: cut short or changed: expected the first {size} bytes as the run wrote them"
            )
        self._file.truncate(size)

    def _write(self, kind: str, fields: dict[str, Any]) -> None:
        row = json.dumps({"kind": kind, **fields}).encode() + b"\n"
        self._file.append(row)
        self._digest.update(row)
        self._bytes += len(row)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl, in their order."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
