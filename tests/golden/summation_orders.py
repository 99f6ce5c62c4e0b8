"""The same function with its sums in other orders: symmetries of the models, applied to their weights.

The channels of the residual stream, and the units of every feed-forward layer, can be numbered in any order,
as long as all weights that write them and all that read them agree. Only the order of the sums changes.
"""

from __future__ import annotations

import torch

State = dict[str, torch.Tensor]

STREAM, UNITS = "stream", "units"
# module -> what the rows and what the columns of its weight count, where that can be renumbered
AXES = {
    "embed_tokens": (None, STREAM),
    "lm_head": (None, STREAM),
    "score": (None, STREAM),
    "input_layernorm": (STREAM,),
    "post_attention_layernorm": (STREAM,),
    "model.norm": (STREAM,),
    "q_proj": (None, STREAM),
    "k_proj": (None, STREAM),
    "v_proj": (None, STREAM),
    "o_proj": (STREAM, None),
    "in_proj_qkv": (None, STREAM),
    "in_proj_z": (None, STREAM),
    "in_proj_a": (None, STREAM),
    "in_proj_b": (None, STREAM),
    "out_proj": (STREAM, None),
    "gate_proj": (UNITS, STREAM),
    "up_proj": (UNITS, STREAM),
    "down_proj": (STREAM, UNITS),
}


def reordered(state: State, *, hidden_size: int, intermediate_size: int, seed: int) -> State:
    """Return a model's tensors, adapters among them, with channels and units numbered in a random order."""
    generator = torch.Generator().manual_seed(seed)
    orders = {
        STREAM: torch.randperm(hidden_size, generator=generator),
        UNITS: torch.randperm(intermediate_size, generator=generator),
    }
    return {name: _renumbered(name, tensor, orders) for name, tensor in state.items()}


def _renumbered(name: str, tensor: torch.Tensor, orders: State) -> torch.Tensor:
    for axis, counted in enumerate(_axes(name)[: tensor.ndim]):
        if counted is not None:
            tensor = tensor.index_select(axis, orders[counted])
    return tensor


def _axes(name: str) -> tuple[str | None, ...]:
    """Return what each axis of a tensor counts; the rank of a factor, between A and B, is left alone."""
    axes = next((axes for module, axes in AXES.items() if f".{module}." in f".{name}"), ())
    if ".lora_A." in name:
        return (None, *axes[1:])
    if ".lora_B." in name:
        return (*axes[:1], None)
    return axes
