"""Text to token ids and back, by the `tokenizer.json` that travels with a checkpoint.

No token is added but the EOS that a causal row is trained to end with: no BOS, and nothing in classification.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import tokenizers

from lora.data.rows import SHOWN
from lora.errors import DataError, FileFormatError, LoadError, ValidationError

# texts encoded at a time: the tokenizer's own records are some hundred bytes a token, the ids we keep are
# eight
TEXTS_AT_A_TIME = 1024


class File(Protocol):
    """A small file of a checkpoint: a path, or a text inside another file."""

    def is_file(self) -> bool:
        """Return whether it is there."""
        ...

    def read_bytes(self) -> bytes:
        """Return its content."""
        ...


class Folder(Protocol):
    """What small files are found in by name: a path, or a file that holds them."""

    def __truediv__(self, name: str, /) -> File: ...


class Encoded(NamedTuple):
    """Token ids, one array per text, and how many texts lost their tail."""

    ids: list[np.ndarray]  # [T_i] int64, 1 <= T_i <= max_length
    truncated: int


class Tokenizer:
    """A tokenizer.json, and the one fact it lacks: which token ends a text."""

    def __init__(self, backend: tokenizers.Tokenizer, eos_id: int | None) -> None:
        # a tokenizer.json may carry settings of the run that saved it; lengths are ours to decide, and to
        # count
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.eos_id = eos_id

    @classmethod
    def load(cls, folder: str | Folder) -> Tokenizer:
        """Read the tokenizer of the checkpoint in `folder`.

        The EOS token is `eos_token` of tokenizer_config.json, as Transformers has it; where that is silent,
        the (first) `eos_token_id` of config.json.

        Raises:
            LoadError: the folder has no tokenizer.json.
            FileFormatError: a file is corrupt, or names an EOS token that the vocabulary lacks.
        """
        folder = Path(folder) if isinstance(folder, str) else folder
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise LoadError(
                f"No tokenizer.json found in '{folder}'. Training requires a BPE tokenizer: "
                "copy the file from the base model"
            )
        try:
            backend = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        except Exception as error:  # the tokenizers package raises nothing narrower
            raise FileFormatError(f"{path}: expected a tokenizer, found: {error}") from error
        return cls(backend, _eos_id(folder, backend))

    def encode(
        self,
        texts: Sequence[str],
        max_length: int,
        *,
        append_eos: bool = False,
        lines: Sequence[int] | None = None,
    ) -> Encoded:
        """Return the ids of every text. A text longer than `max_length` keeps its head, and is counted.

        Args:
            texts: what to encode; special tokens spelled out in a text are read as such, as Transformers
                does.
            max_length: the most tokens that a text keeps, EOS included.
            append_eos: end every text with one EOS, unless it ends with one already. A text that leaves no
                room for it keeps its first `max_length` tokens, goes without, and is counted as truncated.
            lines: where the texts stand in their file, for the message.

        Raises:
            DataError: some texts hold no token; all of them are counted, and the first 20 named.
            LoadError: an EOS was asked for, and the checkpoint names none.
            ValidationError: `max_length` is not positive.
        """
        if max_length < 1:
            raise ValidationError(f"max_length: expected at least 1 token, found {max_length}")
        tail = [self._known_eos()] if append_eos else []
        ids, truncated, empty = [], 0, []
        for position, tokens in enumerate(self._tokens(texts)):
            if not tokens:
                empty.append(position)
            if tokens[-1:] != tail:
                tokens = tokens + tail
            truncated += len(tokens) > max_length
            ids.append(np.array(tokens[:max_length], np.int64))
        _refuse_empty(empty, lines)
        return Encoded(ids, truncated)

    def encode_with_offsets(self, texts: Sequence[str]) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
        """Yield (ids, offsets) of every text: the characters [start, end) that each token stands for."""
        for start in range(0, len(texts), TEXTS_AT_A_TIME):
            batch = list(texts[start : start + TEXTS_AT_A_TIME])
            for encoding in self._backend.encode_batch(batch, add_special_tokens=False):
                yield encoding.ids, encoding.offsets

    @property
    def eos_token(self) -> str:
        """How EOS is spelled.

        Raises:
            LoadError: the checkpoint names none.
        """
        return str(self._backend.id_to_token(self._known_eos()))

    def token_id(self, token: str) -> int | None:
        """Return the id of a token by its spelling, None where the vocabulary lacks it."""
        return self._backend.token_to_id(token)

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = True) -> str:
        """Return the text of `ids` [T]."""
        return self._backend.decode(np.asarray(ids).tolist(), skip_special_tokens=skip_special_tokens)

    def _tokens(self, texts: Sequence[str]) -> Iterator[list[int]]:
        for start in range(0, len(texts), TEXTS_AT_A_TIME):
            batch = list(texts[start : start + TEXTS_AT_A_TIME])
            for encoding in self._backend.encode_batch_fast(batch, add_special_tokens=False):
                yield encoding.ids

    def _known_eos(self) -> int:
        if self.eos_id is None:
            raise LoadError(
                "the checkpoint names no EOS token: expected eos_token in tokenizer_config.json, "
                "or eos_token_id in config.json"
            )
        return self.eos_id


def _refuse_empty(positions: list[int], lines: Sequence[int] | None) -> None:
    if not positions:
        return
    places = [f"text {i}" if lines is None else f"line {lines[i]}" for i in positions[:SHOWN]]
    more = f" and {len(positions) - SHOWN} more" if len(positions) > SHOWN else ""
    raise DataError(f"expected at least one token in every text, found none at {', '.join(places)}{more}")


def _eos_id(folder: Folder, backend: tokenizers.Tokenizer) -> int | None:
    token = read_object(folder / "tokenizer_config.json").get("eos_token")
    if isinstance(token, dict):  # written by Transformers as an AddedToken
        token = token.get("content")
    if token is not None:
        found = backend.token_to_id(token)
        if found is None:
            raise FileFormatError(
                f"{folder}/tokenizer_config.json: eos_token {token!r} is not in tokenizer.json"
            )
        return found
    config = read_object(folder / "config.json")
    ids = config.get("text_config", config).get("eos_token_id", config.get("eos_token_id"))
    return ids[0] if isinstance(ids, list) else ids


def read_object(path: File) -> dict[str, Any]:
    """Return the JSON object in the file at `path`, empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        parsed = json.loads(path.read_bytes())
    except ValueError as error:
        raise FileFormatError(f"{path}: expected JSON, found: {error}") from error
    if not isinstance(parsed, dict):
        raise FileFormatError(f"{path}: expected a JSON object, found {type(parsed).__name__}")
    return parsed
