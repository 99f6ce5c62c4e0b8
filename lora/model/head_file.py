"""What a classifier's checkpoint says of its head: config.json's labels, and our own file for the rest.

Transformers always pools the last token and has no place for another pooling in config.json, so a mean-pooled
head is recorded beside it.
"""

from __future__ import annotations

import json
from typing import Any, get_args

from lora.errors import FileFormatError
from lora.io.checkpoint import Checkpoint, read_json_object
from lora.io.small_files import HEAD_FILE
from lora.model.head import SINGLE_LABEL, ClassifierHead, Pooling, ProblemType


def read_head_file(checkpoint: Checkpoint, classes: int) -> tuple[Pooling, tuple[str, ...]]:
    """Return (pooling, class names) of the stored head of `classes` outputs.

    Raises:
        FileFormatError: the file names another pooling, or the labels are not one for each output.
    """
    path = checkpoint.folder / HEAD_FILE
    pooling = read_json_object(path).get("pooling") if path.is_file() else "last"
    if pooling not in ("mean", "last"):
        raise FileFormatError(f"{path}: pooling: expected mean or last, found {pooling!r}")
    labels = checkpoint.config.get("id2label")
    if labels is None:
        return pooling, tuple(map(str, range(classes)))
    if not isinstance(labels, dict) or sorted(labels) != sorted(map(str, range(classes))):
        raise FileFormatError(
            f"config.json: id2label: expected the keys 0 to {classes - 1}, the rows of score.weight; "
            f"found {labels}"
        )
    return pooling, tuple(str(labels[str(index)]) for index in range(classes))


def stored_problem_type(checkpoint: Checkpoint) -> ProblemType:
    """Return what config.json says a head decides, or single labels where it says nothing.

    Raises:
        FileFormatError: it says something else, such as regression.
    """
    found = checkpoint.config.get("problem_type") or SINGLE_LABEL
    if found not in get_args(ProblemType):
        raise FileFormatError(
            f"config.json: problem_type: expected {' or '.join(get_args(ProblemType))}, found {found!r}"
        )
    return found


def label_config(head: ClassifierHead) -> dict[str, Any]:
    """Return the entries of config.json that describe a classifier's labels."""
    return {
        "num_labels": len(head.class_names),
        "id2label": {str(index): name for index, name in enumerate(head.class_names)},
        "label2id": {name: index for index, name in enumerate(head.class_names)},
        "problem_type": head.problem_type,
    }


def head_file(head: ClassifierHead) -> str:
    """Return the text of our own file beside config.json."""
    return json.dumps({"pooling": head.pooling}, indent=2) + "\n"


def transformers_note(head: Any, *, has_bias: bool) -> str | None:
    """Say what Transformers would compute otherwise, or None where it computes the same."""
    if not isinstance(head, ClassifierHead):
        return None
    differs = [
        what
        for what, wrong in (("pools the last token", head.pooling != "last"), ("drops score.bias", has_bias))
        if wrong
    ]
    if not differs:
        return None
    return (
        f"Transformers and PEFT would compute other logits: there a classifier {' and '.join(differs)}. "
        "Train with pooling='last' and head_bias=False (--pooling last --no-head-bias) for one they reproduce"
    )
