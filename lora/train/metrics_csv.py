"""metrics.csv: the rows of metrics.jsonl for a spreadsheet, each value spelled as there, in fixed columns."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from lora.train.callbacks import Callback, EpochDone, StepDone
from lora.train.row_file import RowFile

# a step fills the columns of a step, an epoch those of an epoch; the others stay empty
COLUMNS = tuple(
    dict.fromkeys(["kind", *(field.name for event in (StepDone, EpochDone) for field in fields(event))])
)


class MetricsCsv(Callback):
    """Writes what happens as rows under one header."""

    def __init__(self, path: Path, earlier: Iterable[Mapping[str, Any]] = ()) -> None:
        """Begin the file with `earlier`: the rows of metrics.jsonl that a resumed run goes on from."""
        self._file = RowFile(path)
        self._write(",".join(COLUMNS) + "\n" + "".join(map(_line, earlier)))

    def step_done(self, event: StepDone) -> None:
        """Write the row of a step."""
        self._write(_line({"kind": "step", **asdict(event)}))

    def epoch_done(self, event: EpochDone) -> None:
        """Write the row of an epoch."""
        self._write(_line({"kind": "epoch", **event.as_dict()}))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, text: str) -> None:
        self._file.append(text.encode())


def _line(row: Mapping[str, Any]) -> str:
    text = io.StringIO()
    cells = ["" if row.get(name) is None else _cell(row[name]) for name in COLUMNS]
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
