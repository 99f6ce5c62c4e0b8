"""Rows of a data file as a model would learn them: what is learned stands between two marks."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora.cli.output import note_truncated, print_json
from lora.errors import UsageError

if TYPE_CHECKING:
    from lora.data.tokenizer import Tokenizer
    from lora.train.examples import Examples

OPEN, CLOSE = "【", "】"


def print_learned(
    path: Path, task: str | None, model: str, rows: int, max_seq_len: int, *, as_json: bool
) -> None:
    """Print the first `rows` rows of the data file `path` as token ids, labels and marked text.

    Args:
        path: JSON Lines.
        task: whose rows they are; None for what their fields say.
        model: the checkpoint whose tokenizer and chat template are used.
        rows: how many are shown; all of them are read and checked.
        max_seq_len: tokens that a row keeps.
        as_json: print one document.

    Raises:
        UsageError: the rows are a classifier's, whose labels are no tokens.
        LoraError: a row of the file is bad or teaches nothing, or the model's files are not as they must be.
    """
    from lora.data.chat_template import ChatTemplate
    from lora.data.tokenizer import Tokenizer
    from lora.io.hub import resolve
    from lora.train.examples import detect_task, read_data, tokenise

    task = task or detect_task(path)
    if task == "classify":
        raise UsageError(f"{path}: --model shows which tokens are learned, and a classifier learns a label")
    data = read_data(path, task)
    folder = resolve(model)
    tokenizer = Tokenizer.load(folder)
    examples = tokenise(data, tokenizer, max_seq_len, template=ChatTemplate.load(folder))
    shown = [{"line": line, **_row(examples, tokenizer, row)} for row, line in enumerate(data.lines[:rows])]
    note_truncated(examples.truncated, max_seq_len)
    if as_json:
        about = {"status": "inspected", "path": str(path), "task": task}
        print_json({**about, "truncated_rows": examples.truncated, "rows": shown})
        return
    for row in shown:
        click.echo(f"line {row['line']}: {row['learned']} of {len(row['input_ids'])} tokens are learned")
        click.echo(row["text"])


def _row(examples: Examples, tokenizer: Tokenizer, row: int) -> dict[str, Any]:
    from lora.data.packed import IGNORED

    ids = examples.sequences[row].tolist()
    # a causal row is learned from its second token on: the first has nothing before it
    labels = ids if examples.token_labels is None else examples.token_labels[row].tolist()
    labels = [IGNORED, *labels[1:]]
    text = ""
    for learned, run in groupby(zip(ids, labels, strict=True), lambda pair: pair[1] != IGNORED):
        part = tokenizer.decode([token for token, _ in run], skip_special_tokens=False)
        text += f"{OPEN}{part}{CLOSE}" if learned else part
    learned = sum(label != IGNORED for label in labels)
    return {"input_ids": ids, "labels": labels, "learned": learned, "text": text}
