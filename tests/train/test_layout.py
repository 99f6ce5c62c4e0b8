"""The layout of an adapter's names: the base's own, or the one that was asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from lora.errors import UsageError
from lora.io.peft import load_adapter
from lora.io.safetensors_file import read_tensors, write_tensors
from lora.io.save_checkpoint import save_checkpoint
from lora.model.loading import load
from lora.train.finetune import finetune
from tests.harness.models import TINY_QWEN2, TINY_QWEN3_5, random_weights, write_model

WORDS = {"[UNK]": 0, **{word: index for index, word in enumerate("abcdefghijkl", start=1)}}


def write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def write_multimodal(folder: Path) -> Path:
    """Write the tiny Qwen3.5 as a multimodal checkpoint, vision and multi-token prediction beside it."""
    text = {key: value for key, value in TINY_QWEN3_5.items() if key not in ("architectures", "model_type")}
    config = {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "text_config": {"model_type": "qwen3_5_text", **text},
        "vision_config": {"depth": 1},
        "tie_word_embeddings": True,
    }
    inside = {
        name.replace("model.", "model.language_model.", 1): array
        for name, array in random_weights(TINY_QWEN3_5).items()
    }
    rng = np.random.default_rng(9)
    others = {
        "model.visual.blocks.0.attn.qkv.weight": rng.standard_normal((6, 2)).astype("float16"),
        "mtp.fc.weight": rng.standard_normal((3, 4)).astype("float32"),
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_tensors(folder / "model.safetensors", {**inside, **others}, {"format": "pt"})
    write_tokenizer(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ("a b c d", "e f g", "b d f h j", "c a"))
    )
    return path


def run(base: Path, rows: Path, output: Path, **settings: Any) -> Path:
    return finetune(base, rows, output=output, epochs=1, batch_size=2, **settings).best


def prefixes(folder: Path) -> set[str]:
    return {name.partition(".layers.")[0] for name in load_adapter(folder)[1]}


@pytest.mark.parametrize(
    ("layout", "prefix"),
    [
        (None, "base_model.model.model.language_model"),
        ("multimodal", "base_model.model.model.language_model"),
        ("text", "base_model.model.model"),
    ],
)
def test_names_are_the_bases_own_unless_asked(tmp_path: Path, rows: Path, layout: Any, prefix: str) -> None:
    base = write_multimodal(tmp_path / "base")
    best = run(base, rows, tmp_path / "run", layout=layout)
    assert prefixes(best) == {prefix}
    trained, ids = load(best), [[1, 2, 3, 4]]
    text = save_text_base(tmp_path / "text")
    beside_text = load(best, base=text)
    np.testing.assert_allclose(beside_text(ids), trained(ids), rtol=1e-6, atol=1e-6)


def save_text_base(folder: Path) -> Path:
    save_checkpoint(folder, random_weights(TINY_QWEN3_5), TINY_QWEN3_5)
    return folder


def test_a_merge_keeps_every_name_and_the_untouched_bytes(tmp_path: Path, rows: Path) -> None:
    base = write_multimodal(tmp_path / "base")
    model = load(run(base, rows, tmp_path / "run", learning_rate=0.1))
    adapted = {f"{module}.weight" for module in model.parameters.adapters["default"].factors}
    model.merge_adapter()
    model.save(tmp_path / "merged")
    before, after = (read_tensors(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert {name.replace("language_model.", "") for name in changed} == adapted
    configs = [json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "merged")]
    assert configs[0] == configs[1]


def test_a_layout_that_cannot_be_is_refused(tmp_path: Path, rows: Path) -> None:
    base = write_model(tmp_path / "qwen2", TINY_QWEN2)
    write_tokenizer(base)
    with pytest.raises(UsageError, match="qwen2 has text"):
        run(base, rows, tmp_path / "run", layout="multimodal")
    with pytest.raises(UsageError, match="writes no adapter"):
        run(base, rows, tmp_path / "run", layout="text", method="full")
    assert not (tmp_path / "run").exists()
