"""The commands on a device, which is emulated."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lora.backend import bfloat16
from tests.cli.conftest import CONFIG, LABELLED, TEXTS
from tests.data.files import tokenizer_folder, write_jsonl
from tests.emulator import requires_emulator
from tests.emulator.device import emulated_device
from tests.harness.models import write_model

pytestmark = requires_emulator
ON_DEVICE = ("--device", "cuda", "--dtype", "bfloat16")
RUN = ("--rank", "2", "--epochs", "1", "--batch-size", "8", "--max-seq-len", "12")
SIZES = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64}


@pytest.fixture
def narrow(tmp_path: Path) -> Path:
    """Return a base in bfloat16, of one block whose heads are as wide as the kernels want."""
    write_model(tmp_path / "base", CONFIG | SIZES | {"torch_dtype": "bfloat16"}, dtype=bfloat16)
    return tokenizer_folder(tmp_path / "base")


def test_a_classifier_is_trained_there_and_says_what_ran(lora: Any, narrow: Path, tmp_path: Path) -> None:
    rows, run = write_jsonl(tmp_path / "rows.jsonl", LABELLED), tmp_path / "run"
    with emulated_device() as device:
        outcome = lora("finetune", narrow, "-d", rows, "-o", run, *RUN, *ON_DEVICE)
        assert outcome.exit_code == 0, outcome.err
        assert "cuda runs adamw, attention, embedding, lowrank_linear, pool, rmsnorm, rope" in outcome.err
        assert re.search(r"step 1/\d .* [\d.]+ [MG]B of host memory  ", outcome.err)
        assert {"adamw.cu", "attention_backward.cu", "pool.cu"} <= device.launched
        there = lora("eval", run / "best", "-d", rows, *ON_DEVICE, "--json").document
    here = lora("eval", run / "best", "-d", rows, "--dtype", "bfloat16", "--json").document
    assert there["accuracy"] == pytest.approx(here["accuracy"], abs=0.05)
    record = json.loads((run / "run.json").read_text())
    assert {choice["implementation"] for choice in record["operations"]} == {"cuda"}
    assert all(choice["reason"].startswith("compiled from kernels/") for choice in record["operations"])
    assert record["parts"][0]["GPU"] == "Fake H100"


def test_a_language_model_is_trained_there_and_asked(lora: Any, narrow: Path, tmp_path: Path) -> None:
    rows, run = write_jsonl(tmp_path / "rows.jsonl", TEXTS), tmp_path / "run"
    with emulated_device():
        assert lora("finetune", narrow, "-d", rows, "-o", run, *RUN, *ON_DEVICE, "-q").exit_code == 0
        asked = ("generate", run / "best", "line", "--max-new-tokens", "3", *ON_DEVICE, "--json")
        assert lora(*asked).exit_code == 0


def test_another_precision_says_what_to_ask_for(lora: Any, narrow: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", TEXTS)
    with emulated_device():
        outcome = lora("finetune", narrow, "-d", rows, "-o", tmp_path / "run", *RUN, "--device", "cuda")
    assert outcome.exit_code == 5
    assert "--dtype bfloat16" in outcome.err
    assert not (tmp_path / "run").exists()
