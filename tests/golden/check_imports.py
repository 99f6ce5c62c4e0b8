"""Checks by hand that `lora` reads what the real PEFT and Transformers wrote, and gives their logits.

Run in the environment that README.md names, with this library installed there:

    python tests/golden/check_imports.py [qwen2] [qwen3_5]

Each check writes a tiny random checkpoint, or an adapter beside one, by `save_pretrained`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from agreement import our_logits, require_same_logits, require_visible, run, their_logits
from cases import Batch, adapters
from families import NUM_LABELS, QWEN2, QWEN3_5, Family
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from recorder import randomize
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import lora

TARGETS = ["q_proj", "v_proj", "down_proj"]


def check_list(family: Family, folder: Path) -> None:
    """Target modules by name."""
    check_causal_adapter(family, folder, adapters(TARGETS))


def check_regex(family: Family, folder: Path) -> None:
    """Target modules by one regex, some of them left out again by another."""
    pattern, excluded = r"model\.layers\.\d+\..*\.(o_proj|up_proj)", r".*layers\.0\.mlp.*"
    check_causal_adapter(family, folder, adapters(pattern, exclude_modules=excluded))


def check_layers(family: Family, folder: Path) -> None:
    """Only one layer."""
    layers = {"layers_to_transform": [1], "layers_pattern": "layers"}
    check_causal_adapter(family, folder, adapters(["up_proj", "down_proj"], **layers))


def check_patterns(family: Family, folder: Path) -> None:
    """Ranks and alphas by pattern, and the rank-stabilised scale."""
    patterns = {"rank_pattern": {"q_proj": 2, "down_proj": 7}, "alpha_pattern": {r"layers\.0\..*": 11}}
    check_causal_adapter(family, folder, adapters(TARGETS, use_rslora=True, **patterns))


def check_saved_head(family: Family, folder: Path) -> None:
    """Embedding and output head trained whole, over a base with a head of its own and over a tied one."""
    for tied in (False, True):
        config = adapters(TARGETS, modules_to_save=["embed_tokens", "lm_head"])
        check_causal_adapter(family, folder / f"tied_{tied}", config, tie_word_embeddings=tied)


def check_narrow_adapter(family: Family, folder: Path) -> None:
    """An adapter stored in bfloat16 and one in float16: read as they are, they lose nothing more."""
    for dtype in (torch.bfloat16, torch.float16):
        check_causal_adapter(family, folder / str(dtype), adapters(TARGETS), stored=dtype)


def check_new_classifier(family: Family, folder: Path) -> None:
    """An adapter and a head that PEFT trained over a causal base: the last token is pooled, no bias."""
    base = family.write_causal_base(folder / "base", num_labels=NUM_LABELS)
    check_classifier_adapter(family, base)


def check_stored_classifier(family: Family, folder: Path) -> None:
    """An adapter over a classification checkpoint of Transformers, whose head it replaces."""
    base = family.write_base(family.classifier(family.config(num_labels=NUM_LABELS)), folder / "base")
    check_classifier_adapter(family, base)


def check_checkpoints(family: Family, folder: Path) -> None:
    """Checkpoints of Transformers in several files: tied and not, a classifier, bfloat16."""
    models = {
        "tied": family.causal(family.config(tie_word_embeddings=True)),
        "untied": family.causal(family.config(tie_word_embeddings=False)),
        "classifier": family.classifier(family.config(num_labels=NUM_LABELS)),
        "bfloat16": family.causal(family.config()).to(torch.bfloat16),
    }
    for name, model in models.items():
        base = family.write_base(model, folder / name, max_shard_size=20_000)
        batch = family.labelled_rows() if name == "classifier" else family.causal_rows()
        theirs = type(model).from_pretrained(base, dtype=torch.float32)
        require_same_logits(name, our_logits(lora.load(base), batch), their_logits(theirs, batch))


CHECKS_OF_BOTH = (
    check_list,
    check_regex,
    check_layers,
    check_patterns,
    check_saved_head,
    check_narrow_adapter,
    check_new_classifier,
    check_stored_classifier,
    check_checkpoints,
)
CHECKS = {
    "qwen2": [(QWEN2, check) for check in CHECKS_OF_BOTH],
    "qwen3_5": [(QWEN3_5, check) for check in CHECKS_OF_BOTH],
}


def check_causal_adapter(
    family: Family,
    folder: Path,
    config: LoraConfig,
    *,
    stored: torch.dtype = torch.float32,
    **sizes: object,
) -> None:
    """Write a base and an adapter of `config` over it, and read both."""
    base = family.write_causal_base(folder / "base", **sizes)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    check_adapter(family, base, theirs, family.causal_rows(), stored=stored)


def check_classifier_adapter(family: Family, base: Path) -> None:
    """Write an adapter with a classifier's head over `base`, read it, and read their merge of it."""
    model = AutoModelForSequenceClassification.from_pretrained(base)
    theirs = get_peft_model(model, adapters(TARGETS, task_type=TaskType.SEQ_CLS))
    check_adapter(family, base, theirs, family.labelled_rows())


def check_adapter(
    family: Family, base: Path, theirs: PeftModel, batch: Batch, *, stored: torch.dtype = torch.float32
) -> None:
    """Draw and write the adapter, then its merge, and require our agreement with both."""
    with theirs.disable_adapter():
        before = their_logits(theirs, batch)
    randomize(theirs, family.initializer, torch.Generator().manual_seed(5))
    adapter, merged = base.with_name("adapter"), base.with_name("merged")
    cast_adapter(theirs, stored)
    theirs.save_pretrained(adapter, save_embedding_layers=False)
    cast_adapter(theirs, torch.float32)
    expected = their_logits(theirs, batch)
    require_visible(before, expected)
    require_same_logits("PEFT's adapter", our_logits(lora.load(adapter), batch), expected)
    theirs.merge_and_unload().save_pretrained(merged)
    require_same_logits("PEFT's merge", our_logits(lora.load(merged), batch), expected)


def cast_adapter(theirs: PeftModel, dtype: torch.dtype) -> None:
    """Store what is trained in `dtype`; the base keeps its own."""
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


if __name__ == "__main__":
    run(CHECKS, sys.argv[1:])
