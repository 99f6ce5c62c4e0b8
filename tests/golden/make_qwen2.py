"""Golden vectors of Qwen2, made by hand in the environment that README.md names."""

from __future__ import annotations

import shutil

import torch
from cases import Batch, Case, adapters, causal_batch, classifier_batch
from peft import LoraConfig, TaskType
from recorder import FOLDER, write
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification

PAD = 3
VOCAB = 56
NUM_LABELS = 3
LENGTHS = (9, 6, 4)
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def initial_value(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Random values so large that attention is peaked and SiLU bends: no term of a gradient is small."""
    normal = torch.randn(shape, generator=generator, dtype=torch.float32)
    if name.endswith("norm.weight"):
        return 1 + 0.2 * normal
    if name.endswith(".bias"):
        return 0.4 * normal
    if "embed_tokens" in name:
        return 0.5 * normal
    return 0.22 * normal


def small_config(**changes: object) -> Qwen2Config:
    """Two layers of width 32, four heads of 8, two key-value heads, tied; `changes` replaces any of it."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attn_implementation": "eager",
    }
    return Qwen2Config(**(sizes | changes))


def batch(lengths: tuple[int, ...] = LENGTHS, *, seed: int) -> Batch:
    """A padded causal batch over this file's vocabulary."""
    return causal_batch(lengths, vocab_size=VOCAB, pad_token_id=PAD, seed=seed)


def causal(name: str, config: Qwen2Config, lora: LoraConfig | None, *, seed: int, lengths=LENGTHS) -> Case:
    """A causal case whose weights and batch come from one seed."""
    return Case(f"qwen2_{name}", Qwen2ForCausalLM, config, batch(lengths, seed=seed), lora, seed)


def cases() -> list[Case]:
    """Every way of sharing key-value heads, tying the head and choosing what is trained, at least once."""
    return [
        causal("qv", small_config(), adapters(["q_proj", "v_proj"]), seed=1),
        all_linear(),
        patterns(),
        lm_head(),
        classifier(),
        causal("full", small_config(hidden_size=24, intermediate_size=36), lora=None, seed=6),
        causal("long", small_config(), adapters(ALL_LINEAR), seed=7, lengths=(70, 41)),
    ]


def all_linear() -> Case:
    """Every projection adapted, one key-value head, three layers, a head of its own."""
    config = small_config(num_hidden_layers=3, num_key_value_heads=1, tie_word_embeddings=False)
    return causal("all_linear", config, adapters(ALL_LINEAR), seed=2)


def patterns() -> Case:
    """Ranks and alphas by pattern, rank-stabilised scale; heads whose widths do not add up to the model's."""
    lora = adapters(
        ["q_proj", "k_proj", "v_proj", "down_proj"],
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.down_proj": 7},
        alpha_pattern={"v_proj": 3, "layers.0.mlp.down_proj": 11},
        use_rslora=True,
    )
    return causal("patterns", small_config(num_key_value_heads=4, head_dim=12), lora, seed=3)


def lm_head() -> Case:
    """The output head trained whole beside the adapters; theta as large as the published models'."""
    config = small_config(
        tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}
    )
    return causal("lm_head", config, adapters(["q_proj", "up_proj"], modules_to_save=["lm_head"]), seed=4)


def classifier() -> Case:
    """Transformers' own classifier: the last token that is not padding, a head without bias."""
    config = small_config(num_labels=NUM_LABELS, pad_token_id=PAD, tie_word_embeddings=False)
    lora = adapters(["q_proj", "v_proj", "down_proj"], task_type=TaskType.SEQ_CLS)
    rows = classifier_batch((7, 9, 1, 5), num_labels=NUM_LABELS, vocab_size=VOCAB, pad_token_id=PAD, seed=5)
    return Case("qwen2_classifier", Qwen2ForSequenceClassification, config, rows, lora, seed=5)


def main() -> None:
    """Write every case, and the all-linear one's adapter as PEFT writes it."""
    torch.set_num_threads(1)  # the sums, and so the last digits, do not depend on the machine's cores
    peft_folder = FOLDER / "peft_adapter"
    shutil.rmtree(peft_folder, ignore_errors=True)
    for case in cases():
        write(case, initial_value, peft_folder=peft_folder if case.name == "qwen2_all_linear" else None)


if __name__ == "__main__":
    main()
