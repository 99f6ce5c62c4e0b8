"""Checkpoints and adapters between their folders and one APR file, with every bit of every tensor kept."""

from __future__ import annotations

from pathlib import Path

from lora.io.apr_contents import adapter_tensors, write_adapter, write_model
from lora.io.apr_folder import AprFolder
from lora.io.atomic import replace_folder
from lora.io.checkpoint import Checkpoint, load_weights, open_checkpoint
from lora.io.peft import TENSORS, load_adapter
from lora.io.safetensors_file import Tensor, read_tensors, write_tensors
from lora.io.save_checkpoint import write_shards
from lora.io.small_files import ADAPTER_CONFIG, ADAPTER_FILES, MODEL_FILES, decoded, matching
from lora.spec import stored_name, tensor_shapes

_HEADS = {"score.weight", "score.bias", "lm_head.weight"}  # which of them there are, the head decides


def folder_to_apr(folder: Path, path: Path) -> None:
    """Write the checkpoint or the adapter in `folder` as the APR file `path`, whole or not at all.

    Raises:
        LoraError: the folder is neither, or a file of it is not as it must be.
        WriteError: the file could not be written; what was there is unharmed.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        config, _, _ = load_adapter(folder)
        write_adapter(path, config, _texts(folder, ADAPTER_FILES), read_tensors(folder / TENSORS))
    else:
        write_model(path, _texts(folder, MODEL_FILES), _checked_tensors(open_checkpoint(folder)))


def apr_to_folder(path: Path, folder: Path) -> None:
    """Write what the APR file `path` holds as a folder that Transformers or PEFT loads, whole or not at all.

    Raises:
        FileFormatError: the file is corrupt, or holds neither a whole model nor an adapter.
        LoraError: its tensors are not those that its configuration describes.
        WriteError: the folder could not be written; what was there is unharmed.
    """
    source = AprFolder(path)
    is_adapter = (source / ADAPTER_CONFIG).is_file()
    if is_adapter:
        load_adapter(source)  # it refuses what is no adapter
        tensors = adapter_tensors(source)
    else:
        tensors = _checked_tensors(open_checkpoint(source))
    with replace_folder(folder) as new:
        for file in source.iterdir():
            (new / file.name).write_bytes(file.read_bytes())
        if is_adapter:
            write_tensors(new / TENSORS, tensors, {"format": "pt"})
        else:
            write_shards(new, tensors)


def _checked_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by stored name, once they are those that its config describes."""
    load_weights(checkpoint, tensor_shapes(checkpoint.spec), _HEADS)
    read = {stored_name(name, checkpoint.layout): array for name, array in checkpoint.tensors.items()}
    return read | dict(checkpoint.skipped)


def _texts(folder: Path, patterns: tuple[str, ...]) -> dict[str, str]:
    return decoded({file.name: file.read_bytes() for file in matching(folder.iterdir(), patterns)})
