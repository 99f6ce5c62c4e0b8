"""A model's weights and config back into a checkpoint that Transformers loads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np

from lora.contracts import family_contract
from lora.io.checkpoint import Checkpoint
from lora.io.save_checkpoint import save_checkpoint
from lora.io.small_files import HEAD_FILE
from lora.model.head import ClassifierHead, Head
from lora.model.head_file import head_file, label_config
from lora.model.parameters import HEAD, Parameters

LANGUAGE_HEAD = "lm_head.weight"


def save_model(folder: Path, checkpoint: Checkpoint, parameters: Parameters, head: Head) -> None:
    """Write the weights in their stored dtypes, and config.json with what the head has changed."""
    classify = isinstance(head, ClassifierHead)
    weights = {
        name: array for name, array in parameters.weights.items() if not (classify and name == LANGUAGE_HEAD)
    }
    dtypes: dict[str, Any] = {name: array.dtype for name, array in checkpoint.tensors.items()}
    dtypes |= {name: np.dtype(np.float32) for name in HEAD if name not in dtypes}
    config = _config(checkpoint, head, untied=LANGUAGE_HEAD in weights)
    # in the same swap as the weights: a head read with another pooling than its own would be wrong in silence
    texts = {HEAD_FILE: head_file(head)} if isinstance(head, ClassifierHead) else {}
    save_checkpoint(folder, weights, config, source_folder=checkpoint.folder, dtypes=dtypes, texts=texts)


def _config(checkpoint: Checkpoint, head: Head, *, untied: bool) -> dict[str, Any]:
    config = copy.deepcopy(dict(checkpoint.config))
    if untied and checkpoint.spec.tie_word_embeddings:
        # a head of its own was trained; a multimodal config may say it twice
        for part in (config, config.get("text_config", {})):
            part["tie_word_embeddings"] = False
    if isinstance(head, ClassifierHead):
        config |= label_config(head)
        config["architectures"] = [family_contract(checkpoint.spec.family).classifiers[checkpoint.layout]]
    return config
