"""A model's tensors by canonical name: what its checkpoint must hold, and what an adapter may sit beside."""

from __future__ import annotations

from math import prod

from lora.contracts import FamilyContract, family_contract
from lora.spec.expressions import evaluate
from lora.spec.model_spec import ModelSpec

Shapes = dict[str, tuple[int, ...]]


def tensor_shapes(spec: ModelSpec) -> Shapes:
    """Return the shape of every tensor of the causal model by canonical name; a tied head is none of them."""
    contract = family_contract(spec.family)
    shapes = _group(contract, spec, "model")
    if not spec.tie_word_embeddings:
        shapes |= _group(contract, spec, "untied")
    groups = {kind: _group(contract, spec, kind) for kind in {"layer", *spec.layer_types}}
    for i, kind in enumerate(spec.layer_types):
        for name, shape in (groups["layer"] | groups[kind]).items():
            shapes[name.replace("{i}", str(i))] = shape
    return shapes


def parameter_count(spec: ModelSpec) -> int:
    """Return the number of parameters of the causal model, tied tensors counted once."""
    return sum(prod(shape) for shape in tensor_shapes(spec).values())


def adaptable_modules(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """Return (O, I) of every linear module inside the decoder layers, by its canonical name."""
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in tensor_shapes(spec).items()
        if name.startswith("model.layers.") and len(shape) == 2
    }


def _group(contract: FamilyContract, spec: ModelSpec, group: str) -> Shapes:
    axes = {letter: getattr(spec, key) for letter, key in contract.axes.items()}
    return {
        name: tuple(evaluate(size, axes) for size in shape) for name, shape in contract.tensors[group].items()
    }
