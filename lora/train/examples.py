"""From a data file to token sequences with labels: what a run trains on, validates on, or is evaluated on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from lora.data.causal import CausalData, read_texts
from lora.data.classify import ClassifyData, read_examples
from lora.data.packed import Packed, pack, pack_causal
from lora.data.rows import scan_jsonl
from lora.data.tokenizer import Tokenizer
from lora.errors import DataError

TASKS_BY_FIELD = {"label": "classify", "text": "causal"}


@dataclass(frozen=True)
class Examples:
    """Tokenised rows; a classifier's have a label each."""

    sequences: tuple[np.ndarray, ...]  # each [T] int64
    labels: np.ndarray | None  # [n] int64
    truncated: int  # rows that lost their tail

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def tokens(self) -> int:
        """Tokens of all rows together."""
        return sum(map(len, self.sequences))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, [n] int64."""
        return np.array([len(sequence) for sequence in self.sequences], np.int64)

    def batch(self, rows: Sequence[int] | np.ndarray) -> Packed:
        """Return the rows of these indices as one packed batch."""
        sequences = [self.sequences[row] for row in rows]
        if self.labels is None:
            return pack_causal(sequences)
        return pack(sequences, self.labels[np.asarray(rows)])

    def subset(self, rows: np.ndarray) -> Examples:
        """Return the rows of these indices as examples of their own."""
        labels = None if self.labels is None else self.labels[rows]
        return Examples(tuple(self.sequences[row] for row in rows), labels, self.truncated)


def detect_task(path: Path) -> str:
    """Return the task that the fields of the first good row of `path` ask for.

    Rows that are bad are left to `read_data`, which lists them together with those that lack a field.

    Raises:
        DataError: no field names a task.
    """
    rows, problems = scan_jsonl(path)
    if not rows:
        problems.raise_any()
    fields = rows[0].fields
    for field, task in TASKS_BY_FIELD.items():
        if field in fields:
            return task
    raise DataError(
        f"{path}: cannot tell the task from the fields {sorted(fields)}: expected input and label "
        "(classify), or text (causal)"
    )


def read_data(
    path: Path, task: str, *, class_names: Sequence[str] | None = None, num_classes: int | None = None
) -> ClassifyData | CausalData:
    """Read every row of `path`; see `lora.data` for what is refused."""
    if task == "classify":
        return read_examples(path, class_names=class_names, num_classes=num_classes)
    return read_texts(path)


def tokenise(data: ClassifyData | CausalData, tokenizer: Tokenizer, max_seq_len: int) -> Examples:
    """Return the rows as token ids, at most `max_seq_len` each; a causal row ends with one EOS.

    Raises:
        DataError: a row holds no token, or a causal row only one: there is nothing to predict.
    """
    causal = isinstance(data, CausalData)
    encoded = tokenizer.encode(data.texts, max_seq_len, append_eos=causal, lines=data.lines)
    short = [line for line, ids in zip(data.lines, encoded.ids, strict=True) if causal and len(ids) < 2]
    if short:
        raise DataError(f"rows of one token predict nothing (raise max_seq_len?): lines {short[:20]}")
    labels = None if isinstance(data, CausalData) else data.labels
    return Examples(tuple(encoded.ids), labels, encoded.truncated)


def data_hash(data: ClassifyData | CausalData) -> str:
    """Return a SHA-256 over the rows in the order of their text: shuffling a file does not change it."""
    if isinstance(data, CausalData):
        rows = sorted(text.encode() for text in data.texts)
    else:
        names = data.class_names
        rows = sorted(
            text.encode() + b"\0" + names[label].encode()
            for text, label in zip(data.texts, data.labels, strict=True)
        )
    digest = sha256()
    for row in rows:
        digest.update(len(row).to_bytes(8, "little") + row)
    return digest.hexdigest()
