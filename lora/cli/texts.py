"""Texts that a command works on: from its arguments, a file or standard input."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from lora.errors import DataError, FileFormatError, MissingFileError, UsageError


@dataclass(frozen=True)
class Texts:
    """What a command works on, and where each text stands in its file; None for arguments."""

    texts: tuple[str, ...]
    lines: tuple[int, ...] | None


def check_one_source(texts: tuple[str, ...], data: str | None) -> None:
    """Refuse texts from two places at once.

    Raises:
        UsageError: there are arguments and a file.
    """
    if texts and data is not None:
        raise UsageError("texts come from the arguments or from --data, not from both")


def read_texts(texts: tuple[str, ...], data: str | None, *, field: str) -> Texts:
    """Return the texts of the arguments, or of the file `data`, or else each line of standard input.

    Args:
        texts: the arguments.
        data: *.jsonl, of which `field` of each row is read; of any other file, each line.
        field: which field of a row holds the text.

    Raises:
        UsageError: standard input is a terminal, or an argument is no UTF-8.
        MissingFileError: there is no such file.
        FileFormatError: the input is no UTF-8.
        DataError: the input holds no text, or a row has no such field.
    """
    if texts:
        return Texts(_decoded(texts), None)
    if data is not None:
        return _rows(Path(data), field) if data.endswith(".jsonl") else _lines(_content(Path(data)), data)
    if sys.stdin.isatty():
        raise UsageError("no text: give texts as arguments, in a file with --data, or on standard input")
    return _lines(sys.stdin.buffer.read(), "standard input")


def _decoded(texts: tuple[str, ...]) -> tuple[str, ...]:
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:  # Python keeps bytes that are no UTF-8 as halves of surrogate pairs
        raise UsageError("expected texts in UTF-8 as arguments; other bytes come in a file") from error
    return texts


def _rows(path: Path, field: str) -> Texts:
    from lora.data.rows import read_parsed, text_field

    pairs, problems = read_parsed(path, lambda row: (text_field(row, field), row.line))
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
