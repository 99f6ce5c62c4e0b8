"""From a data file to token sequences with labels: what a run trains on, validates on, or is evaluated on."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from lora.data.causal import CausalData, read_texts
from lora.data.chat_template import CHATML, ChatTemplate
from lora.data.classify import ClassifyData, read_examples, read_multi_label
from lora.data.instruct import InstructData, read_instructions
from lora.data.packed import IGNORED, Packed, pack, pack_causal
from lora.data.rows import SHOWN, scan_jsonl
from lora.data.supervision import supervise, token_labels
from lora.data.tokenizer import Tokenizer
from lora.errors import DataError, FileFormatError, LoraWarning

TASKS_BY_FIELD = {
    "label": "classify",
    "labels": "classify",
    "text": "causal",
    "messages": "instruct",
    "instruction": "instruct",
    "completion": "instruct",
}
Data = ClassifyData | CausalData | InstructData


@dataclass(frozen=True)
class Examples:
    """Tokenised rows; a classifier's have a label each, or several."""

    sequences: tuple[np.ndarray, ...]  # each [T] int64
    labels: np.ndarray | None  # [n] int64; or with several labels a row [n, C] int64 of 0 and 1
    truncated: int  # rows that lost their tail
    # of an instruction's tokens, each [T] int64: the id where it is learned, else -100
    token_labels: tuple[np.ndarray, ...] | None = None

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def classes(self) -> np.ndarray | None:
        """The one class of each row, [n] int64; None where rows have none, or several labels."""
        return None if self.labels is None or self.labels.ndim == 2 else self.labels

    @property
    def strata(self) -> np.ndarray | int:
        """What a split is stratified by: the class of each row, or n where rows have no class."""
        return len(self) if self.classes is None else self.classes

    @property
    def tokens(self) -> int:
        """Tokens of all rows together."""
        return sum(map(len, self.sequences))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, [n] int64."""
        return np.array([len(sequence) for sequence in self.sequences], np.int64)

    @property
    def predicted(self) -> int:
        """Tokens of all rows that a language model is scored on: each after the first, or those learned."""
        if self.token_labels is None:
            return self.tokens - len(self)
        return sum(int((labels[1:] != IGNORED).sum()) for labels in self.token_labels)

    def batch(self, rows: Sequence[int] | np.ndarray) -> Packed:
        """Return the rows of these indices as one packed batch."""
        sequences = [self.sequences[row] for row in rows]
        if self.token_labels is not None:
            return pack_causal(sequences, [self.token_labels[row] for row in rows])
        if self.labels is None:
            return pack_causal(sequences)
        return pack(sequences, self.labels[np.asarray(rows)])

    def subset(self, rows: np.ndarray) -> Examples:
        """Return the rows of these indices as examples of their own."""
        labels = None if self.labels is None else self.labels[rows]
        of_tokens = self.token_labels
        return Examples(
            tuple(self.sequences[row] for row in rows),
            labels,
            self.truncated,
            None if of_tokens is None else tuple(of_tokens[row] for row in rows),
        )


def detect_task(path: Path) -> str:
    """Return the task that the fields of the first good row of `path` ask for.

    Rows that are bad are left to `read_data`, which lists them together with those that lack a field.

    Raises:
        DataError: no field names a task.
    """
    fields = _first_fields(path)
    for field, task in TASKS_BY_FIELD.items():
        if field in fields:
            return task
    raise DataError(
        f"{path}: cannot tell the task from the fields {sorted(fields)}: expected input and label or labels "
        "(classify), text (causal), or messages, instruction and response, or prompt and completion "
        "(instruct)"
    )


def _first_fields(path: Path) -> dict[str, Any]:
    rows, problems = scan_jsonl(path)
    if not rows:
        problems.raise_any()
    return rows[0].fields


def task_of(data: Data) -> str:
    """Return the task that rows were read for."""
    if isinstance(data, ClassifyData):
        return "classify"
    return "instruct" if isinstance(data, InstructData) else "causal"


def read_data(
    path: Path,
    task: str,
    *,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    multi_label: bool | None = None,
) -> Data:
    """Read every row of `path`; see `lora.data` for what is refused.

    Args:
        path: a JSON Lines file.
        task: "classify", "causal" or "instruct".
        class_names: of a trained classifier, in the order of its head.
        num_classes: how many outputs a classifier has.
        multi_label: whether rows to classify have `labels`; None for what the first row has.
    """
    if task == "classify":
        if multi_label is None:
            multi_label = "labels" in (fields := _first_fields(path)) and "label" not in fields
        read = read_multi_label if multi_label else read_examples
        return read(path, class_names=class_names, num_classes=num_classes)
    return read_instructions(path) if task == "instruct" else read_texts(path)


def tokenise(
    data: Data, tokenizer: Tokenizer, max_seq_len: int, *, template: ChatTemplate | None = None
) -> Examples:
    """Return the rows as token ids, at most `max_seq_len` each; a causal row ends with one EOS.

    Args:
        data: from `read_data`.
        tokenizer: of the checkpoint.
        max_seq_len: tokens that a row keeps, from its beginning.
        template: the checkpoint's own, for instructions; without one, ChatML.

    Raises:
        DataError: a row holds no token, or a causal row only one: there is nothing to predict.
            Or an instruction's row that the template fails on, or of which nothing learned is left.
        FileFormatError: the template takes more steps than one row may.

    Warns:
        LoraWarning: conversations are written in ChatML, for want of a template of the checkpoint's own.
    """
    if isinstance(data, InstructData):
        return _tokenise_instructions(data, tokenizer, max_seq_len, template or ChatTemplate(CHATML))
    causal = isinstance(data, CausalData)
    encoded = tokenizer.encode(data.texts, max_seq_len, append_eos=causal, lines=data.lines)
    short = [line for line, ids in zip(data.lines, encoded.ids, strict=True) if causal and len(ids) < 2]
    if short:
        raise DataError(f"rows of one token predict nothing (raise max_seq_len?): lines {short[:20]}")
    labels = None if isinstance(data, CausalData) else data.labels
    return Examples(tuple(encoded.ids), labels, encoded.truncated)


def _tokenise_instructions(
    data: InstructData, tokenizer: Tokenizer, max_seq_len: int, template: ChatTemplate
) -> Examples:
    if template.stands_in and any(dialogue.messages for dialogue in data.dialogues):
        warnings.warn(
            "the checkpoint has no chat template: conversations are written in ChatML",
            LoraWarning,
            stacklevel=3,
        )
    rows, problems = [], []
    for dialogue, line in zip(data.dialogues, data.lines, strict=True):
        try:
            rows.append(supervise(dialogue, template, tokenizer.eos_token))
        except DataError as error:
            problems.append(f"line {line}: {error}")
        except FileFormatError as error:  # the template's own fault, which no other row can mend
            raise FileFormatError(f"line {line}: {error}") from error
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise DataError("\n  ".join([*problems[:SHOWN], *more]))
    sequences, labels, truncated = [], [], 0
    for row, (ids, offsets) in zip(
        rows, tokenizer.encode_with_offsets([row.text for row in rows]), strict=True
    ):
        sequences.append(np.array(ids[:max_seq_len], np.int64))
        labels.append(token_labels(ids, offsets, row.spans)[:max_seq_len])
        truncated += len(ids) > max_seq_len
    # the first token has nothing before it, so it is predicted by nothing
    unlearned = [line for line, row in zip(data.lines, labels, strict=True) if not (row[1:] != IGNORED).any()]
    if unlearned:
        raise DataError(
            f"{len(unlearned)} rows have nothing to learn within {max_seq_len} tokens (raise max_seq_len?): "
            f"lines {unlearned[:SHOWN]}"
        )
    return Examples(tuple(sequences), None, truncated, tuple(labels))


def data_hash(data: Data) -> str:
    """Return a SHA-256 over the rows in the order of their text: shuffling a file does not change it."""
    if isinstance(data, CausalData):
        rows = sorted(text.encode() for text in data.texts)
    elif isinstance(data, InstructData):
        rows = sorted(json.dumps(dialogue, sort_keys=True).encode() for dialogue in data.dialogues)
    else:
        rows = sorted(
            b"\0".join(part.encode() for part in (text, *data.names_of(row)))
            for row, text in enumerate(data.texts)
        )
    digest = sha256()
    for row in rows:
        digest.update(len(row).to_bytes(8, "little") + row)
    return digest.hexdigest()
