"""From a folder, an APR file or a hub id to a model: weights, head, and the adapter where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from lora.backend import Array, compute_dtype, named_stream
from lora.backend.device import on_device
from lora.dispatch import Ops, implementations, require, require_dtype
from lora.errors import AdapterError, ContractError, UnsupportedError, UsageError
from lora.io.apr_folder import Folder
from lora.io.checkpoint import Checkpoint, load_weights, open_checkpoint
from lora.io.hub import resolve
from lora.io.peft import CONFIG, load_adapter, peft_name
from lora.model.head import MULTI_LABEL, CausalHead, ClassifierHead, Head, Pooling, ProblemType
from lora.model.head_file import read_head_file, stored_problem_type
from lora.model.model import Model
from lora.model.operations import operations
from lora.model.parameters import Parameters
from lora.spec import tensor_shapes

LANGUAGE_HEAD = "lm_head.weight"
SCORE, SCORE_BIAS = "score.weight", "score.bias"


@dataclass(frozen=True)
class Base:
    """A checkpoint in memory: any number of models stand on its tensors, and none of them writes to them."""

    name: str  # what an adapter calls it
    checkpoint: Checkpoint
    device: str
    ops: Ops
    dtype: np.dtype[Any]  # of the arithmetic
    _weights: dict[str, Array] = field(default_factory=dict)  # on the device, by name

    def model(
        self,
        *,
        num_labels: int | None = None,
        pooling: Pooling | None = None,
        head_bias: bool | None = None,
        class_names: Sequence[str] | None = None,
        problem_type: ProblemType | None = None,
        seed: int = 0,
    ) -> Model:
        """Return a model with a head of its own and no adapter; arguments and errors as in `load`."""
        checkpoint = self.checkpoint
        names = _class_names(num_labels, class_names)
        classifies = names is not None or SCORE in checkpoint.tensors
        kind = _problem_type(checkpoint, problem_type) if classifies else None
        multi_label = kind == MULTI_LABEL
        require(self.device, operations(checkpoint.spec, classifies=classifies, multi_label=multi_label))
        require_dtype(self.device, self.dtype)
        parameters = Parameters(_weights(checkpoint, classifies=classifies), layout=checkpoint.layout)
        head: Head = CausalHead()
        if kind is not None:
            head = replace(
                _classifier(checkpoint, parameters, names, pooling, head_bias, seed), problem_type=kind
            )
        parameters.weights = {name: self._placed(name, array) for name, array in parameters.weights.items()}
        return Model(checkpoint.spec, parameters, head, self.ops, self.dtype, checkpoint, self.name)

    def _placed(self, name: str, array: Array) -> Array:
        """Return a weight where operations read it; one of the checkpoint is moved once for all models."""
        if array is not self.checkpoint.tensors.get(name):
            return on_device(array, self.device)
        if name not in self._weights:
            self._weights[name] = on_device(array, self.device)
        return self._weights[name]


def open_base(path: str | Path, device: str = "cpu", dtype: str = "float32") -> Base:
    """Return the checkpoint in a folder or under a hub id; arguments and errors as in `load`."""
    ops, compute = implementations(device), compute_dtype(dtype)
    return Base(base_name(path), open_checkpoint(resolve(path)), device, ops, compute)


def load(
    path: str | Path,
    device: str = "cpu",
    dtype: str = "float32",
    *,
    num_labels: int | None = None,
    pooling: Pooling | None = None,
    head_bias: bool | None = None,
    class_names: Sequence[str] | None = None,
    problem_type: ProblemType | None = None,
    quantize: str | None = None,
    seed: int = 0,
    base: str | Path | None = None,
) -> Model:
    """Return the model in a folder, an APR file or under a hub id; an adapter gives its base with itself.

    Args:
        path: a checkpoint's folder, an adapter's folder in PEFT's format, an APR file of either, or a hub id.
        device: "cpu", or "cuda" for models whose every operation has a kernel.
        dtype: precision of the arithmetic: "float32", "float64" or "bfloat16", on a GPU the last alone;
            weights stay as stored.
        num_labels: gives the model a classifier's head of so many outputs, new unless the checkpoint has one.
        pooling: "mean" or "last"; None for mean under a new head, and for its own under a stored one.
        head_bias: whether a new head has a bias; None for yes.
        class_names: the classes in the order of the head's outputs; implies num_labels.
        problem_type: "single_label_classification", one class a row, or "multi_label_classification", any
            number of labels a row; None for what config.json says, and else for single labels.
        quantize: reserved for "nf4".
        seed: draws a new head.
        base: for an adapter, the base to use in the place of the one that it names.

    Warns:
        LoraWarning: the base is not as it was when the adapter was trained on it.

    Raises:
        LoraError: the path, its config.json, its weights or an argument is not as it must be.
    """
    ops, compute = implementations(device), compute_dtype(dtype)
    if quantize is not None:
        raise UnsupportedError(f"quantize {quantize!r} is not built in this version")
    folder = resolve(path)
    if (folder / CONFIG).is_file():
        return _load_with_adapter(folder, base, device, dtype)
    if base is not None:
        raise UsageError(f"base = {str(base)!r} is for an adapter, and {folder} holds no {CONFIG}")
    opened = Base(base_name(path), open_checkpoint(folder), device, ops, compute)
    return opened.model(
        num_labels=num_labels,
        pooling=pooling,
        head_bias=head_bias,
        class_names=class_names,
        problem_type=problem_type,
        seed=seed,
    )


def base_name(path: str | Path) -> str:
    """Return what an adapter calls its base: an absolute path for what is on the disk, a hub id as it is."""
    return str(Path(path).resolve()) if Path(path).exists() else str(path)


def _load_with_adapter(folder: Folder, base: str | Path | None, device: str, dtype: str) -> Model:
    """Load the base of the adapter in `folder` with the head that the adapter trained, then the adapter."""
    config, tensors, facts = load_adapter(folder)
    base = base or config.base_model_name_or_path
    if base is None:
        raise AdapterError(f"{folder}: base_model_name_or_path is empty; name the base with base=")
    head: dict[str, Any] = {}
    score, bias = (tensors.get(peft_name("score", kind)) for kind in ("weight", "bias"))
    if score is not None:
        names = facts.get("class_names", [str(index) for index in range(len(score))])
        head = {"class_names": names, "pooling": facts.get("pooling", "last"), "head_bias": bias is not None}
        head["problem_type"] = facts.get("problem_type")
    model = load(base, device, dtype, **head)
    model.load_adapter(folder)
    return model


def _problem_type(checkpoint: Checkpoint, wanted: ProblemType | None) -> ProblemType:
    """Return what the head decides: what is wanted of a new head, and its own of a stored one."""
    if wanted not in (None, *get_args(ProblemType)):
        raise UsageError(f"problem_type {wanted!r}: expected {' or '.join(get_args(ProblemType))}")
    stored = stored_problem_type(checkpoint)
    if wanted is not None and SCORE in checkpoint.tensors and wanted != stored:
        raise UsageError(f"problem_type = {wanted}: the checkpoint's own head is one of {stored}")
    return wanted or stored


def _class_names(num_labels: int | None, class_names: Sequence[str] | None) -> tuple[str, ...] | None:
    names = tuple(class_names) if class_names is not None else None
    if names is None:
        names = None if num_labels is None else tuple(map(str, range(num_labels)))
    elif num_labels not in (None, len(names)):
        raise UsageError(f"num_labels = {num_labels}, but class_names holds {len(names)}: {', '.join(names)}")
    if names is not None and len(names) < 2:
        raise ContractError(f"FALSIFY-CLASS-006: a classifier needs at least 2 classes, found {len(names)}")
    return names


def _weights(checkpoint: Checkpoint, *, classifies: bool) -> dict[str, Array]:
    """Return the checked weights; a classifier has a score in the place of a language model's head."""
    expected, optional = tensor_shapes(checkpoint.spec), {SCORE, SCORE_BIAS}
    weights = load_weights(checkpoint, expected, optional | ({LANGUAGE_HEAD} if classifies else set()))
    if classifies:
        weights.pop(LANGUAGE_HEAD, None)
    return weights


def _classifier(
    checkpoint: Checkpoint,
    parameters: Parameters,
    names: tuple[str, ...] | None,
    pooling: Pooling | None,
    head_bias: bool | None,
    seed: int,
) -> ClassifierHead:
    weights, width = parameters.weights, checkpoint.spec.hidden_size
    if SCORE not in weights:
        if names is None:
            raise ContractError(f"a classifier without {SCORE} needs num_labels or class_names")
        _draw_head(weights, len(names), width, True if head_bias is None else head_bias, seed)
        return ClassifierHead(pooling or "mean", names)
    score = weights[SCORE]
    stored_pooling, stored_names = read_head_file(checkpoint, score.shape[0])
    if score.shape[1:] != (width,) or (names is not None and len(names) != score.shape[0]):
        expected = f"[{len(names) if names else 'C'}, {width}]"
        raise ContractError(f"{SCORE}: expected {expected}, found {list(score.shape)} in {checkpoint.folder}")
    if head_bias not in (None, SCORE_BIAS in weights):
        raise UsageError(
            f"head_bias = {head_bias}: the checkpoint's own head has {'a' if not head_bias else 'no'} bias"
        )
    for name in {SCORE, SCORE_BIAS} & weights.keys():
        weights[name] = np.array(weights[name], np.float32)  # a head is trained, so it is writable and wide
    return ClassifierHead(pooling or stored_pooling, names or stored_names)


def _draw_head(weights: dict[str, Array], classes: int, width: int, bias: bool, seed: int) -> None:
    """Add a head [C, D], uniform in ±√(6 / (D + C)) (Glorot & Bengio 2010, eq. 16), with a zero bias [C]."""
    bound = (6 / (width + classes)) ** 0.5
    rng = named_stream(seed, SCORE)
    weights[SCORE] = rng.uniform(-bound, bound, (classes, width)).astype(np.float32)
    if bias:
        weights[SCORE_BIAS] = np.zeros(classes, np.float32)
