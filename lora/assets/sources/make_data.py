"""Write lora/assets/demo/train.jsonl and test.jsonl: `python -m lora.assets.sources.make_data`.

Same seeds, same bytes. About half of the test rows come from the pool "held_out": each holds a command or a
form that no training row shows. The other half are new lines of the kinds that it shows. No text is in both.
"""

import json
import random
from collections.abc import Collection
from pathlib import Path

from lora.assets.sources.shell_lines import Line, ShellLines

DEMO = Path(__file__).resolve().parents[1] / "demo"
TRAIN_ROWS = 3000
HELD_OUT_ROWS = 400  # of the test split
SHOWN_ROWS = 400  # likewise


def splits() -> dict[str, list[Line]]:
    """Return the rows of "train" and "test".

    A statement that stands alone is no test row: the base's text explains statements one by one.
    """
    lines = drawn()
    return {
        "train": lines["train"],
        "test": [line for line in lines["test"] if line.text != line.deciding.text],
    }


def drawn() -> dict[str, list[Line]]:
    """Draw the lines that both splits are chosen from."""
    train = _distinct(ShellLines(random.Random(1), "shown"), TRAIN_ROWS, taken=())
    seen = {line.text for line in train}
    held_out = _distinct(ShellLines(random.Random(2), "held_out"), HELD_OUT_ROWS, taken=seen)
    seen |= {line.text for line in held_out}
    shown = _distinct(ShellLines(random.Random(3), "shown"), SHOWN_ROWS, taken=seen)
    # in turns, so that any part of the file holds as much of the one as of the other
    test = [line for pair in zip(held_out, shown, strict=True) for line in pair]
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
