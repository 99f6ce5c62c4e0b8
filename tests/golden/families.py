"""Tiny random models of each family, written as Transformers writes them, for the checks by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import make_qwen2
import make_qwen3_5
import torch
from cases import Batch, causal_batch, classifier_batch
from recorder import Initializer, randomize
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen3_5ForCausalLM,
    Qwen3_5TextForSequenceClassification,
)

NUM_LABELS = 3
LENGTHS = (9, 70, 4)


class Family(NamedTuple):
    """How to make tiny random models of one family."""

    causal: type[PreTrainedModel]
    classifier: type[PreTrainedModel]
    small_config: Callable[..., PreTrainedConfig]
    initializer: Initializer
    vocab_size: int
    pad_token_id: int

    def config(self, **changes: object) -> PreTrainedConfig:
        """Sizes of the golden cases, with a pad token, which Transformers' classifiers need."""
        return self.small_config(pad_token_id=self.pad_token_id, **changes)

    def write_base(self, model: PreTrainedModel, folder: Path, **saving: object) -> Path:
        """Draw the model's weights, save it as Transformers does, and return the folder."""
        randomize(model, self.initializer, torch.Generator().manual_seed(3))
        model.save_pretrained(folder, **saving)
        return folder

    def write_causal_base(self, folder: Path, **changes: object) -> Path:
        """A causal base of the golden cases' sizes but for `changes`."""
        return self.write_base(self.causal(self.config(**changes)), folder)

    def causal_rows(self) -> Batch:
        """Padded rows with next-token labels."""
        return causal_batch(LENGTHS, vocab_size=self.vocab_size, pad_token_id=self.pad_token_id, seed=1)

    def labelled_rows(self) -> Batch:
        """Padded rows with a class each."""
        vocabulary = {"vocab_size": self.vocab_size, "pad_token_id": self.pad_token_id}
        return classifier_batch(LENGTHS, num_labels=NUM_LABELS, **vocabulary, seed=2)


QWEN2 = Family(
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    make_qwen2.small_config,
    make_qwen2.initial_value,
    make_qwen2.VOCAB,
    make_qwen2.PAD,
)
QWEN3_5 = Family(
    Qwen3_5ForCausalLM,
    Qwen3_5TextForSequenceClassification,
    make_qwen3_5.small_config,
    make_qwen3_5.initial_value,
    make_qwen3_5.VOCAB,
    make_qwen3_5.PAD,
)
