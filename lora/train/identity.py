"""What a run's bits depend on, and whether it is still the same when the run goes on."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora.backend import blas_facts
from lora.backend.device_facts import device_facts
from lora.errors import LoraWarning, ValidationError
from lora.io.apr_folder import AprFolder, Folder
from lora.model.model import Model

if TYPE_CHECKING:
    from lora.train.finetune import Prepared

# they decide what is written when, and change no bit of what is trained
FREE = ("save_steps", "save_every", "keep", "tensorboard")
READ = ("config.json", "tokenizer*", "vocab.json", "merges.txt", "chat_template*", "*.safetensors*")
_SCALE = ("r", "alpha", "use_rslora")
_BLOCK = 2**22


def run_identity(prepared: Prepared, model: Model | str | Path) -> dict[str, dict[str, Any]]:
    """Return {"settings", "classes", "data", "base", "arithmetic"}, JSON values by name in each.

    Files are told by a SHA-256 of all their bytes.
    """
    config = prepared.config
    settings = {name: value for name, value in asdict(config).items() if name not in FREE}
    loaded = model if isinstance(model, Model) else None
    if loaded is not None:
        settings["dtype"] = str(loaded.dtype)
    if config.method == "lora":
        # a loaded model may bring its own adapter; which arrays it has the state's names tell
        adapter = loaded.parameters.adapter if loaded is not None else None
        scale = config.lora_config() if adapter is None else adapter.config
        settings |= {f"adapter {name}": getattr(scale, name) for name in _SCALE}
    identity = {
        "settings": settings,
        "classes": {"names": prepared.class_names, "problem_type": prepared.problem_type},
        "data": {"sha256": file_hash(prepared.data_path)},
        "base": base_hashes(prepared.folder),
        "arithmetic": arithmetic_facts(config.device),
    }
    # as it will be read back: a tuple is a list there
    return json.loads(json.dumps(identity))


def arithmetic_facts(device: str) -> dict[str, Any]:
    """Return what else decides the last bits of a product or a root on `device`, by name."""
    from lora import __version__

    build = np.show_config(mode="dicts")
    simd = build["SIMD Extensions"]["found"] if isinstance(build, dict) else []
    blas = {f"BLAS {name}": value for name, value in blas_facts().items()}
    facts = {"lora": __version__, "NumPy": np.__version__, **blas, "SIMD of NumPy": " ".join(simd)}
    if device == "cuda":
        there = device_facts()
        facts |= {"GPU": there.gpu, "driver": there.cuda_driver, "NVRTC": there.nvrtc, "cuBLAS": there.cublas}
    return facts


def check_same_run(
    path: Path, before: Mapping[str, Any], now: Mapping[str, Any], *, allow_data_mismatch: bool
) -> None:
    """Compare what the run in `path` was started with with what it is to go on with.

    Another machine, BLAS or number of threads is said, and not refused: the run is as good, in other bits.

    Raises:
        ValidationError: something else has changed since; each difference is named with both values.
    """
    strict = [kind for kind in now if kind != "arithmetic" and not (kind == "data" and allow_data_mismatch)]
    changes = list(_changes(before, now, strict))
    if changes:
        hint = " (--allow-data-mismatch goes on with other rows)" if "data" in strict else ""
        hint = hint if any(change.startswith("data") for change in changes) else ""
        raise ValidationError(f"{path} holds another run: {'; '.join(changes)}{hint}")
    other = list(_changes(before, now, ["arithmetic"]))
    if other:
        warnings.warn(
            f"going on in other arithmetic than before, so the last bits may differ from those of a run that "
            f"never ended: {'; '.join(other)}",
            LoraWarning,
            stacklevel=3,
        )


def base_hashes(base: Folder) -> dict[str, str]:
    """Return the SHA-256 of each file on the disk that a base consists of, by name."""
    if isinstance(base, AprFolder):
        return {path.name: file_hash(path) for path in base.sources()}
    return file_hashes(base, READ)


def file_hashes(folder: Path, patterns: Collection[str]) -> dict[str, str]:
    """Return the SHA-256 of each file in `folder` that matches a pattern, by name."""
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {path.name: file_hash(path) for path in sorted(paths)}


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, as hexadecimal digits."""
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], kinds: Collection[str]) -> Iterator[str]:
    for kind in kinds:
        old, new = before.get(kind, {}), now[kind]
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                yield f"{kind} {name}: {old.get(name)!r} then, {new.get(name)!r} now"
