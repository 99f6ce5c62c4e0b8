"""`lora predict`: the class of each text, and how sure the classifier is."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora.cli.options import base_option, dtype_option, length_option, output_options
from lora.cli.output import note_truncated, one_line, print_json
from lora.cli.unbuilt import refuse_apr
from lora.errors import DataError, FileFormatError, MissingFileError, UsageError

if TYPE_CHECKING:
    import numpy as np

    from lora.model.model import Model


@click.command(short_help="Classify texts.")
@click.argument("model", metavar="MODEL_OR_ADAPTER")
@click.argument("texts", metavar="[TEXT]...", nargs=-1)
@click.option(
    "--data", "-d", metavar="FILE", help='*.jsonl: the "input" of each row; any other file: each line.'
)
@length_option
@base_option
@dtype_option
@output_options
def predict(
    model: str,
    texts: tuple[str, ...],
    data: str | None,
    max_seq_len: int,
    base: str | None,
    dtype: str,
    as_json: bool,
) -> None:
    """Classify each TEXT, each row of --data, or else each line of standard input.

    A TEXT that starts with a dash comes after `--`.
    """
    refuse_apr(model)
    if texts and data is not None:
        raise UsageError("texts come from the arguments or from --data, not from both")
    from lora.io.hub import require_path
    from lora.model.loading import load
    from lora.train.evaluate import classifier_head

    require_path(model)
    read = _read(texts, data)
    loaded = load(model, base=base, dtype=dtype)
    names = classifier_head(loaded).class_names
    predictions, truncated = predict_texts(loaded, read, max_seq_len)
    note_truncated(truncated, max_seq_len)
    if as_json:
        document = {"status": "predicted", "model": model, "class_names": list(names)}
        print_json(
            {**document, "truncated_rows": truncated, "predictions": [p.as_dict() for p in predictions]}
        )
    else:
        print_predictions(predictions)


@dataclass(frozen=True)
class Texts:
    """What is to be classified, and where each text stands in its file; None for arguments."""

    texts: tuple[str, ...]
    lines: tuple[int, ...] | None


@dataclass(frozen=True)
class Prediction:
    """The most probable class of a text."""

    text: str
    label: str
    probability: float
    probabilities: dict[str, float]  # by class name

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return vars(self)


def predict_texts(model: Model, read: Texts, max_seq_len: int) -> tuple[list[Prediction], int]:
    """Return the prediction for each text, and how many texts lost their tail.

    Raises:
        ValidationError: the model is no classifier.
        DataError: a text holds no token.
    """
    from lora.data.tokenizer import Tokenizer
    from lora.train.evaluate import class_probabilities, classifier_head

    encoded = Tokenizer.load(model.checkpoint.folder).encode(read.texts, max_seq_len, lines=read.lines)
    rows = class_probabilities(model, encoded.ids)
    names = classifier_head(model).class_names
    return [_prediction(*pair, names) for pair in zip(read.texts, rows, strict=True)], encoded.truncated


def print_predictions(predictions: Sequence[Prediction]) -> None:
    """Print a line for each text: class, probability, and how the text begins."""
    width = max(len(p.label) for p in predictions)
    for p in predictions:
        click.echo(f"{p.label:<{width}}  {p.probability:.4f}  {one_line(p.text)}")


def _prediction(text: str, row: np.ndarray, names: Sequence[str]) -> Prediction:
    best = int(row.argmax())
    return Prediction(text, names[best], float(row[best]), dict(zip(names, row.tolist(), strict=True)))


def _read(texts: tuple[str, ...], data: str | None) -> Texts:
    if texts:
        return Texts(_decoded(texts), None)
    if data is not None:
        return _rows(Path(data)) if data.endswith(".jsonl") else _lines(_content(Path(data)), data)
    if sys.stdin.isatty():
        raise UsageError(
            "nothing to classify: give texts as arguments, in a file with --data, or on standard input"
        )
    return _lines(sys.stdin.buffer.read(), "standard input")


def _decoded(texts: tuple[str, ...]) -> tuple[str, ...]:
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:  # Python keeps bytes that are no UTF-8 as halves of surrogate pairs
        raise UsageError("expected texts in UTF-8 as arguments; other bytes come in a file") from error
    return texts


def _rows(path: Path) -> Texts:
    from lora.data.rows import read_parsed, text_field

    pairs, problems = read_parsed(path, lambda row: (text_field(row, "input"), row.line))
    problems.raise_any()
    return Texts(*zip(*pairs, strict=True))


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise MissingFileError(f"{path}: expected a file, found {'a folder' if path.is_dir() else 'nothing'}")
    return path.read_bytes()


def _lines(content: bytes, where: str) -> Texts:
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{where}: expected UTF-8, found byte 0x{content[error.start]:02x}") from error
    lines = tuple(line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")) if text else ()
    if not lines:
        raise DataError(f"{where}: holds no text")
    return Texts(lines, tuple(range(1, len(lines) + 1)))
