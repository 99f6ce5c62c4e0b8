"""Data files and a tokenizer small enough to be read in a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

EOS = "<|endoftext|>"


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    """Write `rows` one a line; a str or bytes goes in as it stands, anything else as JSON."""
    path.write_bytes(b"\n".join(map(_line, rows)))
    return path


def _line(row: Any) -> bytes:
    if isinstance(row, bytes):
        return row
    return (row if isinstance(row, str) else json.dumps(row)).encode()


def byte_tokenizer() -> tokenizers.Tokenizer:
    """Return a byte-level tokenizer without merges: one token per UTF-8 byte, and `EOS` with id 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([EOS])
    return built


def tokenizer_folder(folder: Path, **settings: Any) -> Path:
    """Write the byte-level tokenizer into `folder`, and `settings` (by default its EOS) beside it."""
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings or {"eos_token": EOS}))
    return folder
