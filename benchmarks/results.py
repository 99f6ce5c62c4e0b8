"""Records on disk: one line of JSON each, the latest of a kind kept."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]

FOLDER = Path(__file__).parent / "results"
# what every record holds; a record that was not measured says why in `status`, and holds no figure
COMMON = ("benchmark", "case", "contestant", "device", "status", "machine", "date", "commit")
MEASURED = "measured"
NOTHING_MEASURED = 5  # exit code of a command that could measure nothing


def not_measured(reason: str) -> str:
    """Return the status of a record without figures."""
    return f"not measured: {reason}"


def read(path: Path) -> list[Record]:
    """Return the records of a file, oldest first; none where there is no file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def write(path: Path, records: Iterable[Record]) -> None:
    """Add `records` to a file, each in the place of an older one of its benchmark, case, contestant, machine.

    Raises:
        ValueError: a record lacks a field of `COMMON`.
    """
    new = list(records)
    for record in new:
        missing = [field for field in COMMON if field not in record]
        if missing:
            raise ValueError(f"record of {record.get('case')!r}: {', '.join(missing)} missing")
    replaced = {_key(record) for record in new}
    kept = [record for record in read(path) if _key(record) not in replaced]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in [*kept, *new]), encoding="utf-8")


def _key(record: Record) -> tuple[str, ...]:
    machine = record["machine"]
    return (
        record["benchmark"],
        record["case"],
        record["contestant"],
        f"{machine['cpu']}, {machine['cores']}, {machine['gpu']}",
    )
