"""The small files beside the weights, by name: configuration, tokenizer, template, an adapter's facts."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Protocol, TypeVar

from lora.errors import FileFormatError

CONFIG = "config.json"
HEAD_FILE = "lora_head.json"  # of a classifier, what config.json has no place for
# what a tokenizer, a chat template, a processor and a generation setting are stored as
COMPANIONS = (
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "*processor_config.json",
)
MODEL_FILES = (CONFIG, HEAD_FILE, *COMPANIONS)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_METADATA = "lora_metadata.json"
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_METADATA)


class _File(Protocol):
    @property
    def name(self) -> str: ...
    def is_file(self) -> bool: ...


_F = TypeVar("_F", bound=_File)


def matching(files: Iterable[_F], patterns: tuple[str, ...]) -> list[_F]:
    """Return those of `files` whose names match a pattern, sorted by name."""
    named = [file for file in files if any(fnmatchcase(file.name, pattern) for pattern in patterns)]
    return sorted((file for file in named if file.is_file()), key=lambda file: file.name)


def decoded(files: dict[str, bytes]) -> dict[str, str]:
    """Return the texts of `files`, by name.

    Raises:
        FileFormatError: one is not UTF-8; it is named.
    """
    texts = {}
    for name, content in files.items():
        try:
            texts[name] = content.decode()
        except UnicodeDecodeError as error:
            raise FileFormatError(f"{name} is not UTF-8: {error}") from error
    return texts
