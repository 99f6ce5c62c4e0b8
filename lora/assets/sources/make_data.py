"""Write lora/assets/demo/train.jsonl and test.jsonl: `python -m lora.assets.sources.make_data`.

Same seeds, same bytes. The test split comes from the pool "held_out", so each of its rows holds a command or
a form that no training row shows; no text is in both splits.
"""

import json
import random
from collections.abc import Collection
from pathlib import Path

from lora.assets.sources.shell_lines import Line, ShellLines

DEMO = Path(__file__).resolve().parents[1] / "demo"
TRAIN_ROWS = 3000
TEST_ROWS = 800


def splits() -> dict[str, list[Line]]:
    """Draw the rows of "train" and "test"."""
    train = _distinct(ShellLines(random.Random(1), "shown"), TRAIN_ROWS, taken=())
    test = _distinct(ShellLines(random.Random(2), "held_out"), TEST_ROWS, taken={line.text for line in train})
    return {"train": train, "test": test}


def jsonl(lines: list[Line]) -> str:
    """Return rows as JSON lines: {"input": the text, "label": the name of its class}."""
    return "".join(json.dumps({"input": line.text, "label": line.label}) + "\n" for line in lines)


def main() -> None:
    """Write both files."""
    for name, lines in splits().items():
        (DEMO / f"{name}.jsonl").write_text(jsonl(lines), encoding="utf-8")


def _distinct(source: ShellLines, count: int, *, taken: Collection[str]) -> list[Line]:
    """Draw `count` lines whose texts differ from each other and from those taken."""
    lines: dict[str, Line] = {}
    while len(lines) < count:
        line = source.line()
        if line.text not in taken:
            lines.setdefault(line.text, line)
    return list(lines.values())


if __name__ == "__main__":
    main()
