"""What an APR file says of the model or the adapter that it holds; equal contents give equal bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from lora.backend import Array
from lora.errors import FileFormatError
from lora.io.adapter_names import PREFIX, apr_name, from_apr_name
from lora.io.apr import write_apr
from lora.io.apr_folder import FILES, SIZES, AprFolder
from lora.io.atomic import write_atomically
from lora.io.lora_config import LoraConfig
from lora.io.safetensors_file import Tensor
from lora.io.small_files import ADAPTER_METADATA, CONFIG
from lora.spec import layout_of, parameter_count, read_spec

SCHEMA = "__checkpoint__.schema_version"
SCHEMA_VERSION = "1.3.0"  # of the seed's adapters


def write_model(path: Path, texts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Write a checkpoint as the APR file `path`, whole or not at all.

    Args:
        path: where to write.
        texts: the small files by name, config.json among them.
        tensors: by stored name, arrays or `Deferred` ones.

    Raises:
        ValidationError: the format has no place for a tensor.
        WriteError: the file could not be written; what was there is unharmed.
    """
    spec = read_spec(json.loads(texts[CONFIG]))
    metadata = {
        **{short: getattr(spec, key) for short, key in SIZES.items() if key != "model_type"},
        "model_type": "language_model",
        "architecture": spec.family,
        "rope_type": 2,  # dimension j pairs with j + half
        "param_count": parameter_count(spec),
        FILES: dict(texts),
    }
    with write_atomically(path) as temporary:
        write_apr(temporary, metadata, tensors)


def write_adapter(
    path: Path, config: LoraConfig, texts: Mapping[str, str], tensors: Mapping[str, Array]
) -> None:
    """Write an adapter as the APR file `path`, whole or not at all.

    Args:
        path: where to write.
        config: the adapter's.
        texts: its small files by name, adapter_config.json among them.
        tensors: by PEFT's names.

    Raises:
        ValidationError: the format has no place for a tensor.
        WriteError: the file could not be written; what was there is unharmed.
    """
    layout = layout_of(name.removeprefix(PREFIX) for name in tensors)
    facts = json.loads(texts.get(ADAPTER_METADATA, "{}"))
    metadata = {
        SCHEMA: SCHEMA_VERSION,
        "model_type": "adapter",
        "adapter_type": "lora",
        "lora_rank": config.r,
        "lora_alpha": config.alpha,
        "base_model_source": config.base_model_name_or_path,
        "base_model_hash": facts.get("base_hash"),
        "data_hash": facts.get("data_hash"),
        "classifier_layout": "[num_classes, hidden_size]",
        "layout": layout,
        FILES: dict(texts),
    }
    with write_atomically(path) as temporary:
        write_apr(temporary, metadata, {apr_name(name, layout): array for name, array in tensors.items()})


def adapter_tensors(folder: AprFolder) -> dict[str, Array]:
    """Return the tensors of the adapter in an APR file, by PEFT's names.

    Raises:
        FileFormatError: the file does not say in which layout they are, holds one under two names, or its
            last CRC does not match.
    """
    layout = folder.metadata.get("layout")
    if layout not in ("text", "multimodal"):
        raise FileFormatError(f"{folder}: layout: expected text or multimodal, found {layout!r}")
    tensors = {from_apr_name(name, layout): array for name, array in folder.tensors.items()}
    if len(tensors) != len(folder.tensors):
        raise FileFormatError(f"{folder}: two tensors are the same one under two names")
    return tensors
