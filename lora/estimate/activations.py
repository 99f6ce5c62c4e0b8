"""Bytes of the records that a forward keeps for its backward.

They follow the `Saved` of the operations, lora/host/'s own where it has one, as lora/model/block.py strings
them together: nothing is kept below the first trained block, and the input of a projection only where
something reads it. Indices are left out: eight bytes a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lora.estimate.workload import Workload
from lora.spec import ModelSpec


class Kept(NamedTuple):
    """Elements for each token."""

    narrow: int = 0  # in the dtype of activations
    wide: int = 0  # in the accumulation dtype

    def plus(self, narrow: int = 0, wide: int = 0) -> Kept:
        """Return the sum."""
        return Kept(self.narrow + narrow, self.wide + wide)

    def size(self, workload: Workload) -> int:
        """Return the bytes for each token."""
        return self.narrow * workload.activation_bytes + self.wide * workload.wide_bytes


def saved_bytes(workload: Workload, tokens: int) -> int:
    """Return the bytes of all records of a forward over `tokens` tokens.

    The final hidden states and the gradient for them are among them: they live as long as the records do.
    """
    spec = workload.spec
    kept = Kept(0, spec.rotary_dim)  # cos and sin, shared by all blocks
    kept = kept.plus(
        3 * spec.hidden_size, 1
    )  # the final norm's stream, its output, and the gradient for that
    for kind, ranks in recorded_layers(workload):
        kept = kept.plus(*layer_record(spec, kind, ranks))
    return tokens * kept.size(workload)


def recorded_layers(workload: Workload) -> list[tuple[str, dict[str, int]]]:
    """Return (kind, rank by trained module) of each recorded layer; under full training ranks are 0."""
    spec = workload.spec
    if workload.method == "full":
        trained = dict.fromkeys(workload.modules, 0)
    else:
        trained = {name: size.r for name, size in workload.factors.items()}
    by_layer: list[dict[str, int]] = [{} for _ in spec.layer_types]
    for name, rank in trained.items():
        layer = int(name.removeprefix("model.layers.").partition(".")[0])
        by_layer[layer][name.rpartition(".")[2]] = rank
    first = next((layer for layer, ranks in enumerate(by_layer) if ranks), spec.num_hidden_layers)
    return list(zip(spec.layer_types, by_layer, strict=True))[first:]


def layer_record(spec: ModelSpec, kind: str, ranks: Mapping[str, int]) -> Kept:
    """Return the record of one block of `kind`, with adapters of `ranks` on its modules."""
    kept = Kept(2 * spec.hidden_size, 2 + sum(ranks.values()))  # two norms: stream and rstd; and each x Aᵀ
    kept = kept.plus(2 * spec.intermediate_size)  # gate and up
    if ranks.keys() & {"gate_proj", "up_proj"}:
        kept = kept.plus(spec.hidden_size)
    if "down_proj" in ranks:
        kept = kept.plus(spec.intermediate_size)
    mixer = _delta_record if kind == "linear_attention" else _attention_record
    return kept.plus(*mixer(spec, ranks))


def _attention_record(spec: ModelSpec, ranks: Mapping[str, int]) -> Kept:
    queries, keys = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    kept = Kept(2 * queries + 2 * keys, spec.num_attention_heads)  # q, o, k, v; lse
    if ranks.keys() & {"q_proj", "k_proj", "v_proj"}:
        kept = kept.plus(spec.hidden_size)
    if spec.qk_norm:  # q and k once more, before their norms, and rstd for each head
        kept = kept.plus(queries + keys, spec.num_attention_heads + spec.num_key_value_heads)
    if spec.attn_output_gate:
        # o_proj reads the gated output; without a gate its input is o itself, kept already
        kept = kept.plus(queries + (queries if "o_proj" in ranks else 0))
    return kept


def _delta_record(spec: ModelSpec, ranks: Mapping[str, int]) -> Kept:
    heads, values = spec.linear_num_value_heads, spec.linear_num_value_heads * spec.linear_value_head_dim
    # the convolution's input and output, which is q, k and v; what decay and strength are made of
    kept = Kept(2 * delta_channels(spec) + 2 * heads)
    kept = kept.plus(2 * values, heads)  # the gated norm: o and z; rstd
    if ranks.keys() & {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"}:
        kept = kept.plus(spec.hidden_size)
    return kept.plus(values if "out_proj" in ranks else 0)


def delta_channels(spec: ModelSpec) -> int:
    """Return the width of q, k and v together in a gated-delta layer."""
    keys = spec.linear_num_key_heads * spec.linear_key_head_dim
    return 2 * keys + spec.linear_num_value_heads * spec.linear_value_head_dim
