"""Checks by hand, with the real PEFT and Transformers, that what `lora` writes means the same there.

Run in the environment that README.md names, with this library installed there:

    python tests/golden/check_exports.py [qwen2] [qwen3_5]

Each check trains an adapter for a few steps on a tiny random base. It then requires that PEFT reads every
tensor of the saved adapter and no other, that Transformers loads the merged checkpoint without a missing or
an unexpected name, and that both give our logits.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from agreement import TOLERANCE, our_logits, require, require_same_logits, require_visible, run, their_logits
from cases import Batch
from families import NUM_LABELS, QWEN2, QWEN3_5, Family
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

import lora
from lora.io.checkpoint import open_checkpoint
from lora.io.save_checkpoint import save_checkpoint

STEPS = 5
SHARD_BYTES = 20_000  # several files for the smallest model
# what storing the merged weights may change in our logits; bfloat16 keeps 8 bits of each
MERGE_ROUNDING = {torch.float32: TOLERANCE, torch.bfloat16: 0.05}


def check_tied(family: Family, folder: Path) -> None:
    """Query and value adapters over a base whose head is its embedding."""
    base = family.write_causal_base(folder / "base", tie_word_embeddings=True)
    check_exports(lora.load(base), AutoModelForCausalLM, base, settings("qv"), family.causal_rows())


def check_untied(family: Family, folder: Path) -> None:
    """Adapters everywhere over a base with a head of its own."""
    base = family.write_causal_base(folder / "base", tie_word_embeddings=False)
    check_exports(lora.load(base), AutoModelForCausalLM, base, settings("all-linear"), family.causal_rows())


def check_patterns(family: Family, folder: Path) -> None:
    """Every setting that changes a rank or a scale, and targets by regex."""
    base = family.write_causal_base(folder / "base")
    config = settings(
        r".*\.(q_proj|down_proj)",
        rank_pattern={"q_proj": 2},
        alpha_pattern={"layers.0.mlp.down_proj": 11},
        exclude_modules=r".*layers\.1\.mlp\.down_proj",
        use_rslora=True,
    )
    check_exports(lora.load(base), AutoModelForCausalLM, base, config, family.causal_rows())


def check_trained_head(family: Family, folder: Path) -> None:
    """The output head trained whole, without and with the embedding that it has been until then."""
    for number, modules in enumerate((["lm_head"], ["embed_tokens", "lm_head"])):
        base = family.write_causal_base(folder / str(number) / "base", tie_word_embeddings=True)
        config = settings("qv", modules_to_save=modules)
        check_exports(lora.load(base), AutoModelForCausalLM, base, config, family.causal_rows())


def check_bfloat16(family: Family, folder: Path) -> None:
    """A base stored in bfloat16, as the published ones are: the merge stays in it, rounded once."""
    model = family.causal(family.config()).to(torch.bfloat16)
    base = family.write_base(model, folder / "base")
    check_exports(lora.load(base), AutoModelForCausalLM, base, settings("all-linear"), family.causal_rows())


def check_shards(family: Family, folder: Path) -> None:
    """A base in several files, and a merge that we write in several."""
    base = family.write_base(
        family.causal(family.config(tie_word_embeddings=False)), folder / "base", max_shard_size=SHARD_BYTES
    )
    batch = family.causal_rows()
    check_exports(lora.load(base), AutoModelForCausalLM, base, settings("qv"), batch)
    merged, sharded = open_checkpoint(folder / "merged"), folder / "sharded"
    save_checkpoint(
        sharded, merged.tensors, merged.config, source_folder=merged.folder, shard_bytes=SHARD_BYTES
    )
    for written in (base, sharded):
        require(len(list(written.glob("model-*.safetensors"))) > 1, f"{written.name} is a single file")
    expected = our_logits(lora.load(merged.folder), batch)
    require_checkpoint(
        "the sharded checkpoint in Transformers", AutoModelForCausalLM, sharded, batch, expected
    )


def check_new_head(family: Family, folder: Path) -> None:
    """A head that we added to a causal base, in the form that Transformers computes: last token, no bias."""
    base = family.write_causal_base(folder / "base", num_labels=NUM_LABELS)
    ours = lora.load(base, num_labels=NUM_LABELS, pooling="last", head_bias=False)
    check_exports(ours, AutoModelForSequenceClassification, base, settings("qv"), family.labelled_rows())


def check_transformers_head(family: Family, folder: Path) -> None:
    """A classification checkpoint of Transformers' own, whose head we must take as it is."""
    base = family.write_base(family.classifier(family.config(num_labels=NUM_LABELS)), folder / "base")
    batch = family.labelled_rows()
    check_exports(lora.load(base), AutoModelForSequenceClassification, base, settings("qv"), batch)


def check_multimodal_layout(family: Family, folder: Path) -> None:
    """The published checkpoints' layout: names under language_model, and a vision tower that is not ours."""
    text = family.config()
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "patch_size": 2}
    config = Qwen3_5Config(
        text_config=text.to_dict(),
        vision_config=vision | {"out_hidden_size": text.hidden_size, "num_position_embeddings": 16},
        tie_word_embeddings=text.tie_word_embeddings,
        attn_implementation="eager",
    )
    base = family.write_base(Qwen3_5ForConditionalGeneration(config), folder / "base")
    check_exports(lora.load(base), AutoModelForImageTextToText, base, settings("qv"), family.causal_rows())
    require_vision_tower_kept(base, folder / "merged")


CHECKS_OF_BOTH = (
    check_tied,
    check_untied,
    check_patterns,
    check_trained_head,
    check_bfloat16,
    check_shards,
    check_new_head,
    check_transformers_head,
)
CHECKS = {
    "qwen2": [(QWEN2, check) for check in CHECKS_OF_BOTH],
    "qwen3_5": [(QWEN3_5, check) for check in (*CHECKS_OF_BOTH, check_multimodal_layout)],
}


def settings(target_modules: str, **fields: object) -> lora.LoraConfig:
    """An adapter of rank 4 and alpha 6: alpha / r is neither 1 nor a power of two."""
    return lora.LoraConfig(r=4, lora_alpha=6, target_modules=target_modules, **fields)


def check_exports(
    ours: lora.Model, auto_class: type, base: Path, config: lora.LoraConfig, batch: Batch
) -> None:
    """Train, save, merge and save `ours`, and require PEFT's and Transformers' agreement with it."""
    before = our_logits(ours, batch)
    ours.add_adapter(config, seed=4)
    train(ours, batch)
    adapted = our_logits(ours, batch)
    require_visible(before, adapted)

    adapter = base.with_name("adapter")
    ours.save_adapter(adapter)
    theirs = PeftModel.from_pretrained(auto_class.from_pretrained(base, dtype=torch.float32), str(adapter))
    require_every_tensor_loaded(theirs, adapter)
    require_same_logits("the adapter in PEFT", their_logits(theirs, batch), adapted)

    ours.merge_adapter()
    merged, expected = base.with_name("merged"), our_logits(ours, batch)
    rounding = MERGE_ROUNDING[next(iter(stored_tensors(base).values())).dtype]
    require_same_logits("our merge", expected, adapted, tolerance=rounding)
    ours.save(merged)
    require_checkpoint("the merged checkpoint in Transformers", auto_class, merged, batch, expected)
    require_same_dtypes(base, merged)


def train(ours: lora.Model, batch: Batch) -> None:
    """A few steps at a high rate: B starts at zero, and an adapter of zeros would prove nothing."""
    optimizer = lora.AdamW(ours, lr=0.02)
    for _ in range(STEPS):
        _, gradients = ours.loss_and_gradients(
            batch.input_ids.numpy(), batch.labels.numpy(), batch.attention_mask.numpy()
        )
        optimizer.step(gradients)


def require_every_tensor_loaded(theirs: PeftModel, adapter: Path) -> None:
    """Fail unless PEFT would save the very file again: of a name that it does not find it only warns."""
    written = load_file(adapter / "adapter_model.safetensors")
    loaded = get_peft_model_state_dict(theirs, save_embedding_layers=False)
    require(written.keys() == loaded.keys(), f"names differ: {sorted(written.keys() ^ loaded.keys())}")
    wrong = [name for name, tensor in written.items() if not torch.equal(tensor, loaded[name])]
    require(not wrong, f"PEFT did not load the values of {wrong}")


def require_checkpoint(what: str, auto_class: type, folder: Path, batch: Batch, expected: np.ndarray) -> None:
    """Fail unless Transformers loads every tensor of the checkpoint, misses none, and gives the logits."""
    theirs, loading = auto_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = {kind: names for kind, names in loading.items() if names}
    require(not wrong, f"Transformers found fault with the names in {folder.name}: {wrong}")
    require_same_logits(what, their_logits(theirs, batch), expected)


def require_same_dtypes(base: Path, merged: Path) -> None:
    """Fail unless every tensor that the base stored is stored in the same dtype still."""
    before, after = stored_tensors(base), stored_tensors(merged)
    wrong = [name for name in before.keys() & after.keys() if before[name].dtype != after[name].dtype]
    require(not wrong, f"the merge changed the dtypes of {sorted(wrong)}")


def require_vision_tower_kept(base: Path, merged: Path) -> None:
    """Fail unless every vision tensor came through the merge bit for bit."""
    before, after = stored_tensors(base), stored_tensors(merged)
    vision = [name for name in before if ".visual." in name]
    require(bool(vision), "the base of this check has no vision tower")
    wrong = [name for name in vision if not torch.equal(before[name], after[name])]
    require(not wrong, f"the merge changed {wrong}")


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by its name on disk."""
    files = [load_file(path) for path in sorted(folder.glob("model*.safetensors"))]
    return {name: tensor for tensors in files for name, tensor in tensors.items()}


if __name__ == "__main__":
    run(CHECKS, sys.argv[1:])
