"""The record of a model's sizes that the rest of the library works from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSpec:
    """The sizes and conventions of one model; field names are config.json's own wherever it has one."""

    family: str  # stem of the contract in contracts/model-families/
    hidden_size: int  # D
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    num_key_value_heads: int  # G
    head_dim: int  # E
    intermediate_size: int  # F
    vocab_size: int  # V
    max_position_embeddings: int  # tokens that the model was trained to attend over
    rms_norm_eps: float  # in the unit of x²
    rope_theta: float
    rotary_dim: int  # leading dimensions of each head that are rotated
    tie_word_embeddings: bool
    qkv_bias: bool
    layer_types: tuple[str, ...]  # per layer, "full_attention" or "linear_attention"
    zero_centred_norm: bool  # norms scale by 1 + weight
    qk_norm: bool  # query and key heads are normalised before they are rotated
    attn_output_gate: bool  # q_proj holds, per head, a query and a gate
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    initializer_range: float  # standard deviation of freshly drawn weights
    # gated-delta layers; 0 in a family that has none
    linear_num_key_heads: int = 0
    linear_num_value_heads: int = 0
    linear_key_head_dim: int = 0
    linear_value_head_dim: int = 0
    linear_conv_kernel_dim: int = 0
