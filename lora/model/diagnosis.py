"""Where a value that is not finite first appeared, once a step has found that there is one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora.backend import Array, array_module, wide
from lora.data.packed import Packed
from lora.model import block
from lora.model.decoder import EMBEDDING, context_of

if TYPE_CHECKING:
    from lora.model.model import Model


def first_non_finite(model: Model, batch: Packed, gradients: Mapping[str, Array]) -> str:
    """Say where NaN or infinity first appears: along the forward, then along the backward."""
    context = context_of(model.ops, model.parameters, model.spec, batch, model.dtype)
    delta, _ = model.ops.embedding.forward(batch.input_ids, model.parameters[EMBEDDING], dtype=model.dtype)
    if not _is_finite(delta):
        return f"in the embedding ({EMBEDDING})"
    stream: Array | None = None
    for layer in range(model.spec.num_hidden_layers):
        delta, stream, _ = block.forward(context, layer, delta, stream)
        if not (_is_finite(delta) and _is_finite(stream)):
            return f"in the forward of model.layers.{layer}"
    broken = [name for name, gradient in gradients.items() if not _is_finite(gradient)]
    if broken:
        # the backward runs from the head down: the highest layer is where it appeared first
        return f"in the gradient of {max(broken, key=_depth)}"
    return "after the last block: in the final norm, the head or the loss"


def _is_finite(array: Array) -> bool:
    return bool(array_module(array).isfinite(wide(array)).all())


def _depth(name: str) -> tuple[int, str]:
    layer = re.search(r"\.layers\.(\d+)\.", name)
    return (int(layer.group(1)) if layer else 10**9, name)
