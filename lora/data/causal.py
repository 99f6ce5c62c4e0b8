"""Rows for causal language modelling: one `text` each, trained from its first token to its end."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from lora.data.rows import Row, read_parsed, text_field


class CausalData(NamedTuple):
    """Texts in the order of the file."""

    texts: tuple[str, ...]
    lines: tuple[int, ...]  # where each text stands in the file


def read_texts(path: str | Path) -> CausalData:
    """Read rows {"text": string}; other fields are allowed and not read.

    Raises:
        MissingFileError: there is no such file.
        DataError: the file is empty, or a row is bad; every bad row is listed by its line.
    """
    pairs, problems = read_parsed(path, _parse)
    problems.raise_any()
    texts, lines = zip(*pairs, strict=True)
    return CausalData(texts, lines)


def _parse(row: Row) -> tuple[str, int]:
    return text_field(row, "text"), row.line
