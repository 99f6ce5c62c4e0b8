"""Instructions give the same gradients however their rows are batched, accumulated or packed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lora.data.chat_template import CHATML, ChatTemplate
from lora.data.instruct import Dialogue, InstructData
from lora.data.tokenizer import Tokenizer
from lora.io.lora_config import LoraConfig
from lora.io.save_checkpoint import save_checkpoint
from lora.model.loading import load
from lora.ops.adamw import joint_norm
from lora.train.examples import Examples, tokenise
from lora.train.step import train_step
from tests.data.files import byte_tokenizer
from tests.harness.models import FAMILIES, random_weights
from tests.train.tiny import BOUNDS, Recorder

# rows whose learned shares differ as much as their lengths
ANSWERS = ["a", "a much longer answer than the others", "b c", "none", "deff", "g"]


def examples() -> Examples:
    rows = [
        Dialogue(
            (
                {"role": "user", "content": 7 * (i % 3) * "q" + "?"},
                {"role": "assistant", "content": answer},
            ),
            None,
            "",
            "",
        )
        for i, answer in enumerate(ANSWERS)
    ]
    data = InstructData(tuple(rows), tuple(range(1, len(rows) + 1)))
    return tokenise(data, Tokenizer(byte_tokenizer(), 256), 512, template=ChatTemplate(CHATML))


def gradients(folder: Any, dtype: str, groups: list[list[int]], **settings: Any) -> dict[str, np.ndarray]:
    """Return the gradients of one step whose batches are `groups` of rows."""
    model = load(folder, dtype=dtype)
    model.add_adapter(LoraConfig(r=2, target_modules="all-linear"), seed=1)
    rng = np.random.default_rng(2)
    for name, array in model.trainable().items():
        if "lora_B" in name:
            array[...] = 0.05 * rng.standard_normal(array.shape)
    recorder: Any = Recorder()
    rows = examples()
    train_step(model, recorder, [rows.batch(group) for group in groups], lr=0.0, clip=0.0, **settings)
    return recorder.gradients


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_accumulated_packed_and_alone_are_one(family: str, dtype: str, tmp_path: Any) -> None:
    config = FAMILIES[family] | {"vocab_size": 257, "eos_token_id": 256, "pad_token_id": 256}
    tame = {name: array if array.ndim == 1 else array / 2 for name, array in random_weights(config).items()}
    save_checkpoint(tmp_path / "base", tame, config)
    whole = gradients(tmp_path / "base", dtype, [[0, 1, 2, 3, 4, 5]], micro_tokens=10_000)
    found = {
        "accumulated": gradients(tmp_path / "base", dtype, [[0], [1, 2, 3], [4, 5]], micro_tokens=10_000),
        "packed": gradients(tmp_path / "base", dtype, [[0, 1, 2, 3, 4, 5]], micro_tokens=150),
        "alone": gradients(tmp_path / "base", dtype, [[0, 1, 2], [3, 4, 5]], micro_tokens=150, packing=False),
    }
    assert joint_norm(whole.values()) > 0
    for name, parts in found.items():
        difference = joint_norm(parts[key] - whole[key] for key in whole)
        assert difference <= BOUNDS[dtype] * joint_norm(whole.values()), name


def test_a_mean_of_batches_would_be_another_gradient(tmp_path: Any) -> None:
    # what the equality above rejects
    config = FAMILIES["qwen2"] | {"vocab_size": 257, "eos_token_id": 256, "pad_token_id": 256}
    save_checkpoint(tmp_path / "base", random_weights(config), config)
    groups = [[0], [1, 2, 3], [4, 5]]
    whole = gradients(tmp_path / "base", "float64", [[0, 1, 2, 3, 4, 5]], micro_tokens=10_000)
    means = [gradients(tmp_path / "base", "float64", [group], micro_tokens=10_000) for group in groups]
    mean = {name: sum(part[name] for part in means) / len(means) for name in whole}
    assert joint_norm(mean[name] - whole[name] for name in whole) > 0.01 * joint_norm(whole.values())
