"""modules_to_save over a model whose output head is its embedding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lora.errors import UnsupportedError
from lora.io.lora_config import LoraConfig
from lora.model.loading import load
from tests.harness.models import write_model

IDS = np.array([[7, 1, 30, 4, 12]])


def test_a_tied_embedding_alone_is_refused(tmp_path: Path) -> None:
    model = load(write_model(tmp_path))
    with pytest.raises(UnsupportedError, match="name lm_head beside it"):
        model.add_adapter(LoraConfig(modules_to_save=("embed_tokens",)))


def test_beside_the_head_the_embedding_is_a_copy_of_its_own(tmp_path: Path) -> None:
    model = load(write_model(tmp_path), dtype="float64")
    before = model(IDS)
    model.add_adapter(LoraConfig(modules_to_save=("embed_tokens", "lm_head")))
    trained = model.trainable()
    # a token that is not read: through the embedding its row moves nothing, through the head its own logit
    trained["base_model.model.model.embed_tokens.weight"][50] += 1
    np.testing.assert_array_equal(model(IDS), before)
    trained["base_model.model.lm_head.weight"][50] += 1
    assert (np.abs(model(IDS) - before).max(axis=(0, 1)) > 0).nonzero()[0].tolist() == [50]


def test_a_classifier_reads_no_head_and_trains_the_embedding(tmp_path: Path) -> None:
    model = load(write_model(tmp_path), num_labels=3)
    model.add_adapter(LoraConfig(modules_to_save=("embed_tokens",)))
    _, gradients = model.loss_and_gradients(IDS, [1])
    moved = np.abs(gradients["base_model.model.model.embed_tokens.weight"]).sum(axis=1).nonzero()[0]
    assert moved.tolist() == sorted(IDS[0])
