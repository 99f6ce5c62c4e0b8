"""Golden vectors of Qwen3.5's text model, made by hand in the environment that README.md names.

Padded batches are recorded too. Transformers zeroes the hidden states of padding before a gated-delta layer
reads them, and padding on the right comes after every token that counts, so the positions that the mask keeps
are those of the sequence alone; only they are recorded.
"""

from __future__ import annotations

import torch
from cases import Case, adapters, causal_batch, classifier_batch
from peft import LoraConfig, TaskType
from recorder import write
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig, Qwen3_5TextForSequenceClassification

PAD = 5
VOCAB = 64
NUM_LABELS = 3
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
GATED_DELTA = ["in_proj_qkv", "in_proj_z", "out_proj"]  # never in_proj_a and in_proj_b, the gates' own
MLP = ["gate_proj", "up_proj", "down_proj"]
ALL_LINEAR = ATTENTION + GATED_DELTA + MLP
# at 1e-2 the gated norms, which magnify a small read of the state, part float32 from float64 within 25 steps
LEARNING_RATE = 3e-3


def initial_value(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Random values at which every gate bends; some heads forget in ten tokens, some not in 100."""
    normal = torch.randn(shape, generator=generator, dtype=torch.float32)
    if name.endswith("linear_attn.norm.weight"):
        return 1 + 0.2 * normal  # the only norm that is not zero-centred
    if name.endswith("norm.weight"):
        return 0.2 * normal
    if name.endswith("A_log"):
        return -3 + normal
    scale = 0.5 if name.endswith(("embed_tokens.weight", "conv1d.weight", "dt_bias")) else 0.15
    return scale * normal


def small_config(**changes: object) -> Qwen3_5TextConfig:
    """Three gated-delta layers and one of attention, width 32; `changes` replaces any of it."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "tie_word_embeddings": True,
        "max_position_embeddings": 256,
        "rope_parameters": rope(partial_rotary_factor=0.25, mrope_section=[1, 1, 0]),
        "attn_implementation": "eager",
    }
    return Qwen3_5TextConfig(**(sizes | changes))


def rope(*, partial_rotary_factor: float, mrope_section: list[int]) -> dict[str, object]:
    """config.json's rope_parameters, spelled as the published models spell them."""
    return {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": partial_rotary_factor,
        "mrope_section": mrope_section,
        "mrope_interleaved": True,
    }


def causal(
    name: str, config: Qwen3_5TextConfig, lengths: tuple[int, ...], lora: LoraConfig | None, *, seed: int
) -> Case:
    """A causal case whose weights and batch come from one seed."""
    batch = causal_batch(lengths, vocab_size=VOCAB, pad_token_id=PAD, seed=seed)
    return Case(f"qwen3_5_{name}", Qwen3_5ForCausalLM, config, batch, lora, seed, LEARNING_RATE)


def cases() -> list[Case]:
    """Lengths on both sides of the chunk of 64 tokens, and every way of sharing key heads, at least once."""
    return [
        equal_heads(),
        grouped(),
        one_key_head(),
        chunk_and_one(),
        deep(),
        classifier(),
        causal("full", small_config(hidden_size=24, intermediate_size=28), (21, 9), lora=None, seed=17),
    ]


def equal_heads() -> Case:
    """As many key heads as value heads; five tokens, hardly more than the convolution's window."""
    config = small_config(linear_num_value_heads=2)
    return causal("equal_heads", config, (5,), adapters(["q_proj", "v_proj", "in_proj_qkv"]), seed=11)


def grouped() -> Case:
    """Two value heads to a key head, wider than it; layers in an order that no interval gives."""
    config = small_config(
        linear_value_head_dim=12,
        layer_types=["full_attention", "linear_attention", "linear_attention", "full_attention"],
        tie_word_embeddings=False,
    )
    return causal("grouped", config, (37, 20), adapters(ALL_LINEAR), seed=12)


def one_key_head() -> Case:
    """One key head for four value heads, and exactly one chunk."""
    config = small_config(linear_num_key_heads=1, linear_key_head_dim=16, num_key_value_heads=1)
    return causal("one_key_head", config, (64,), adapters(ATTENTION + GATED_DELTA), seed=13)


def chunk_and_one() -> Case:
    """A chunk and one token; half of each head rotated; ranks and alphas by pattern."""
    config = small_config(
        tie_word_embeddings=False,
        rope_parameters=rope(partial_rotary_factor=0.5, mrope_section=[2, 1, 1]),
    )
    lora = adapters(
        ["q_proj", "in_proj_qkv", "in_proj_z", "out_proj", "down_proj"],
        rank_pattern={"in_proj_qkv": 6, r"layers\.2\.linear_attn\.out_proj": 2},
        alpha_pattern={"in_proj_z": 3},
        use_rslora=True,
    )
    return causal("chunk_and_one", config, (65, 64), lora, seed=14)


def deep() -> Case:
    """Eight layers and three chunks, the last one short."""
    return causal("deep", small_config(num_hidden_layers=8), (131, 70), adapters(ALL_LINEAR), seed=15)


def classifier() -> Case:
    """Transformers' own classifier over the text model: the last token that is not padding, no bias."""
    config = small_config(num_labels=NUM_LABELS, pad_token_id=PAD)
    batch = classifier_batch(
        (20, 37, 1, 66), num_labels=NUM_LABELS, vocab_size=VOCAB, pad_token_id=PAD, seed=16
    )
    lora = adapters([*ATTENTION, "in_proj_qkv"], task_type=TaskType.SEQ_CLS)
    return Case(
        "qwen3_5_classifier", Qwen3_5TextForSequenceClassification, config, batch, lora, 16, LEARNING_RATE
    )


def main() -> None:
    """Write every case."""
    torch.set_num_threads(1)  # the sums, and so the last digits, do not depend on the machine's cores
    for case in cases():
        write(case, initial_value)


if __name__ == "__main__":
    main()
