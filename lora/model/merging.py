"""Merging an adapter into the weights, and taking it out again bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, field

from lora.backend import Array, array_module, matmul, wide
from lora.model.parameters import Adapter, Parameters
from lora.ops.lowrank_linear import Factors

ROWS = 4096  # rows of a weight that are widened at once


@dataclass(frozen=True)
class MergeReport:
    """What a merge did, and what it changed in the logits of a probe batch (the rounding of the weights)."""

    adapter: str
    merged_modules: int
    replaced_tensors: int
    max_logit_difference: float


@dataclass
class Originals:
    """The weights that a merge put aside: the very arrays, so that taking them back changes no bit."""

    arrays: dict[str, Array] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)


def merge(parameters: Parameters, adapter: Adapter) -> Originals:
    """Put W + scale · B A in the place of each adapted weight; return what was there."""
    originals = Originals()
    changed = {f"{module}.weight": factors for module, factors in adapter.factors.items()}
    for name, factors in changed.items():
        originals.arrays[name] = parameters.weights[name]
        parameters.weights[name] = merged_weight(parameters.weights[name], factors)
    for name, array in adapter.replaced.items():
        if name in parameters.weights:
            originals.arrays[name] = parameters.weights[name]
            parameters.weights[name] = array.astype(parameters.weights[name].dtype)
        else:
            originals.added.append(name)
            parameters.weights[name] = array.copy()
    return originals


def unmerge(parameters: Parameters, originals: Originals) -> None:
    """Put the original arrays back."""
    parameters.weights.update(originals.arrays)
    for name in originals.added:
        del parameters.weights[name]


def merged_weight(weight: Array, factors: Factors) -> Array:
    """Return W + scale · B A, [O, I] in the dtype of W, summed in float32 (or wider) and rounded once."""
    out = array_module(weight).empty(weight.shape, weight.dtype)
    for start in range(0, weight.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        out[rows] = (wide(weight[rows]) + factors.scale * matmul(factors.b[rows], factors.a)).astype(
            weight.dtype
        )
    return out
