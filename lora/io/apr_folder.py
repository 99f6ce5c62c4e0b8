"""An APR file read as the folder that it stands for: its small files, and its tensors by their stored names.

The small files (config.json, tokenizer, template; adapter_config.json) are texts under the metadata key
`files`. A model whose writer left them out is read all the same: its config.json is made from the sizes in
the metadata, else it is the one beside the file, and its tokenizer is the one beside the file.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from lora.backend import Array
from lora.errors import FileFormatError
from lora.io.apr import open_apr
from lora.io.small_files import ADAPTER_CONFIG, ADAPTER_FILES, COMPANIONS, CONFIG, MODEL_FILES, matching

SUFFIX = ".apr"
FILES = "files"
TOKENIZER = "tokenizer.json"
_TRAINING_STATE = "__training__."
# APR's name of a size -> config.json's, for files that hold no config.json
SIZES = {
    "architecture": "model_type",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
}
_DERIVED = "head_dim"  # may be absent: the family says what it is then
_EMBEDDING = "model.embed_tokens.weight"


class AprText:
    """A small file that an APR file holds or, where `content` is None, does not hold."""

    def __init__(self, apr: Path, name: str, content: bytes | None) -> None:
        self.name = name
        self._apr = apr
        self._content = content

    def __str__(self) -> str:
        return f"{self._apr}: {self.name}"

    def is_file(self) -> bool:
        """Return whether it is there."""
        return self._content is not None

    def read_bytes(self) -> bytes:
        """Return its content.

        Raises:
            FileNotFoundError: it is not there.
        """
        if self._content is None:
            raise FileNotFoundError(str(self))
        return self._content


class AprFolder:
    """What the APR file at `path` holds, named as in a folder. Its tensors are read when they are asked for.

    Raises:
        MissingFileError: there is no such file.
        UnsupportedError: the file is compressed, encrypted, sharded, column-major or holds quantised tensors.
        FileFormatError: the file is truncated or corrupt, or its metadata describes no model and no adapter.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_apr(path)
        self._texts = _texts(path, self.metadata)
        self._beside: list[Path] = []
        if ADAPTER_CONFIG in self._texts:
            return
        if CONFIG not in self._texts:
            self._find_config()
        if TOKENIZER not in self._texts:
            self._beside += matching(path.parent.iterdir(), COMPANIONS)

    def __str__(self) -> str:
        return str(self.path)

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    def __truediv__(self, name: str) -> AprText | Path:
        if name in self._texts:
            return AprText(self.path, name, self._texts[name].encode())
        return next((file for file in self._beside if file.name == name), AprText(self.path, name, None))

    def is_dir(self) -> bool:
        """Return True: it is read as a folder is."""
        return True

    def iterdir(self) -> Iterator[AprText | Path]:
        """Yield the small files: those inside, and those that are taken from beside the file."""
        yield from (self / name for name in sorted(self._texts))
        yield from (file for file in self._beside if file.name not in self._texts)

    @property
    def metadata(self) -> dict[str, Any]:
        """The JSON object that the file holds."""
        return self._file.metadata

    @cached_property
    def tensors(self) -> dict[str, Array]:
        """The tensors by their names in the file, read-only and memory-mapped; an optimizer's are left out.

        Raises:
            FileFormatError: the file's last CRC does not match.
        """
        found = self._file.read_tensors()
        return {name: array for name, array in found.items() if not name.startswith(_TRAINING_STATE)}

    def sources(self) -> list[Path]:
        """Return the files on the disk that are read: this one, and those beside it that it lacks."""
        return [self.path, *self._beside]

    def _find_config(self) -> None:
        given = {key: self.metadata.get(short) for short, key in SIZES.items()}
        missing = [short for short, key in SIZES.items() if given[key] is None and short != _DERIVED]
        beside = self.path.parent / CONFIG
        if missing and beside.is_file():
            self._beside.append(beside)
            return
        if missing:
            raise FileFormatError(
                f"{self.path}: no model of a known form, and no adapter: no {CONFIG} in it or beside it, no "
                f"{ADAPTER_CONFIG} in it, and the metadata lacks {', '.join(missing)}"
            )
        dtypes = self._file.dtypes()
        given["tie_word_embeddings"] = "lm_head.weight" not in dtypes
        if _EMBEDDING in dtypes:
            given["torch_dtype"] = str(dtypes[_EMBEDDING])
        config = {key: value for key, value in given.items() if value is not None}
        self._texts[CONFIG] = json.dumps(config, indent=2) + "\n"


Folder = Path | AprFolder


def is_apr(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` is named as an APR file is."""
    return os.fspath(path).lower().endswith(SUFFIX)


def open_folder(path: str | os.PathLike[str]) -> Folder:
    """Return `path`, or where it is an APR file what it stands for; errors as in `AprFolder`."""
    if isinstance(path, AprFolder):
        return path
    path = Path(path)
    return AprFolder(path) if path.is_file() and is_apr(path) else path


def _texts(path: Path, metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return the small files by name; a name that no such file has could be written anywhere."""
    files = metadata.get(FILES) or {}
    if not isinstance(files, dict) or not all(
        isinstance(text, str)
        and _is_text(text)
        and re.fullmatch(r"[A-Za-z0-9_.-]{1,100}", name)
        and any(fnmatchcase(name, pattern) for pattern in (*MODEL_FILES, *ADAPTER_FILES))
        for name, text in files.items()
    ):
        raise FileFormatError(f"{path}: {FILES}: expected texts by the names of a checkpoint's small files")
    return dict(files)


def _is_text(text: str) -> bool:
    # JSON can spell half of a surrogate pair, which no file in UTF-8 can hold
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
