"""A tiny checkpoint with a tokenizer, rows for both tasks, and the command line called in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora.cli.main import run
from lora.io.safetensors_file import read_tensors, write_tensors
from lora.train.finetune import finetune
from tests.data.files import tokenizer_folder, write_jsonl
from tests.harness.models import TINY_QWEN2, write_model

# a byte-level vocabulary: 256 bytes and the end of a text
CONFIG = TINY_QWEN2 | {"vocab_size": 257, "eos_token_id": 256, "pad_token_id": 256}
LABELLED = [
    {"input": f"{'good' if i % 2 else 'bad'} news, number {i}", "label": "good" if i % 2 else "bad"}
    for i in range(20)
]
TEXTS = [{"text": f"line {i} of a text"} for i in range(12)]


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    exit_code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document that is all of stdout; no NaN passes for JSON here."""

        def refuse(constant: str) -> None:
            raise ValueError(f"{constant} is not JSON")

        return json.loads(self.out, parse_constant=refuse)


@pytest.fixture
def lora(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run a command line in this process."""

    def call(*arguments: Any) -> Outcome:
        capsys.readouterr()
        exit_code = run([str(argument) for argument in arguments])
        return Outcome(exit_code, *capsys.readouterr())

    return call


def write_base(folder: Path) -> Path:
    write_model(folder, CONFIG)
    return tokenizer_folder(folder)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("cli") / "base")


@pytest.fixture
def own_base(base: Path, tmp_path: Path) -> Path:
    """A copy of the base that a test may break."""
    return Path(shutil.copytree(base, tmp_path / "own-base"))


def retrain(base: Path) -> None:
    """Change the values of every weight of a checkpoint a little, and nothing else."""
    path = base / "model.safetensors"
    weights = {name: array * np.float32(1.001) for name, array in read_tensors(path).items()}
    path.unlink()  # its pages may be mapped
    write_tensors(path, weights, {"format": "pt"})


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", LABELLED)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("texts") / "texts.jsonl", TEXTS)


@pytest.fixture(scope="session")
def adapter(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained classifier's adapter; the pooling and head are those that Transformers has too."""
    output = tmp_path_factory.mktemp("trained")
    return finetune(
        base, rows, output=output, method="lora", epochs=1, learning_rate=0.1, pooling="last", head_bias=False
    ).best
