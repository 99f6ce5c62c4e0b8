"""Rows for classification: one `input` text and one `label`, an integer or a class name; or any `labels`.

Contract: contracts/classification-finetune-v1.yaml.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora.data.rows import SHOWN, Problems, Row, RowError, field, kind, read_parsed, text_field
from lora.errors import DataError, LoraWarning

# a larger label, in a file of fewer rows, is an id or a slip of the pen: num_classes must confirm it
INFERRED_CLASSES = 1000


class ClassifyData(NamedTuple):
    """Texts and their classes, in the order of the file."""

    texts: tuple[str, ...]
    # [n] int64, in [0, len(class_names)); or [n, C] int64, 1 for each label that a row has, else 0
    labels: np.ndarray
    class_names: tuple[str, ...]
    lines: tuple[int, ...]  # where each row stands in the file

    @property
    def is_multi_label(self) -> bool:
        """Whether a row has any number of labels, and not one class."""
        return self.labels.ndim == 2

    def names_of(self, row: int) -> list[str]:
        """Return the names of the class or the labels of a row, in the order of the head's outputs."""
        found = np.flatnonzero(self.labels[row]) if self.is_multi_label else [self.labels[row]]
        return [self.class_names[index] for index in found]


class _Example(NamedTuple):
    text: str
    label: int | str
    line: int


class _Labelled(NamedTuple):
    text: str
    labels: tuple[int | str, ...]
    line: int


def read_examples(
    path: str | Path, *, class_names: Sequence[str] | None = None, num_classes: int | None = None
) -> ClassifyData:
    """Read rows {"input": string, "label": integer or string}; other fields are allowed and not read.

    Integer labels are class indices: 0 to the largest one found, or to `num_classes` - 1, named "0", "1" and
    so on. String labels are class names, indexed in the sorted order of their code points. A file uses one
    kind.

    Args:
        path: a JSON Lines file.
        class_names: the classes of a trained adapter in the order of its head. Strings are looked up in it
            and integers index it, so that a file means the same at evaluation as in training.
        num_classes: how many outputs the head has; string labels must make as many.

    Warns:
        LoraWarning: integer labels have gaps, so that there are classes without a row.

    Raises:
        MissingFileError: there is no such file.
        DataError: the file is empty, or makes fewer than 2 classes or not `num_classes`; or rows are bad, all
            of which are listed by line (a label out of range as F-CLASS-002).
    """
    examples, problems = read_parsed(path, _parse)
    names, labels = _indexed(path, examples, problems, class_names, num_classes)
    return ClassifyData(tuple(e.text for e in examples), labels, names, tuple(e.line for e in examples))


def read_multi_label(
    path: str | Path, *, class_names: Sequence[str] | None = None, num_classes: int | None = None
) -> ClassifyData:
    """Read rows {"input": string, "labels": [integer or string, ...]}, each label at most once, or none.

    Labels are indices or names as those of `read_examples`, whose arguments and errors these are; the names
    are all that occur in the file.
    """
    rows, problems = read_parsed(path, _parse_labels)
    examples = [_Example(row.text, label, row.line) for row in rows for label in row.labels]
    names, indices = _indexed(path, examples, problems, class_names, num_classes)
    labels = np.zeros((len(rows), len(names)), np.int64)
    labels[np.repeat(np.arange(len(rows)), [len(row.labels) for row in rows]), indices] = 1
    return ClassifyData(tuple(row.text for row in rows), labels, names, tuple(row.line for row in rows))


def _parse(row: Row) -> _Example:
    return _Example(text_field(row, "input"), _label("label", field(row, "label")), row.line)


def _parse_labels(row: Row) -> _Labelled:
    text, labels = text_field(row, "input"), field(row, "labels")
    if not isinstance(labels, list):
        raise RowError(f"'labels': expected a list of integers or class names, found {kind(labels)}")
    labels = tuple(_label("labels", label) for label in labels)
    repeated = sorted({repr(label) for label in labels if labels.count(label) > 1})
    if repeated:
        raise RowError(f"'labels': expected each label once, found more of {', '.join(repeated)}")
    return _Labelled(text, labels, row.line)


def _label(name: str, label: Any) -> int | str:
    # bool is a subclass of int, and true is no class index
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise RowError(f"{name!r}: expected an integer or a class name, found {kind(label)}")
    if label == "":
        raise RowError(f"{name!r}: expected a class name, found an empty string")
    return label


def _indexed(
    path: str | Path,
    examples: list[_Example],
    problems: Problems,
    class_names: Sequence[str] | None,
    num_classes: int | None,
) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the class names, and the index of each example's, [n] int64; raise all problems."""
    same = _of_one_kind(examples, problems)
    names = _inferred_names(same, num_classes) if class_names is None else tuple(class_names)
    indices = _indices(same, names, problems)
    problems.raise_any()
    _check_count(path, names, num_classes)
    if class_names is None and num_classes is None:
        _warn_of_empty(path, names, indices)
    return names, indices


def _warn_of_empty(path: str | Path, names: tuple[str, ...], indices: np.ndarray) -> None:
    empty = [names[index] for index in np.flatnonzero(np.bincount(indices, minlength=len(names)) == 0)]
    if empty:
        more = f" and {len(empty) - SHOWN} more" if len(empty) > SHOWN else ""
        which = f"{', '.join(empty[:SHOWN])}{more}"
        which = f"class {which} has" if len(empty) == 1 else f"classes {which} have"
        warnings.warn(
            f"{path}: {which} no row, of {len(names)} from 0 to the largest label; number the labels without "
            f"gaps, write names, or give num_classes = {len(names)} if it is meant",
            LoraWarning,
            stacklevel=4,
        )


def _of_one_kind(examples: list[_Example], problems: Problems) -> list[_Example]:
    """Return the examples whose label is of the first one's kind; that there are others is one problem."""
    same = [e for e in examples if type(e.label) is type(examples[0].label)]
    if len(same) < len(examples):
        first = examples[0]
        other = next(e for e in examples if type(e.label) is not type(first.label))
        problems.add(
            other.line,
            f"line {other.line}: 'label': {other.label!r}, where line {first.line} has {first.label!r}; "
            "use integers or class names throughout",
        )
    return same


def _inferred_names(examples: list[_Example], num_classes: int | None) -> tuple[str, ...]:
    names = {e.label for e in examples if isinstance(e.label, str)}
    if names:
        return tuple(sorted(names))
    if num_classes is None:
        limit = max(INFERRED_CLASSES, len(examples))
        num_classes = 1 + max(
            (e.label for e in examples if isinstance(e.label, int) and e.label < limit), default=-1
        )
    return tuple(map(str, range(num_classes)))


def _indices(examples: list[_Example], names: tuple[str, ...], problems: Problems) -> np.ndarray:
    """Return the class index of every example, [n] int64, -1 for those added to the problems."""
    index = {name: i for i, name in enumerate(names)}
    labels = np.full(len(examples), -1, np.int64)
    for row, example in enumerate(examples):
        if isinstance(example.label, int):
            if 0 <= example.label < len(names):
                labels[row] = example.label
            else:
                problems.add(
                    example.line,
                    f"F-CLASS-002: label {example.label} at line {example.line} out of range "
                    f"(num_classes={len(names)})",
                )
        elif example.label in index:
            labels[row] = index[example.label]
        else:
            problems.add(
                example.line,
                f"F-CLASS-002: label {example.label!r} at line {example.line} is none of the classes "
                f"{', '.join(names)}",
            )
    return labels


def _check_count(path: str | Path, names: tuple[str, ...], num_classes: int | None) -> None:
    shown = ", ".join(names[:20]) + (" ..." if len(names) > 20 else "")
    if len(names) < 2:
        raise DataError(f"{path}: expected at least 2 classes, found {len(names)} ({shown})")
    if num_classes not in (None, len(names)):
        raise DataError(
            f"{path}: expected num_classes={num_classes}, found {len(names)} class names ({shown})"
        )
